"""Greedy generation, by transformers' own loop with its cache, whatever a checkpoint's generation settings say."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList


class _LineEnd(StoppingCriteria):  # type: ignore[misc]
    """A row is done once its newest token has a line break."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, -1:])
        return torch.tensor(["\n" in text for text in texts], device=input_ids.device)


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int
) -> list[str]:
    """What a causal model goes on with after each prompt, to the end of the line, stripped of white space.

    Prompts of like length go together, padded on the left. A model with a learnt prefix or prompt (PEFT), which does
    not know of padding before it, gets prompts of equal length only.

    Args:
        model: a transformers or PEFT causal language model in eval mode.
        prompts: token ids, special tokens included; at least one each.
        max_new_tokens: tokens of an answer at most.
        batch_size: prompts of a forward pass at most.
    """
    device = next(model.parameters()).device
    pad = next(int(t) for t in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if t is not None)
    learnt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    own: Any = model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    # Every setting that changes the choice of a token: those left out would be filled in from the checkpoint's.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, min_new_tokens=0, do_sample=False, num_beams=1, temperature=1.0,
        top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0, guidance_scale=1.0,
        eos_token_id=end, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    stop = StoppingCriteriaList([_LineEnd(tokenizer)])
    answers = [""] * len(prompts)
    for rows in _groups([len(prompt) for prompt in prompts], batch_size, equal=learnt):
        width = max(len(prompts[row]) for row in rows)
        before = [width - len(prompts[row]) for row in rows]
        ids = torch.tensor([[pad] * n + list(prompts[row]) for n, row in zip(before, rows, strict=True)], device=device)
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in before], device=device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # a learnt prompt counts them itself
            output = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop
            )
        for row, text in zip(rows, tokenizer.batch_decode(output[:, width:], skip_special_tokens=True), strict=True):
            answers[row] = text.split("\n")[0].strip()
    return answers


def _groups(lengths: Sequence[int], size: int, equal: bool) -> list[list[int]]:
    """Row numbers by length, at most `size` together; `equal`: of one length only."""
    groups: list[list[int]] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        last = groups[-1] if groups else []
        if not last or len(last) == size or (equal and lengths[last[0]] != lengths[row]):
            groups.append(last := [])
        last.append(row)
    return groups
