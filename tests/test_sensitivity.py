"""Masks from calibration data, and the command that makes them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from fedzo import sensitivity
from fedzo.cli import app
from fedzo.errors import DataError, SpaceError
from fedzo.evaluation import Batch, TokenTargets, candidate_scores, losses_from_scores
from fedzo.models import load_model
from fedzo.sensitivity import forward_mask, sensitive_mask, text_batches
from fedzo.spaces import Mask, draw_mask, overlap

BASE = "f" * 64
SMALL = {"vocab_size": 40, "max_position_embeddings": 32}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
    "bert": lambda: BertForMaskedLM(
        BertConfig(**SMALL, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ),
}


few_queries = partial(forward_mask, queries=1)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    if name == "tied llama":
        model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr]
    return model.train()


def batches(count: int = 2) -> list[Batch]:
    """One example in each: a prompt with two candidates of one token."""
    made = []
    for seed in range(count):
        ids = torch.randint(1, 40, (1, 6 + seed), generator=torch.Generator().manual_seed(seed))
        zeros, place = torch.zeros(2, dtype=torch.int64), torch.full((2,), 5 + seed)
        targets = TokenTargets(zeros, place, torch.tensor([3, 7]), torch.tensor([0, 1]), 2)
        made.append(
            Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([seed % 2]), targets)
        )
    return made


def dense_scores(model: nn.Module) -> dict[str, torch.Tensor]:
    """Summed squares of each batch's gradient, the plain way."""
    model.eval()
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.ndim >= 2}
    for batch in batches():
        model.zero_grad()
        losses_from_scores(candidate_scores(model, batch), batch.labels).mean().backward()
        for name, parameter in model.named_parameters():
            if name in scores and parameter.grad is not None:
                scores[name] += parameter.grad.square()
    model.zero_grad()
    return scores


@pytest.mark.parametrize("name", list(MODELS))
def test_sensitive_is_the_top_of_the_squared_gradients_and_grouping_changes_nothing(name: str) -> None:
    model = build(name)
    mask = sensitive_mask(model, batches(), 0.02, BASE, settings={"task": "test"})
    scores = dense_scores(build(name))
    entries = [(-float(v), n, i) for n in sorted(scores) for i, v in enumerate(scores[n].reshape(-1).tolist())]
    expected = sorted((n, i) for _, n, i in sorted(entries)[: round(0.02 * len(entries))])
    assert [(e.name, i) for e in mask.entries for i in e.indices.tolist()] == expected
    parameters = dict(model.named_parameters())
    for entry in mask.entries:
        assert torch.equal(entry.values, parameters[entry.name].detach().reshape(-1)[entry.indices])
    assert mask.method == "sensitive" and mask.settings["task"] == "test" and mask.settings["density"] == 0.02
    again = sensitive_mask(model, batches(), 0.02, BASE, settings={"task": "test"}, group_entries=2000)
    assert again.hash == mask.hash


@pytest.mark.parametrize("make", [sensitive_mask, few_queries])
def test_threads_and_the_order_of_registration_change_nothing(make: Callable[..., Mask]) -> None:
    threads = torch.get_num_threads()
    try:
        hashes = set()
        for count in (1, 2):
            torch.set_num_threads(count)
            model = build("bert")
            hashes.add(make(model, batches(), 0.02, BASE).hash)
            for module in model.modules():  # registered the other way round
                if module is not model and not isinstance(module, nn.ModuleList):  # else the tied weight is renamed
                    module._modules = dict(reversed(module._modules.items()))
            hashes.add(make(model, batches(), 0.02, BASE).hash)
        assert len(hashes) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [sensitive_mask, few_queries])
def test_the_model_is_left_as_it_was_also_after_an_error(make: Callable[..., Mask]) -> None:
    model = build("gpt2")
    frozen = model.transformer.wpe.weight.requires_grad_(False)  # type: ignore[union-attr]
    kept = model.transformer.wte.weight  # type: ignore[union-attr]
    kept.grad = torch.ones_like(kept)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def unchanged() -> bool:
        others = [p for p in model.parameters() if p is not frozen and p is not kept]
        return (
            all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            and not frozen.requires_grad
            and all(p.requires_grad and p.grad is None for p in others)
            and torch.equal(kept.grad, torch.ones_like(kept))
            and all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
            and all(not p._post_accumulate_grad_hooks for p in others)
        )

    make(model, batches(), 0.1, BASE)
    assert unchanged()
    broken = batches()
    broken[1].inputs["input_ids"][0, 0] = 1000
    with pytest.raises(IndexError):
        make(model, broken, 0.1, BASE)
    assert unchanged()


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)  # type: ignore[union-attr]
    for make in (sensitive_mask, few_queries):
        with pytest.raises(DataError, match=r"batch 0 .*not finite"):
            make(model, batches(), 0.1, BASE)
        with pytest.raises(DataError, match="no calibration data"):
            make(model, [], 0.1, BASE)
        with pytest.raises(SpaceError, match=r"density is 1\.5"):
            make(model, batches(), 1.5, BASE)


def test_forward_estimates_the_factors_that_backward_gives() -> None:
    model = build("gpt2").eval()
    layer = next(found for found in sensitivity._linear_layers(model, dict(model.named_parameters())))
    batch, got = batches()[0], []
    handle = layer.module.register_forward_hook(lambda _, __, y: (y.retain_grad(), got.append(y))[1])
    losses_from_scores(candidate_scores(model, batch), batch.labels).sum().backward()
    handle.remove()
    length = float(got[0].grad.reshape(-1, layer.outputs).sum(0).square().sum())
    with torch.no_grad():
        squares = [float(sensitivity._projected(model, layer, batch, 1e-2, s, 0).square()) for s in range(100)]
    assert np.mean(squares) == pytest.approx(length, rel=5 * np.std(squares) / np.mean(squares) / 100**0.5)


def test_forward_finds_more_of_the_sensitive_entries_than_chance() -> None:
    model = build("tied llama")
    with torch.no_grad():  # features of unlike size, as trained models have them
        model.model.layers[0].input_layernorm.weight[:3] = 8.0  # type: ignore[union-attr,index]
        model.model.layers[1].post_attention_layernorm.weight[4:6] = 8.0  # type: ignore[union-attr,index]
    layers = ["*_proj.weight"]
    backward = sensitive_mask(model, batches(4), 0.02, BASE, include=layers)
    forward = forward_mask(model, batches(4), 0.02, BASE, queries=3, include=layers)
    assert forward.method == "forward" and forward.size == backward.size
    assert overlap(forward, backward) > 5 * 0.02 * backward.size
    assert forward_mask(model, batches(4), 0.02, BASE, queries=3, include=layers, seed=1).hash != forward.hash
    with pytest.raises(SpaceError, match="no linear layer"):
        forward_mask(model, batches(), 0.02, BASE, include=["*embed_tokens*"])
    with pytest.raises(SpaceError, match="at least 1 query"):
        forward_mask(model, batches(), 0.02, BASE, queries=0)


TEXT = "a good film , and a bad one . the plot was great but the acting was terrible ! " * 30


def test_text_for_a_causal_model_scores_every_next_token() -> None:
    loaded = load_model("embedded", "causal")
    made = text_batches(loaded, TEXT, length=16, examples=5, seed=1)
    assert len(made) == 5
    for batch in made:
        ids, targets = batch.inputs["input_ids"], batch.targets
        assert ids.shape == (1, 16) and targets is not None and targets.num_candidates == 1
        assert torch.equal(targets.tokens[:-1], ids[0, 1:]) and torch.equal(targets.positions, torch.arange(16))
    again = text_batches(loaded, TEXT, length=16, examples=5, seed=1)
    assert all(torch.equal(a.inputs["input_ids"], b.inputs["input_ids"]) for a, b in zip(made, again, strict=True))
    with pytest.raises(DataError, match=r"too short.*wanted 5000"):
        text_batches(loaded, TEXT, length=16, examples=5000, seed=1)
    with pytest.raises(DataError, match="100000 tokens"):
        text_batches(loaded, TEXT, length=100000, examples=1, seed=1)
    with pytest.raises(SpaceError, match="no language-model head"):
        text_batches(load_model("embedded", "encoder"), TEXT, length=16, examples=5, seed=1)


def words(**options: Any) -> list[str]:
    """The command's options."""
    return [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def fedzo(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["mask", "embedded", *arguments])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_command_writes_a_mask_and_compares_it(text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    chosen = words(density=0.01, length=16, examples=4)
    answer = fedzo(*chosen, *words(calibration=text, out=first))
    assert answer.exit_code == 0, answer.output
    mask = Mask.load(first)
    loaded = load_model("embedded", "causal")
    mask.check(loaded.model, loaded.fingerprint)
    assert mask.method == "sensitive" and mask.hash in answer.output and mask.entries[0].name in answer.output
    answer = fedzo(*chosen, *words(method="magnitude", compare=first, out=second), "--json")
    figures = json.loads(answer.stdout)
    assert figures["hash"] == Mask.load(second).hash and figures["bytes_per_index"] <= 5
    assert Mask.load(second).hash == draw_mask(loaded.model, 0.01, "magnitude", loaded.fingerprint).hash
    assert figures["overlap"] == overlap(mask, Mask.load(second))
    assert sum(row["entries"] for row in figures["held"]) == figures["entries"] == mask.size


def test_bad_input_is_one_message_and_no_file(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    loaded = load_model("embedded", "causal")
    draw_mask(loaded.model, 0.01, "random", "0" * 64).save(other)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfd")
    present = sorted(tmp_path.iterdir())
    out = words(out=tmp_path / "mask.safetensors")
    short = words(calibration=text, length=16)
    for arguments, told in (
        (words(density=0, calibration=text), "density"),
        (words(density=1.5, method="random"), "density"),
        (words(method="sensitive"), "--calibration"),
        (words(calibration=text, length=16, examples=5000), "too short"),
        (words(calibration=tmp_path / "none"), "none"),
        (words(calibration=tmp_path / "binary"), "binary"),
        ([*short, *words(examples=2, include="no.such.*")], "no.such"),
        ([*short, *words(examples=2, compare=other)], "another model"),
        (words(method="random", compare=text), "damaged or no mask"),
        (words(method="random", task="sst2"), "--data"),
        (words(method="random", kind="masked"), "kind masked"),
    ):
        answer = fedzo(*arguments, *out)
        assert answer.exit_code not in (0, None) and told in answer.output, (arguments, answer.output)
        assert "Traceback" not in answer.output and sorted(tmp_path.iterdir()) == present
    assert "exists" in fedzo(*words(method="random", out=other)).output
