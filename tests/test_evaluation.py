"""Losses at theta + a z against plain forwards with weights set by hand; stored weights keep their bits."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
)

from fedzo.directions import fill
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError, SpaceError
from fedzo.evaluation import Batch, Evaluator, LossRequest, TokenTargets, candidate_scores, layers, losses_from_scores
from fedzo.evaluation import evaluator as evaluator_module
from fedzo.quantisation import quantise
from fedzo.spaces import TrainableSpace, draw_mask, full, sparse

VOCAB = 64
_GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**_GQA, tie_word_embeddings=True),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.1,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "mistral": MistralConfig(**_GQA),
    "qwen3": Qwen3Config(**_GQA, head_dim=16),
    "bert": BertConfig(**_BERT),
    "roberta": RobertaConfig(**_BERT),
}
MASKED = ("bert", "roberta")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    factory = AutoModelForMaskedLM if name in MASKED else AutoModelForCausalLM
    return factory.from_config(copy.deepcopy(CONFIGS[name])).eval()


def make_batch(seed: int = 0) -> Batch:
    """Three examples of 3, 2 and 3 candidates of one or two tokens, on four rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (4, 9), generator=generator)
    lengths = torch.tensor([9, 5, 7, 6])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return Batch(
        inputs={"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask},
        labels=torch.tensor([1, 0, 2]),
        targets=TokenTargets(
            rows=torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 2, 2]),
            positions=torch.tensor([8, 8, 8, 4, 5, 6, 5, 5, 6, 5]),
            tokens=torch.tensor([5, 9, 30, 7, 8, 9, 11, 12, 13, 40]),
            candidates=torch.tensor([0, 1, 2, 3, 4, 4, 6, 7, 7, 8]),
            num_candidates=3,
        ),
    )


def plain_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The same losses from full logits, example by example."""
    with torch.no_grad():
        logits = model(**batch.inputs).logits.double()
    targets = batch.targets
    assert targets is not None
    sums: dict[int, list[float]] = {}
    for row, position, token, candidate in zip(
        targets.rows.tolist(),
        targets.positions.tolist(),
        targets.tokens.tolist(),
        targets.candidates.tolist(),
        strict=True,
    ):
        sums.setdefault(candidate, []).append(float(torch.log_softmax(logits[row, position], -1)[token]))
    losses = []
    for example, label in enumerate(batch.labels.tolist()):
        keys = [k for k in sorted(sums) if k // targets.num_candidates == example]
        means = torch.tensor([sum(sums[k]) / len(sums[k]) for k in keys], dtype=torch.float64)
        losses.append(-torch.log_softmax(means, 0)[keys.index(example * targets.num_candidates + label)])
    return torch.stack(losses)


def bits(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: p.detach().clone().contiguous().view(-1).view(torch.uint8) for name, p in tensors.items()}


def untouched(model: nn.Module, before: dict[str, Tensor], modules: list[tuple[int, int]]) -> bool:
    now = bits(model)
    return (
        list(now) == list(before)
        and all(torch.equal(now[name], before[name]) for name in now)
        and hooks(model) == modules
        and all(isinstance(p, nn.Parameter) for m in model.modules() for p in m._parameters.values() if p is not None)
    )


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


SPACES: dict[str, Callable[[nn.Module], TrainableSpace]] = {
    "full": full,
    "part": lambda model: full(model, exclude=["*norm*", "*layer_norm*", "*.bias"]),
    "random": lambda model: sparse(model, draw_mask(model, 0.2, "random", "f" * 64, seed=1)),
    "thin": lambda model: sparse(model, draw_mask(model, 0.01, "random", "f" * 64, seed=1)),
}


@pytest.fixture(params=["streamed", "at once"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """theta perturbed module by module, or as a whole before the forward."""
    monkeypatch.setattr(evaluator_module, "SMALL", 0 if request.param == "streamed" else 10**9)
    return str(request.param)


@pytest.mark.parametrize("kind", list(SPACES))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_losses_equal_plain_forwards_with_weights_set_by_hand(name: str, kind: str, way: str) -> None:
    model, batch = build(name), make_batch()
    space = SPACES[kind](model)
    theta = space.theta0(model) + 0.01 * torch.randn(space.size)
    before, hooked = bits(model), hooks(model)
    evaluator = Evaluator(model, space)
    family, eps = ("gaussian" if kind == "part" else "rademacher"), 0.02
    losses = evaluator.losses(LossRequest(theta, batch, (eps, -eps, 0.0), seeds=(12,), directions=Isotropic(family)))
    assert losses.shape == (1, 3, 3) and losses.dtype == torch.float32
    assert untouched(model, before, hooked)
    z = fill(torch.empty(space.size), 12, family)
    by_hand = copy.deepcopy(model)
    for a, found in zip((eps, -eps, 0.0), losses[0], strict=True):
        space.write(by_hand, theta + torch.tensor(a) * z)
        torch.testing.assert_close(found.double(), plain_losses(by_hand, batch), rtol=2e-5, atol=2e-6)
    assert not torch.allclose(losses[0, 0], losses[0, 1])


@pytest.mark.parametrize("kind", list(SPACES))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_paired_is_bit_equal_to_one_at_a_time(name: str, kind: str, way: str) -> None:
    """Also with several queries in a forward."""
    model, batch = build(name), make_batch()
    space = SPACES[kind](model)
    theta = space.theta0(model) + 0.01 * torch.randn(space.size)
    request = LossRequest(theta, batch, (1e-2, -1e-2), seeds=(5, 6, 7), directions=Isotropic("gaussian"))
    before, hooked = bits(model), hooks(model)
    paired, single = Evaluator(model, space, "paired"), Evaluator(model, space, "sequential")
    together, alone = paired.losses(request), single.losses(request)
    assert paired.evaluation == "paired" and paired._together(2, batch) >= 6
    assert torch.equal(together, alone)
    assert untouched(model, before, hooked)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_sparse_entries_beside_a_quantised_weight(name: str, kind: str) -> None:
    """Against a float32 model whose weights are the dequantised ones with theta written into them."""
    pytest.importorskip("bitsandbytes")
    model, batch = build(name), make_batch()
    mask = draw_mask(model, 0.05, "random", "f" * 64, seed=1)
    by_hand, plain_space = copy.deepcopy(model), sparse(model, mask)
    quantise(model, kind, masked={entry.name: entry.indices for entry in mask.entries})
    space = sparse(model, mask)
    theta = space.theta0(model) + 0.01 * torch.randn(space.size)
    assert space.hash == plain_space.hash and torch.equal(space.theta0(model), plain_space.theta0(by_hand))
    with torch.no_grad():
        for layer_name, layer in model.named_modules():
            if hasattr(layer, "dequantised"):
                by_hand.get_submodule(layer_name).weight.copy_(layer.dequantised())
    before, hooked = bits(model), hooks(model)
    request = LossRequest(theta, batch, (0.02, -0.02), seeds=(12, 13))
    losses = Evaluator(model, space, "paired").losses(request)
    assert torch.equal(losses, Evaluator(model, space, "sequential").losses(request))
    assert list(bits(model)) == list(before) and all(torch.equal(bits(model)[n], before[n]) for n in before)
    assert hooks(model) == hooked
    for seed, found in zip((12, 13), losses, strict=True):
        z = fill(torch.empty(space.size), seed, "rademacher")
        for a, row in zip((0.02, -0.02), found, strict=True):
            plain_space.write(by_hand, theta + torch.tensor(a) * z)
            torch.testing.assert_close(row.double(), plain_losses(by_hand, batch), rtol=2e-5, atol=2e-6)


def test_a_quantised_weight_is_not_trained_as_a_whole() -> None:
    pytest.importorskip("bitsandbytes")
    model = build("opt")
    quantise(model, "nf4")
    with pytest.raises(SpaceError, match=r"q_proj.weight .*quantised"):
        Evaluator(model, full(model, include=["*q_proj.weight"]))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_bfloat16_theta_is_perturbed_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BLOCK", 500)  # so that even these matrices are computed in blocks
    model, batch = build(name), make_batch()
    space = full(model)
    by_hand = copy.deepcopy(model)
    theta = space.adopt(model, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    before, hooked = bits(model), hooks(model)
    request = LossRequest(theta, batch, (1e-3, -1e-3, 0.0), seeds=(12, 13))
    losses = Evaluator(model, space, "paired").losses(request)
    assert torch.equal(losses, Evaluator(model, space, "sequential").losses(request))
    assert untouched(model, before, hooked)
    for seed, found in zip((12, 13), losses, strict=True):
        z = fill(torch.empty(space.size), seed, "rademacher")
        for a, row in zip((1e-3, -1e-3, 0.0), found, strict=True):
            space.write(by_hand, theta.float() + torch.tensor(a) * z)
            torch.testing.assert_close(row.double(), plain_losses(by_hand, batch), rtol=2e-5, atol=2e-6)


def test_auto_decides_on_the_first_batch() -> None:
    model, batch = build("opt"), make_batch()
    space = full(model)
    evaluator = Evaluator(model, space)
    request = LossRequest(space.theta0(model), batch, (1e-2, -1e-2), seeds=(5, 6))
    losses = evaluator.losses(request)
    assert evaluator.evaluation in ("paired", "sequential")
    assert torch.equal(losses, evaluator.losses(request))
    with pytest.raises(ConfigError, match="evaluation is 'both'"):
        Evaluator(model, space, "both")


class SharesARow(nn.Module):
    """Linear layers and an embedding on one row that all rows of the batch share, as for relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCAB, 8), nn.Embedding(9, 8)
        self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = self.project(self.places(torch.arange(input_ids.shape[1])[None]))
        return self.out((self.embed(input_ids) + places).mean(1))


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_a_row_that_all_points_share(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "DENSE", 1.0)
    torch.manual_seed(0)
    model = SharesARow()
    if kind == "full":
        space = full(model, ["project.weight", "places.weight"])
    else:
        space = sparse(model, draw_mask(model, 0.1, "random", "f" * 64, include=["project.weight"]))
    evaluators = [Evaluator(model, space, way) for way in ("paired", "sequential")]
    batch = Batch(make_batch().inputs, torch.tensor([0, 1, 2, 0]))
    request = LossRequest(space.theta0(model), batch, (0.1, -0.1), seeds=(1, 2))
    paired, single = (evaluator.losses(request) for evaluator in evaluators)
    assert torch.equal(paired, single) and not torch.equal(paired[0, 0], paired[0, 1])


class MixesRows(nn.Module):
    """A classifier whose rows see each other, as those of a mixture of experts with limited places do."""

    def __init__(self, regroups: bool) -> None:
        super().__init__()
        self.embed, self.out, self.regroups = nn.Embedding(VOCAB, 8), nn.Linear(8, 3), regroups

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids).mean(1)
        if self.regroups:
            return self.out(hidden[:3])[torch.arange(len(hidden)) % 3]
        return self.out(hidden - hidden.mean(0))


@pytest.mark.parametrize("regroups", [True, False])
def test_a_model_that_mixes_rows_is_not_paired(regroups: bool) -> None:
    torch.manual_seed(0)
    model = MixesRows(regroups)
    space = full(model)
    batch = Batch(make_batch().inputs, torch.tensor([0, 1, 2, 0]))
    request = LossRequest(space.theta0(model), batch, (0.1, -0.1), seeds=(1,))
    before, hooked = bits(model), hooks(model)
    with pytest.raises(SpaceError, match=r'"paired", but this model cannot be paired: .* use "auto" or "sequential"'):
        Evaluator(model, space, "paired").losses(request)
    assert untouched(model, before, hooked)
    auto = Evaluator(model, space)
    assert torch.equal(auto.losses(request), Evaluator(model, space, "sequential").losses(request))
    assert auto.evaluation == "sequential"


@pytest.mark.parametrize("name", ["llama-tied", "opt", "gpt2", "bert"])
def test_both_ways_and_repetition_are_bit_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(name), make_batch()
    space = full(model)
    request = LossRequest(space.theta0(model), batch, (1e-3, -1e-3), seeds=(3,))
    found = []
    for small in (0, 10**9):
        monkeypatch.setattr(evaluator_module, "SMALL", small)
        evaluator = Evaluator(model, space)
        found += [evaluator.losses(request), evaluator.losses(request)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert torch.equal(found[0], found[2])


def test_embedding_rows_that_are_looked_up_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**(_GQA | {"vocab_size": 30_000}), tie_word_embeddings=False)
    torch.manual_seed(0)
    model, batch = AutoModelForCausalLM.from_config(config).eval(), make_batch()
    space = full(model)
    request = LossRequest(space.theta0(model), batch, (0.02, -0.02), seeds=(3,))
    monkeypatch.setattr(evaluator_module, "SMALL", 0)
    sizes: list[int] = []
    real = Isotropic.axpy
    monkeypatch.setattr(Isotropic, "axpy", lambda of, x, *a, **k: sizes.append(x.numel()) or real(of, x, *a, **k))
    streamed = Evaluator(model, space, "sequential").losses(request)
    looked_up = len(batch.inputs["input_ids"].unique())
    assert sizes.count(config.hidden_size) >= 2 * looked_up and 30_000 * config.hidden_size not in sizes[:looked_up]
    monkeypatch.setattr(evaluator_module, "SMALL", 10**9)
    assert torch.equal(streamed, Evaluator(model, space, "sequential").losses(request))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_an_exception_in_a_forward_leaves_every_bit(name: str, way: str) -> None:
    model, batch = build(name), make_batch()
    space = full(model)
    request = LossRequest(space.theta0(model), batch, (1e-2, -1e-2), seeds=(3,))
    evaluator = Evaluator(model, space)
    expected = evaluator.losses(request)
    before, clean = bits(model), hooks(model)
    victim = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))][-2]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = victim.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluator.losses(request)
    handle.remove()
    assert untouched(model, before, clean)
    assert torch.equal(evaluator.losses(request), expected)


class ReadsChild(nn.Module):
    """A classifier that uses its embedding's weight from outside the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.out = nn.Linear(8, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return functional.linear(self.embed(input_ids).mean(1), self.out.weight[:3]) + self.embed.weight.sum()


def test_a_model_that_reads_another_modules_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "SMALL", 0)
    torch.manual_seed(0)
    model = ReadsChild()
    space = full(model)
    batch = Batch(make_batch().inputs, torch.tensor([0, 1, 2, 0]))
    evaluator = Evaluator(model, space)
    theta = space.theta0(model)
    losses = evaluator.losses(LossRequest(theta, batch, (0.1,), seeds=(1,)))
    assert evaluator._resident
    by_hand = copy.deepcopy(model)
    space.write(by_hand, theta + torch.tensor(0.1) * fill(torch.empty(space.size), 1, "rademacher"))
    torch.testing.assert_close(losses[0, 0], losses_from_scores(by_hand(**batch.inputs), batch.labels).detach())
    assert torch.isnan(evaluator.losses(LossRequest(theta * torch.nan, batch, (0.0,)))).all()


def test_a_module_that_returns_its_weight_does_not_leak_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weight(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.full((3,), value))

        def forward(self) -> Tensor:
            return self.value

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Weight(1.0), Weight(2.0)

        def forward(self, features: Tensor) -> Tensor:
            a, b = self.a(), self.b()
            return features + a - 10 * b

    monkeypatch.setattr(evaluator_module, "SMALL", 0)
    model = Two()
    space = full(model)
    theta = space.theta0(model)
    batch = Batch({"features": torch.zeros(2, 3)}, torch.tensor([0, 1]))
    z = fill(torch.empty(6), 4, "rademacher")
    perturbed = theta + torch.tensor(0.5) * z
    expected = losses_from_scores((perturbed[:3] - 10 * perturbed[3:]).expand(2, 3), batch.labels)
    evaluator = Evaluator(model, space)
    torch.testing.assert_close(evaluator.losses(LossRequest(theta, batch, (0.5,), seeds=(4,)))[0, 0], expected)
    assert not evaluator._resident


def test_scores_of_missing_candidates_and_language_modelling() -> None:
    model, batch = build("opt"), make_batch()
    with torch.no_grad():
        scores = candidate_scores(model, batch)
    assert scores.shape == (3, 3) and scores.dtype == torch.float32
    assert torch.isneginf(scores[1, 2]) and torch.isfinite(scores).sum() == 8
    losses = losses_from_scores(scores, batch.labels)
    assert torch.isfinite(losses).all()
    ids = batch.inputs["input_ids"][:2]
    targets = TokenTargets(
        rows=torch.tensor([0, 0, 1, 0]),
        positions=torch.tensor([0, 1, 2, 2]),
        tokens=torch.stack([ids[0, 1], ids[0, 2], ids[1, 3], ids[0, 3]]),
        candidates=torch.tensor([0, 0, 1, 0]),
        num_candidates=1,
    )
    inputs = {name: value[:2] for name, value in batch.inputs.items()}
    with torch.no_grad():
        scores = candidate_scores(model, Batch(inputs, torch.zeros(2, dtype=torch.int64), targets))
        logits = model(**inputs).logits
    expected = functional.cross_entropy(logits[0, :3], ids[0, 1:4])
    torch.testing.assert_close(losses_from_scores(scores, torch.zeros(2, dtype=torch.int64))[0], expected)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_head_runs_at_distinct_answer_positions_only(name: str) -> None:
    model, batch = build(name), make_batch()
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        candidate_scores(model, batch)
    assert shapes == [(1, 5, VOCAB)]  # ten scored tokens at five (row, position) pairs


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    model, batch = build("llama-tied"), make_batch()
    targets = batch.targets
    assert targets is not None
    keep = targets.rows == 0
    alone = Batch(
        {name: value[:1] for name, value in batch.inputs.items()},
        batch.labels[:1],
        TokenTargets(*(getattr(targets, f)[keep] for f in ("rows", "positions", "tokens", "candidates")), 3),
    )
    with torch.no_grad():
        torch.testing.assert_close(candidate_scores(model, alone)[0], candidate_scores(model, batch)[0])


def test_many_thetas_over_one_model() -> None:
    model, batch = build("llama-tied"), make_batch()
    space = full(model)
    evaluator = Evaluator(model, space)
    thetas = [space.theta0(model) * factor for factor in (1.0, 1.1, 0.9)]
    first = [evaluator.scores(theta, batch) for theta in thetas]
    second = [evaluator.scores(theta, batch) for theta in reversed(thetas)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(second), strict=True))
    assert not torch.equal(first[0], first[1])


def test_bound_parameters_serve_too(way: str) -> None:
    model, batch = build("opt"), make_batch()
    space = full(model)
    theta = space.theta0(model)
    expected = Evaluator(model, space).losses(LossRequest(theta, batch, (0.01, 0.0), seeds=(2,)))
    space.bind(model, theta)
    copy_of_theta = theta.clone()
    assert torch.equal(Evaluator(model, space).losses(LossRequest(theta, batch, (0.01, 0.0), seeds=(2,))), expected)
    assert torch.equal(theta, copy_of_theta)


def test_a_wrong_theta_is_refused() -> None:
    model, batch = build("opt"), make_batch()
    space = full(model)
    with pytest.raises(SpaceError, match="float32 vector"):
        Evaluator(model, space).scores(torch.zeros(3), batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["full", "sparse", "nf4", "int8"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_cuda_gives_the_losses_of_the_cpu(name: str, kind: str) -> None:
    """Paired on CUDA against the CPU; the self-check compares with the backend's own noise."""
    if kind in ("nf4", "int8") and name == "gpt2":
        pytest.skip("GPT-2 has no layer that is quantised")
    found = []
    for device in ("cpu", "cuda"):
        model, batch = build(name), make_batch()
        space = full(model)
        if kind != "full":
            mask = draw_mask(model, 0.01, "random", "f" * 64, seed=1)
            taken = {entry.name: entry.indices for entry in mask.entries}
            quantise(model, "none" if kind == "sparse" else kind, masked=taken, device=device)
            space = sparse(model, mask)
        model.to(device)
        theta = space.theta0(model).to(device)
        request = LossRequest(theta, batch, (0.02, -0.02), seeds=(12, 13))
        found.append(Evaluator(model, space, "paired").losses(request))
        assert Evaluator(model, space).losses(request).shape == (2, 2, 3)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
