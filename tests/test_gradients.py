"""Derivatives along directions and gradients of ranges, against plain back-propagation and central differences."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS, SCHEMES, TARGETS, batch_of, build, plain_losses, with_scheme
from small_runs import fedzo, make_data, options
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from fedzo import spaces
from fedzo.directions import fill
from fedzo.errors import ModelError, SpaceError
from fedzo.estimators import ESTIMATORS, Query
from fedzo.evaluation import Batch, DerivativeRequest, Evaluator, GradientRequest, LossRequest
from fedzo.federation.ledger import Ledger
from fedzo.models import LoadedModel, add_adapter
from fedzo.quantisation import quantise
from fedzo.spaces import TrainableSpace


@dataclass(frozen=True)
class Gaussian:
    """Directions that note how many entries of one were asked for at once."""

    sizes: list[int] = field(default_factory=list)

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        return fill(out, seed, "gaussian", offset=offset)

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        self.sizes.append(theta.numel())
        z = fill(torch.empty_like(theta), seed, "gaussian", offset=offset)
        return (theta if out is None else out).copy_(theta + coefficient * z)

    def replay(self, theta: Tensor, seeds: Any, coefficients: Any) -> Tensor:
        raise NotImplementedError


def near(space: TrainableSpace, model: nn.Module) -> Tensor:
    return space.theta0(model) + 0.01 * torch.randn(space.size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, space: TrainableSpace, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """[B] losses and [B, size] their gradients by plain back-propagation through a copy with theta written into it."""
    model = copy.deepcopy(model)
    space.write(model, theta)
    parameters = space.parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    losses = plain_losses(model, batch)
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, materialize_grads=True)
        flat = [
            g.reshape(-1) if s.indices is None else g.reshape(-1)[s.indices]
            for g, s in zip(found, space.segments, strict=True)
        ]
        rows.append(torch.cat(flat))
    return losses.detach(), torch.stack(rows)


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """Everything that an evaluation could leave behind."""
    parameters = [(n, p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()]
    modules = [
        ("forward" in m.__dict__, len(m._forward_pre_hooks), all(isinstance(p, nn.Parameter) for p in own))
        for m in model.modules()
        for own in [[p for p in m._parameters.values() if p is not None]]
    ]
    return [*parameters, *modules]


def same(first: list[tuple[Any, ...]], second: list[tuple[Any, ...]]) -> bool:
    return all(
        all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(x, y, strict=True))
        for x, y in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", list(CONFIGS))
def test_derivatives_are_those_of_back_propagation(name: str, scheme: str) -> None:
    try:
        model, space = with_scheme(build(name), scheme)
    except ModelError:
        if scheme == "prefix":
            pytest.skip("the architecture takes no prefix")
        model, space = with_scheme(build(name), scheme, TARGETS[name])
    theta, batch = near(space, model), batch_of(name)
    before = state(model)
    losses, expected = gradients(model, space, theta, batch)
    evaluator, z = Evaluator(model, space), Gaussian()
    answer = evaluator.answer(DerivativeRequest(theta, batch, (5, 6), z))
    gradient = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    assert same(state(model), before)
    assert answer.shape == (3, 3) and answer.dtype == gradient.dtype == torch.float32
    assert gradient.shape == (3 + space.size,)
    scale = float(expected.norm(dim=1).max())
    torch.testing.assert_close(answer[0], losses, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient[:3], losses, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient[3:], expected.mean(0), rtol=1e-4, atol=1e-5 * scale)
    for seed, found in zip((5, 6), answer[1:], strict=True):
        along = expected @ fill(torch.empty(space.size), seed, "gaussian")
        torch.testing.assert_close(found, along, rtol=1e-4, atol=1e-5 * scale)
    if scheme == "full":  # one module's direction at a time
        assert max(z.sizes) <= max(segment.size for segment in space.segments)


@pytest.mark.parametrize("name", ["gpt2", "opt, projected", "bert encoder"])
def test_derivatives_are_the_limit_of_central_differences(name: str) -> None:
    """The difference quotient taken in float64, where it has some ten digits."""
    model, space = with_scheme(build(name), "full")
    theta, batch, h = near(space, model), batch_of(name), 1e-6
    answer = Evaluator(model, space).answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    z, exact = fill(torch.empty(space.size), 5, "gaussian").double(), copy.deepcopy(model).double()
    found = []
    for a in (h, -h):
        with torch.no_grad():
            for segment, parameter in zip(space.segments, space.parameters(exact).values(), strict=True):
                place = slice(segment.offset, segment.offset + segment.size)
                parameter.copy_((theta.double() + a * z)[place].view(segment.shape))
            found.append(plain_losses(exact, batch))
    torch.testing.assert_close(answer[1].double(), (found[0] - found[1]) / (2 * h), rtol=1e-4, atol=1e-4)


def test_a_bfloat16_theta_has_the_derivatives_of_its_values() -> None:
    model, space = with_scheme(build("llama"), "full")
    plain, batch = copy.deepcopy(model), batch_of("llama")
    theta = space.adopt(model, torch.bfloat16)
    kept = theta.clone()
    losses, expected = gradients(plain, space, theta.float(), batch)
    evaluator = Evaluator(model, space)
    answer = evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    torch.testing.assert_close(answer[0], losses, rtol=2e-5, atol=2e-6)
    along = expected @ fill(torch.empty(space.size), 5, "gaussian")
    torch.testing.assert_close(answer[1], along, rtol=1e-4, atol=1e-4)
    gradient = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    torch.testing.assert_close(gradient[3:], expected.mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(theta, kept)


def sparse_of(loaded: LoadedModel, kind: str) -> tuple[nn.Module, TrainableSpace]:
    mask = spaces.draw_mask(loaded.model, 0.05, "random", loaded.fingerprint, seed=1)
    quantise(loaded.model, kind, masked={entry.name: entry.indices for entry in mask.entries})
    return loaded.model, spaces.sparse(loaded.model, mask)


def scales_of(loaded: LoadedModel, kind: str) -> tuple[nn.Module, TrainableSpace]:
    quantise(loaded.model, kind, double=False)
    return loaded.model, spaces.scales(loaded.model)


def lora_of(loaded: LoadedModel, kind: str) -> tuple[nn.Module, TrainableSpace]:
    quantise(loaded.model, kind)
    model = add_adapter(loaded, "lora", rank=2, seed=3).model
    return model, spaces.adapter(model)


@pytest.mark.parametrize("make", [sparse_of, scales_of, lora_of])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "bert"])  # smooth ones: differences know nothing of OPT's kinks
def test_over_a_quantised_base_both_modes_and_differences_agree(
    name: str, kind: str, make: Callable[[LoadedModel, str], tuple[nn.Module, TrainableSpace]]
) -> None:
    pytest.importorskip("bitsandbytes")
    model, space = make(build(name), kind)
    theta, batch = space.theta0(model), batch_of(name)
    evaluator = Evaluator(model, space, "sequential")
    before = state(model)
    answer = evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    gradient = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    assert same(state(model), before)
    z = fill(torch.empty(space.size), 5, "gaussian")
    torch.testing.assert_close(answer[1].mean(), gradient[3:] @ z, rtol=1e-4, atol=1e-4)
    h = 1e-3
    plus, minus = (evaluator.answer(LossRequest(theta + a * z, batch, (0.0,)))[0, 0].double() for a in (h, -h))
    torch.testing.assert_close(answer[1].double(), (plus - minus) / (2 * h), rtol=0.05, atol=5e-3)


def test_codes_have_no_derivative_but_what_is_beside_them_has() -> None:
    pytest.importorskip("bitsandbytes")
    loaded = build("bert encoder")
    quantise(loaded.model, "int8", double=False)
    space = spaces.codes(loaded.model, dense=("head.weight",))
    theta, batch = space.theta0(loaded.model), batch_of("bert encoder")
    evaluator = Evaluator(loaded.model, space)
    with pytest.raises(SpaceError, match="whole numbers and have no derivative"):
        evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    with pytest.raises(SpaceError, match="whole numbers and have no derivative"):
        evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    head = next(s for s in space.segments if s.name == "head.weight")
    found = evaluator.answer(GradientRequest(theta, batch, ((head.offset, head.size),)))
    exact = loaded.model
    with torch.no_grad():
        features = exact.features(**batch.inputs)  # type: ignore[operator]
    weight = exact.head.weight.detach().clone().requires_grad_()  # type: ignore[union-attr]
    functional.cross_entropy(exact.scale * features @ weight.t(), batch.labels).backward()  # type: ignore[operator]
    assert weight.grad is not None
    torch.testing.assert_close(found[3:], weight.grad.reshape(-1), rtol=1e-4, atol=1e-5)


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """What the graph keeps for going back, without the parameters themselves."""
    kept: list[int] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield kept


def test_the_graph_reaches_down_to_the_trained_part_only() -> None:
    model, space = with_scheme(build("llama"), "full")
    assert all(parameter.requires_grad for parameter in model.parameters())
    theta, batch, evaluator = near(space, model), batch_of("llama"), Evaluator(model, space)
    _, expected = gradients(model, space, theta, batch)
    names = {segment.name: segment for segment in space.segments}

    def kept(*chosen: str) -> int:
        ranges = tuple((names[name].offset, names[name].size) for name in chosen)
        with kept_bytes() as found:
            answer = evaluator.answer(GradientRequest(theta, batch, ranges))
        parts = torch.cat([expected.mean(0)[a : a + n] for a, n in ranges])
        torch.testing.assert_close(answer[3:], parts, rtol=1e-4, atol=1e-5)
        return sum(found)

    head, last = kept("lm_head.weight"), kept("model.layers.1.mlp.down_proj.weight", "lm_head.weight")
    whole = kept("model.embed_tokens.weight", "lm_head.weight")
    assert head < last < whole / 3 and head < whole / 10


def test_the_graph_over_a_quantised_base_does_not_keep_its_weights() -> None:
    pytest.importorskip("bitsandbytes")
    kept = []
    for kind in ("none", "nf4"):
        model, space = lora_of(build("llama"), kind)
        request = GradientRequest(space.theta0(model), batch_of("llama"), ((0, space.size),))
        with kept_bytes() as found:
            Evaluator(model, space).answer(request)
        kept.append(sum(found))
    assert kept[1] < kept[0]


def test_ranges_may_cut_and_repeat_segments() -> None:
    model, space = with_scheme(build("gpt2"), "sparse")
    theta, batch, evaluator = near(space, model), batch_of("gpt2"), Evaluator(model, space)
    whole = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))[3:]
    middle = space.segments[1].offset + 1
    parts = evaluator.answer(GradientRequest(theta, batch, ((middle, 9), (3, 1), (middle, 2))))[3:]
    expected = torch.cat([whole[middle : middle + 9], whole[3:4], whole[middle : middle + 2]])
    torch.testing.assert_close(parts, expected, rtol=1e-4, atol=1e-6)
    for wrong in ((-1, 2), (0, 0), (space.size - 1, 2)):
        with pytest.raises(SpaceError, match="within the"):
            evaluator.answer(GradientRequest(theta, batch, (wrong,)))
    with pytest.raises(SpaceError, match="along no direction"):
        evaluator.answer(DerivativeRequest(theta, batch, (), Gaussian()))
    with pytest.raises(SpaceError, match="float32 vector"):
        evaluator.answer(DerivativeRequest(theta[:3], batch, (5,), Gaussian()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_exception_in_a_forward_leaves_everything(name: str) -> None:
    model, space = with_scheme(build(name), "full")
    theta, batch, evaluator = near(space, model), batch_of(name), Evaluator(model, space)
    before = state(model)
    victim = [m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)][-2]

    def fail(*_: object) -> None:
        raise IndexError("no such place")

    handle = victim.register_forward_pre_hook(fail)
    for request in (
        DerivativeRequest(theta, batch, (5,), Gaussian()),
        GradientRequest(theta, batch, ((0, space.size),)),
    ):
        with pytest.raises(IndexError):
            evaluator.answer(request)
    handle.remove()
    assert same(state(model), before)
    assert evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian())).shape == (2, 3)


class Doubled(torch.autograd.Function):
    """An operation with a backward derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


class Small(nn.Module):
    """A classifier that reads its embedding's weight from outside, and can have such an operation."""

    def __init__(self, only_backward: bool) -> None:
        super().__init__()
        self.embed, self.out, self.only_backward = nn.Embedding(64, 8), nn.Linear(8, 3), only_backward

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids).mean(1) + self.embed.weight.mean(0)
        return self.out(Doubled.apply(hidden) if self.only_backward else 2.0 * hidden)


def test_an_operation_without_forward_mode_is_named_and_a_weight_read_from_outside_is_noticed() -> None:
    batch = batch_of("bert encoder")
    torch.manual_seed(0)
    model = Small(only_backward=False)
    space = spaces.full(model)
    theta = near(space, model)
    evaluator = Evaluator(model, space)
    answer = evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    losses, expected = gradients(model, space, theta, batch)
    torch.testing.assert_close(answer[0], losses)
    torch.testing.assert_close(answer[1], expected @ fill(torch.empty(space.size), 5, "gaussian"))
    gradient = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    torch.testing.assert_close(gradient[3:], expected.mean(0))
    model.only_backward = True
    before = state(model)
    with pytest.raises(SpaceError, match=r"Small has no forward-mode derivative.*choose another estimator"):
        evaluator.answer(DerivativeRequest(theta, batch, (5,), Gaussian()))
    assert same(state(model), before)
    again = evaluator.answer(GradientRequest(theta, batch, ((0, space.size),)))
    torch.testing.assert_close(again, gradient)


def test_an_operation_without_forward_mode_ends_a_run_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: Doubled.apply(whole(self, x)))
    data = make_data(tmp_path / "data")
    chosen = options(data, method__estimator="forward-gradient", data__test="", evaluation__limit=4)
    answer = fedzo("run", "--out", tmp_path / "run", "--quiet", *chosen)
    assert answer.code == 1 and len(answer.err.strip().splitlines()) == 1
    assert "LlamaForCausalLM has no forward-mode derivative, which the estimator forward-gradient needs" in answer.err
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.rounds == 0


def test_the_forward_gradient_is_the_derivative_of_each_example() -> None:
    model, space = with_scheme(build("roberta"), "lora")
    theta, batch = near(space, model), batch_of("roberta")
    _, expected = gradients(model, space, theta, batch)
    estimator = ESTIMATORS["forward-gradient"]({})
    steps = estimator.estimate(Query(theta, batch, (5, 6), 1e-3, 0, Gaussian()))
    evaluator = Evaluator(model, space)
    try:
        request = next(steps)
        while True:
            request = steps.send(evaluator.answer(request))
    except StopIteration as stop:
        estimate = stop.value
    z = torch.stack([fill(torch.empty(space.size), seed, "gaussian") for seed in (5, 6)])
    torch.testing.assert_close(torch.from_numpy(estimate.projected).float(), z @ expected.T, rtol=1e-4, atol=1e-6)
    losses = evaluator.losses(LossRequest(theta, batch, (0.0,)))
    assert estimate.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert estimator.forwards(2) == 4 and estimator.examples(3, 8, 100) == 8
