"""Estimators against their formulas in plain torch, on least squares and on tiny models."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from architectures import batch_of, build, plain_losses, with_scheme
from test_evaluation import MixesRows
from tiny import Rows, losses, theta0
from torch import Tensor, nn

from fedzo import directions, spaces
from fedzo.config import from_flat
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError, SpaceError
from fedzo.estimators import ESTIMATORS, FZOO, PRGE, Estimate, Estimator, OnePoint, Query, TwoPoint
from fedzo.evaluation import Batch, Evaluator, LossRequest, Request
from fedzo.limits import CLIENT_MODES
from fedzo.registry import lookup

SEEDS = [11, 2**64 - 1, 0]
FORWARDS = {"two-point": 6, "p-rge": 6, "one-point": 4, "fzoo": 4, "forward-gradient": 6}


def run(
    estimator: Estimator,
    theta: Tensor,
    batch: Batch,
    eps: float,
    family: str,
    evaluate: Callable[[Request], Tensor],
) -> Estimate:
    steps = estimator.estimate(Query(theta, batch, tuple(SEEDS), eps, 0, Isotropic(family)))
    try:
        request = next(steps)
        while True:
            request = steps.send(evaluate(request))
    except StopIteration as stop:
        assert isinstance(stop.value, Estimate)
        return stop.value


def rounding(theta: Tensor, batch: Batch, eps: float, family: str) -> float:
    """What a few ulps of the largest float32 loss make of a difference quotient."""
    request = LossRequest(theta, batch, (eps, -eps, 0.0), tuple(SEEDS), Isotropic(family))
    return 8 * 2.0**-23 * float(losses(request).max()) / eps + 1e-5


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_on_a_quadratic_it_is_the_directional_derivative(eps: float, family: str) -> None:
    """The central difference of a quadratic has no error of its own, for each example and direction."""
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    estimate = run(TwoPoint(), theta, batch, eps, family, losses)
    gradients = (x @ theta.double() - y)[:, None] * x  # [B, size]
    for p, seed in enumerate(SEEDS):
        z = directions.fill(torch.empty_like(theta), seed, family)
        exact = gradients @ z.double()
        np.testing.assert_allclose(estimate.projected[p], exact.numpy(), atol=rounding(theta, batch, eps, family))
    assert estimate.projected.shape == (3, 9) and estimate.projected.dtype == np.float64


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_one_point_on_a_quadratic_is_off_by_half_eps_its_curvature(eps: float, family: str) -> None:
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    estimate = run(OnePoint(), theta, batch, eps, family, losses)
    residual = x @ theta.double() - y
    for p, seed in enumerate(SEEDS):
        along = x @ directions.fill(torch.empty_like(theta), seed, family).double()
        exact = residual * along + eps / 2 * along**2
        np.testing.assert_allclose(estimate.projected[p], exact.numpy(), atol=rounding(theta, batch, eps, family))


def points(theta: Tensor, eps: float, family: str) -> list[Tensor]:
    """theta, and theta + eps z for each of the seeds."""
    return [theta, *(theta + eps * directions.fill(torch.empty_like(theta), seed, family) for seed in SEEDS)]


@pytest.mark.parametrize("eps", [0.01, 1.0])
def test_fzoo_divides_by_the_spread_of_the_losses(eps: float) -> None:
    """Against the paper's formulas in float64; eps and a factor on the loss leave the scalars' size as it is."""
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    found = run(FZOO(), theta, batch, eps, "rademacher", losses)
    table = torch.stack([0.5 * (x @ point.double() - y) ** 2 for point in points(theta, eps, "rademacher")])
    means = table.mean(1)
    sigma = torch.sqrt(((means[1:] - means[1:].mean()) ** 2).sum() / (len(SEEDS) - 1))
    np.testing.assert_allclose(found.projected, ((table[1:] - table[0]) / sigma).numpy(), rtol=1e-3, atol=1e-3)
    assert found.projected.mean(1).std(ddof=1) == pytest.approx(1.0)
    assert found.loss == pytest.approx(float(table.mean()), rel=1e-6)
    scaled = run(FZOO(), theta, batch, eps, "rademacher", lambda request: 4.0 * losses(request))
    np.testing.assert_allclose(scaled.projected, found.projected, rtol=1e-12)


def test_fzoo_without_a_spread_stands_still_and_without_numbers_gives_none() -> None:
    theta, batch = theta0(), Rows(0).batch(np.arange(4))

    def flat(request: Request) -> Tensor:
        return torch.tensor([[1.0], [3.0], [3.0], [3.0]]).expand(4, 4)  # a spread of 0 beside a difference of 2

    assert (run(FZOO(), theta, batch, 0.1, "rademacher", flat).projected == 0.0).all()
    for value in (torch.inf, torch.nan):
        broken = torch.ones(4, 4)
        broken[2, 1] = value
        projected = run(FZOO(), theta, batch, 0.1, "rademacher", lambda request, losses=broken: losses).projected
        assert np.isnan(projected).any()  # the worker refuses it


def test_requests_and_loss() -> None:
    theta, batch = theta0(), Rows(0).batch(np.arange(4))
    seen: list[LossRequest] = []

    def evaluate(request: Request) -> Tensor:
        assert isinstance(request, LossRequest)
        seen.append(request)
        if request.origin:
            return torch.tensor([[2.0], [1.0], [4.0], [1.0]]).expand(4, 4)
        return torch.tensor([[3.0] * 4, [1.0] * 4]).expand(len(request.seeds), 2, 4)

    for estimator, offsets, together in ((TwoPoint(), (0.5, -0.5), False), (PRGE(), (0.5, -0.5), True)):
        seen.clear()
        estimate = run(estimator, theta, batch, 0.5, "rademacher", evaluate)
        assert [request.seeds for request in seen] == [tuple(SEEDS)]
        assert seen[0].offsets == offsets and seen[0].theta is theta and seen[0].batch is batch
        assert seen[0].together is together and not seen[0].origin
        assert (estimate.projected == 2.0).all() and estimate.loss == 2.0
    seen.clear()
    estimate = run(OnePoint(), theta, batch, 0.5, "rademacher", evaluate)
    assert [(r.seeds, r.offsets, r.origin, r.together) for r in seen] == [(tuple(SEEDS), (0.5,), True, False)]
    assert (estimate.projected == np.array([[-2.0], [4.0], [-2.0]])).all() and estimate.loss == 2.0


# -- real models


@contextmanager
def passes(model: nn.Module) -> Iterator[list[int]]:
    """Rows of each call of the model."""
    seen: list[int] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        seen.append(len(keywords["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("evaluation", ["paired", "sequential"])
@pytest.mark.parametrize("name", list(FORWARDS))
def test_a_step_makes_the_forwards_that_it_states(name: str, evaluation: str) -> None:
    """Rows that go through the model, in batches. A pass with dual numbers counts as two."""
    model, space = with_scheme(build("llama"), "lora")
    theta, batch, estimator = space.theta0(model), batch_of("llama"), ESTIMATORS[name]({})
    evaluator = Evaluator(model, space, evaluation)
    run(estimator, theta, batch, 1e-2, "rademacher", evaluator.answer)  # the self-check of the first batch
    with passes(model) as seen:
        run(estimator, theta, batch, 1e-2, "rademacher", evaluator.answer)
    each = 2 if name == "forward-gradient" else 1
    assert each * sum(seen) / len(batch) == estimator.forwards(len(SEEDS)) == FORWARDS[name]
    if name == "p-rge" and evaluation == "paired":
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("name", "scheme"), [("opt", "full"), ("roberta", "lora"), ("gpt2", "sparse"), ("qwen3", "prefix")]
)
def test_on_models_the_estimates_are_those_of_copies_with_the_values_written_into_them(name: str, scheme: str) -> None:
    model, space = with_scheme(build(name), scheme)
    theta, batch, eps = space.theta0(model), batch_of(name), 0.05
    by_hand, table = copy.deepcopy(model), []
    for point in points(theta, eps, "rademacher"):
        space.write(by_hand, point)
        with torch.no_grad():
            table.append(plain_losses(by_hand, batch).double())
    differences = torch.stack(table[1:]) - table[0]
    sigma = torch.stack(table[1:]).mean(1).std(correction=1)
    for estimator, expected in ((OnePoint(), differences / eps), (FZOO(), differences / sigma)):
        found = [
            run(estimator, theta, batch, eps, "rademacher", Evaluator(model, space, evaluation).answer)
            for evaluation in ("paired", "sequential")
        ]
        assert np.array_equal(found[0].projected, found[1].projected)
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found[0].projected, expected.numpy(), rtol=1e-3, atol=1e-3 * scale)
        assert found[0].loss == pytest.approx(float(torch.stack(table).mean()), rel=1e-5)


@pytest.mark.parametrize("scheme", ["full", "lora"])
def test_p_rge_is_the_two_point_estimator_bit_for_bit(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a forward may hold otherwise, and without asking the clock whether it pays."""
    model, space = with_scheme(build("llama"), scheme)
    theta, batch = space.theta0(model), batch_of("llama")
    monkeypatch.setattr("fedzo.evaluation.evaluator.TOGETHER", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr("fedzo.evaluation.evaluator._seconds", lambda function, device: 1.0)
    expected = run(TwoPoint(), theta, batch, 1e-2, "gaussian", Evaluator(model, space, "sequential").answer)
    evaluator = Evaluator(model, space)
    found = run(PRGE(), theta, batch, 1e-2, "gaussian", evaluator.answer)
    assert evaluator.evaluation == "paired"
    assert np.array_equal(found.projected, expected.projected) and found.loss == expected.loss
    with passes(model) as seen:
        run(PRGE(), theta, batch, 1e-2, "gaussian", evaluator.answer)
    assert seen == [6 * len(batch)]


@pytest.mark.parametrize("regroups", [True, False])
def test_p_rge_on_a_model_that_mixes_rows(regroups: bool) -> None:
    torch.manual_seed(0)
    model = MixesRows(regroups)
    space = spaces.full(model)
    theta, batch = space.theta0(model), Batch(batch_of("bert encoder").inputs, torch.tensor([0, 1, 2]))
    expected = run(TwoPoint(), theta, batch, 0.1, "rademacher", Evaluator(model, space, "sequential").answer)
    found = run(PRGE(), theta, batch, 0.1, "rademacher", Evaluator(model, space).answer)
    assert np.array_equal(found.projected, expected.projected)
    with pytest.raises(SpaceError, match="this model cannot be paired"):
        run(PRGE(), theta, batch, 0.1, "rademacher", Evaluator(model, space, "paired").answer)


@pytest.mark.parametrize("offsets", [(1e-2,), (1e-2, -1e-2)])
@pytest.mark.parametrize("limit", [0, 10**9])
def test_theta_itself_shares_the_forwards_of_the_points(
    offsets: tuple[float, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedzo.evaluation.evaluator.TOGETHER", {"cpu": limit, "cuda": limit})
    model, space = with_scheme(build("opt"), "full")
    theta, batch = space.theta0(model), batch_of("opt")
    request = LossRequest(theta, batch, offsets, (5, 6, 7), origin=True)
    paired, single = Evaluator(model, space, "paired"), Evaluator(model, space, "sequential")
    found = paired.losses(request)
    assert found.shape == (1 + 3 * len(offsets), 3) and torch.equal(found, single.losses(request))
    assert torch.equal(found[0], single.losses(LossRequest(theta, batch, (0.0,)))[0, 0])
    rest = single.losses(LossRequest(theta, batch, offsets, (5, 6, 7)))
    assert torch.equal(found[1:], rest.view(-1, 3))
    with passes(model) as seen:
        paired.losses(request)
    assert seen == ([len(batch) * len(found)] if limit else [6] * (len(found) // 2) + [3] * (len(found) % 2))


# -- what they are valid under


def test_an_unknown_estimator_is_named() -> None:
    assert lookup(ESTIMATORS, "two-point", "estimator") is TwoPoint
    with pytest.raises(ConfigError, match=r"unknown estimator 'two_point'. Did you mean 'two-point'"):
        lookup(ESTIMATORS, "two_point", "estimator")


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"method.estimator": "p-rge", "runtime.evaluation": "sequential"},
            'method.estimator = "p-rge" needs runtime.evaluation = "auto" or "paired", found "sequential": all points',
        ),
        (
            {"method.name": "fzoo", "method.queries": 1},
            'method.estimator = "fzoo" needs method.queries of at least 2, found 1: it divides by',
        ),
        (
            {"method.estimator": "fzoo", "method.directions": "gaussian"},
            'method.estimator = "fzoo" needs method.directions = "rademacher", found "gaussian"',
        ),
        (
            {"method.estimator": "forward-gradient", "space.kind": "codes", "model.quantisation": "int8"},
            'method.estimator = "forward-gradient" needs space.kind = .* found "codes": .* have no derivative',
        ),
        (
            {"method.name": "fedkseed-pro", "method.queries": 9, "federation.pool_size": 8},
            "method.queries is 9, more than federation.pool_size 8",
        ),
        (
            {"method.name": "fedkseed-pro", "federation.seeds": "pool"},
            'method.name = "fedkseed-pro" is federation.seeds = "weighted-pool", found "pool"',
        ),
        (
            {"method.name": "fedkseed-pro", "method.weight_decay": 0.1},
            'weight_decay = 0.1 shrinks theta at every step, but federation.seeds = "weighted-pool"',
        ),
        (
            {"federation.seeds": "weighted-pool", "space.theta_dtype": "bfloat16"},
            'space.theta_dtype = "bfloat16" rounds theta at every step, but federation.seeds = "weighted-pool"',
        ),
        (
            {"federation.seeds": "weighted-pool", "federation.aggregation": "median"},
            'needs federation.seeds = "shared", found "weighted-pool"',
        ),
    ],
)
def test_what_a_method_is_not_valid_under_is_refused_with_the_reason(flat: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_what_a_method_is_valid_under_passes() -> None:
    for name in ("one-point", "p-rge", "fzoo", "fedkseed-pro", "forward-gradient"):
        from_flat({"method.name": name})
        from_flat({"method.name": name, "federation.local_steps": 4, "space.kind": "adapter"})


def test_only_the_spread_of_the_losses_couples_the_examples_of_a_batch() -> None:
    """Another example in the batch changes the scalars of the first ones, which clipping by example presumes not."""
    theta, rows = theta0(), Rows(2)
    for estimator in (TwoPoint, PRGE, OnePoint, FZOO):
        three, four = (
            run(estimator(), theta, rows.batch(np.arange(n)), 0.1, "rademacher", losses).projected for n in (3, 4)
        )
        coupled = not np.array_equal(three, four[:, :3])
        assert coupled == (estimator is FZOO) == (estimator.private == CLIENT_MODES)
