"""Generated answers: greedy decoding at theta, and runs whose task is judged by them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import fedzo, options
from test_tasks import bpe
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedzo import spaces
from fedzo.evaluation import Evaluator
from fedzo.evaluation.generation import generate
from fedzo.models import LoadedModel, add_adapter
from fedzo.tasks import EncodedDataset, build_task
from fedzo.tasks.encoding import causal_prefix

TEXTS = ("the film is", "a dull and lifeless plot with no heart it was", "it", "the acting is good and the story is")


def tiny(architecture: str, tokenizer: Any) -> nn.Module:
    torch.manual_seed(1)
    if architecture == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.3, **size)).eval()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.3, **size)
    return LlamaForCausalLM(config).eval()


def greedy(model: nn.Module, tokenizer: Any, prompt: list[int], count: int) -> str:
    """One prompt alone, one whole forward a token."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)
        if token == tokenizer.eos_token_id or "\n" in tokenizer.decode([token]):
            break
    text: str = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
    return text.split("\n", maxsplit=1)[0].strip()


def prompts(tokenizer: Any) -> list[list[int]]:
    return [causal_prefix(tokenizer) + tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_batches_generate_what_each_prompt_alone_does(architecture: str) -> None:
    tokenizer = bpe()
    model = tiny(architecture, tokenizer)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=2)
    found = generate(model, tokenizer, prompts(tokenizer), max_new_tokens=12, batch_size=3)
    assert found == [greedy(model, tokenizer, prompt, 12) for prompt in prompts(tokenizer)]
    assert all(found) and len(set(found)) > 1


@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
def test_generation_at_theta_is_that_of_a_model_with_these_weights(adapter: str) -> None:
    tokenizer = bpe()
    loaded = add_adapter(
        LoadedModel(tiny("llama", tokenizer), tokenizer, "causal", ""), adapter, rank=2, alpha=2.0, virtual_tokens=3,
        target_modules=(), seed=0,
    )  # fmt: skip
    model, space = loaded.model, spaces.adapter(loaded.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theta = torch.randn(space.size, generator=torch.Generator().manual_seed(3))
    evaluator = Evaluator(model, space)
    data = EncodedDataset(
        build_task("toy-reviews", "causal", tokenizer, max_length=64), [{"sentence": "dull", "label": 0}]
    )
    evaluator.scores(theta, data.batch([0]))
    with evaluator.at(theta) as placed:
        found = generate(placed, tokenizer, prompts(tokenizer), max_new_tokens=8, batch_size=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stored = [greedy(model, tokenizer, prompt, 8) for prompt in prompts(tokenizer)]
    with torch.no_grad():
        for segment in space.segments:
            values = theta[segment.offset : segment.offset + segment.size]
            model.get_parameter(segment.name).copy_(values.view(segment.shape))
    assert found == [greedy(model, tokenizer, prompt, 8) for prompt in prompts(tokenizer)]
    assert found != stored


def test_an_answer_ends_at_the_line_break_at_the_end_token_or_at_its_length() -> None:
    """Each token of this model is followed by one other: a chain that says "great story", then breaks the line."""
    tokenizer = bpe()
    chain = tokenizer(" great story\n great end", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(chain[:2]) == " great story"
    size = len(tokenizer) + 2
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        head_dim=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    start = tokenizer(":")["input_ids"][-1]
    follows = {start: chain[0], chain[0]: chain[1], chain[1]: chain[2]}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight.zero_()
        for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            layer.weight.zero_()
        for token, then in follows.items():
            model.lm_head.weight[then, token] = 1.0
    short, long = [0, start], [0, 5, 6, start]
    assert generate(model, tokenizer, [short, long], max_new_tokens=9, batch_size=2) == ["great story"] * 2
    assert generate(model, tokenizer, [long], max_new_tokens=1, batch_size=2) == ["great"]
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id, chain[0]] = 2.0
    assert generate(model, tokenizer, [short], max_new_tokens=9, batch_size=2) == ["great"]
    assert generate(model, tokenizer, [], max_new_tokens=9, batch_size=2) == []


def questions(folder: Path) -> Path:
    """SQuAD's columns, in the words of the embedded model."""
    folder.mkdir()
    nouns, words = ("film", "hotel", "meal", "room", "plot", "staff"), ("great", "terrible", "lovely", "dirty")
    rows = [
        {"title": "reviews", "context": f"the {noun} is {word} .", "question": f"how is the {noun} ?",
         "answers": {"text": [word, f"the {noun} is {word}"], "answer_start": [0, 0]}}
        for noun in nouns for word in words
    ]  # fmt: skip
    for name, part in (("train", rows[:14]), ("validation", rows[14:19]), ("test", rows[19:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


def test_a_run_is_judged_by_its_generated_answers(tmp_path: Path) -> None:
    data, out = questions(tmp_path / "squad"), tmp_path / "run"
    chosen = options(
        data, task__name="squad", data__clients=2, federation__rounds=2, evaluation__every=1,
        evaluation__max_new_tokens=6,
    )  # fmt: skip
    answer = fedzo("run", *chosen, "--out", out)
    assert answer.code == 0, answer.err
    assert "after 0 rounds: validation f1" in answer.err and "%" in answer.out
    assert {"f1.png", "exact_match.png", "loss.png"} <= {path.name for path in out.iterdir()}
    shown = json.loads(fedzo("inspect", out, "--json").out)
    for name in ("test_f1", "test_f1_before", "validation_exact_match"):
        assert 0 <= shown[name] <= 1
    assert "test_accuracy" not in shown and shown["best_round"] in (0, 1, 2)
    figures = json.loads(fedzo("evaluate", out, "--json").out)
    assert (figures["f1"], figures["exact_match"]) == (shown["test_f1"], shown["test_exact_match"])
    assert figures["loss"] == shown["test_loss"] and figures["theta_digest"] == shown["theta_digest"]
    assert fedzo("verify", out).code == 0


def test_impossible_generation_is_refused(tmp_path: Path) -> None:
    data = questions(tmp_path / "squad")
    for changes, message in (
        ({"evaluation__max_new_tokens": 128}, "evaluation.max_new_tokens is 128 and model.max_length 128"),
        ({"data__partition": "dirichlet"}, 'spreads labels, but task "squad" has none'),
        ({"data__shots": 4, "data__limit": 5}, "data.shots is 4 and data.limit is 5"),
    ):
        answer = fedzo("run", *options(data, task__name="squad", data__clients=2, **changes), "--out", tmp_path / "run")
        assert answer.code and message in " ".join(answer.err.split())
