"""MeZO-SVRG against a transcription of its algorithm, as a control variate on a finite sum, and as federated runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replays import check_late_client, check_replay, same
from tiny import Rows, answer, losses, make_spec, start, theta0
from torch import Tensor

from fedzo import directions
from fedzo.config import Config, from_flat
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError
from fedzo.estimators import ControlVariate, Estimate, Query, TwoPoint
from fedzo.evaluation import Batch, LossRequest
from fedzo.federation.messages import Contribution, decode
from fedzo.limits import CLIENT_MODES
from fedzo.optimizers import OPTIMIZERS, SVRG, Records, Schedule, Setup
from fedzo.structures import Frame, IsotropicStructure, Layout

SIZE, QUERIES, EVERY = 40, 3, 3


def values_of(**settings: Any) -> dict[str, Any]:
    method = Config().method
    return {key: getattr(method, key) for key in SVRG.settings} | {"anchor_every": EVERY} | settings


def rule_of(size: int = SIZE, queries: int = QUERIES, schedule: Schedule | None = None, **settings: Any) -> SVRG:
    values = values_of(**settings)
    structure = IsotropicStructure(Frame("gaussian", Layout.flat(size), values=values))
    return SVRG(Setup(schedule or Schedule("cosine", 0.05, 24, 3), queries, structure, values=values))


def given(widths: list[int], seed: int = 5) -> list[Records]:
    """A step of each width, after one another."""
    rng = np.random.default_rng(seed)

    def one(step: int, width: int) -> Records:
        seeds = rng.integers(0, 2**64, (1, width), dtype=np.uint64)
        return Records(step, seeds, rng.normal(size=(1, width)).astype(np.float32))

    return [one(step, width) for step, width in enumerate(widths)]


def first_theta() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=SIZE).astype(np.float32))


def along(records: Records, queries: int, size: int = SIZE) -> Tensor:
    """1/P sum_r g_r z_r of a step, float64 [size]."""
    total = torch.zeros(size, dtype=torch.float64)
    for seed, g in zip(records.seeds[0].tolist(), records.scalars[0].tolist(), strict=True):
        total += g / queries * directions.fill(torch.empty(size), seed, "gaussian").double()
    return total


def estimated(query: Query, every: int = EVERY) -> tuple[Estimate, list[LossRequest]]:
    """The estimate on least squares, and what was asked."""
    steps, asked = ControlVariate({"anchor_every": every}).estimate(query), []
    try:
        request = next(steps)
        while True:
            assert isinstance(request, LossRequest)
            asked.append(request)
            request = steps.send(losses(request))
    except StopIteration as stop:
        return stop.value, asked


def query_of(theta: Tensor, batch: Batch, anchor: Tensor | None, seeds: tuple[int, ...] = (4, 9)) -> Query:
    return Query(theta, batch, seeds, 0.1, 1, Isotropic("gaussian"), anchor)


def slopes(theta: Tensor, batch: Batch, seeds: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Exact directional derivatives of each example's loss, [P, B]."""
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    z = torch.stack([directions.fill(torch.empty(len(theta)), seed, "gaussian") for seed in seeds]).double()
    found: np.ndarray[Any, np.dtype[np.float64]] = (z @ x.T * (x @ theta.double() - y)).numpy()
    return found


def union(clients: int = 4) -> Batch:
    """All examples of the first clients."""
    sets = [Rows(client) for client in range(clients)]
    x, y = torch.cat([s.x for s in sets]), torch.cat([s.y for s in sets])
    return Batch({"x": x, "y": y}, torch.zeros(len(y), dtype=torch.int64))


# -- the estimator


def test_the_scalars_are_differences_along_the_same_directions() -> None:
    theta, anchor, batch = theta0(), theta0() + 0.3, Rows(1).batch(np.arange(7))
    estimate, asked = estimated(query_of(theta, batch, anchor))
    wanted = slopes(theta, batch, (4, 9)) - slopes(anchor, batch, (4, 9))
    np.testing.assert_allclose(estimate.projected, wanted, atol=2e-3)
    assert [torch.equal(request.theta, at) for request, at in zip(asked, (theta, anchor), strict=True)] == [True, True]
    assert asked[0].seeds == asked[1].seeds == (4, 9) and asked[0].offsets == asked[1].offsets == (0.1, -0.1)
    plain, asked = estimated(query_of(theta, batch, None))
    np.testing.assert_allclose(plain.projected, slopes(theta, batch, (4, 9)), atol=2e-3)
    assert len(asked) == 1 and plain.loss == estimate.loss


def test_on_a_finite_sum_it_is_unbiased_and_of_small_variance_near_the_anchor() -> None:
    """Over batches of one: the mean is the full derivative, the variance falls with the squared distance."""
    everything, away = union(), torch.from_numpy(np.random.default_rng(2).normal(size=12).astype(np.float32))
    anchor, variances = theta0(), {}
    for distance in (1.0, 0.1, 0.01):
        theta = anchor + distance * away
        estimate, _ = estimated(query_of(theta, everything, anchor))
        full = slopes(anchor, everything, (4, 9)).mean(1)
        wanted = slopes(theta, everything, (4, 9)).mean(1)
        np.testing.assert_allclose(estimate.projected.mean(1) + full, wanted, rtol=1e-3, atol=1e-3)
        variances[distance] = estimate.projected.var(1)
    np.testing.assert_allclose(variances[0.1] / variances[1.0], 0.01, rtol=0.05)
    np.testing.assert_allclose(variances[0.01] / variances[0.1], 0.01, rtol=0.5)
    assert (variances[0.1] < 0.02 * slopes(anchor, everything, (4, 9)).var(1)).all()


def test_estimate_and_rule_together_are_the_gradient() -> None:
    """Over directions as well: 1/P sum g_p z_p + full has the mean grad f(theta), here with 20,000 directions each."""
    everything, queries, rate = union(), 20_000, 1.0
    rule = rule_of(12, queries, Schedule("constant", rate, 100), anchor_rate=0.001)
    rng, theta = np.random.default_rng(8), theta0()
    state = rule.init(theta)
    for step in range(2):
        seeds = rng.integers(0, 2**64, (1, queries), dtype=np.uint64)
        before, old = theta.clone(), rule.anchor(step, state)
        every = tuple(seeds[0].tolist())
        g = slopes(theta, everything, every) - (slopes(old, everything, every) if old is not None else 0.0)
        state = rule.apply(theta, state, [Records(step, seeds, g.mean(1).astype(np.float32)[None])])
    x, y = everything.inputs["x"].double(), everything.inputs["y"].double()
    gradient = ((x @ before.double() - y)[:, None] * x).mean(0)
    spread = float(gradient.norm()) * (2 / queries) ** 0.5  # of an entry of 1/P sum z z^T gradient, at most
    assert float(((before - theta).double() - rate * gradient).abs().max()) < 5 * spread < 0.2 * float(gradient.norm())


# -- the rule


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [1.0, 7.0])
def test_it_is_the_papers_algorithm(ratio: float, decay: float) -> None:
    rule, steps, theta = rule_of(anchor_rate=ratio, weight_decay=decay), given([QUERIES] * 11), first_theta()
    state = rule.apply(theta, rule.init(theta), steps)
    wanted = first_theta().double()
    for r in steps:
        eta2, estimate = rule.setup.schedule(r.step), along(r, QUERIES)
        decayed = wanted * (1 - eta2 * decay)
        if r.step % EVERY == 0:
            anchor, full = wanted, estimate
            wanted = decayed - ratio * eta2 * full
        else:
            wanted = decayed - eta2 * estimate - eta2 * full
    torch.testing.assert_close(theta.double(), wanted, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(state["anchor"].double(), anchor, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(state["full"].double(), full, rtol=2e-5, atol=2e-6)
    assert float((wanted - first_theta()).abs().max()) > 0.1


def test_step_by_step_and_restored_are_the_same_bits() -> None:
    rule, steps = rule_of(anchor_rate=3.0, weight_decay=0.1), given([3, 6, 0, 3, 9, 3, 0, 3, 3])
    fused, walking, late = first_theta(), first_theta(), first_theta()
    state, walked = rule.apply(fused, rule.init(fused), steps), rule.init(walking)
    assert [value.shape for value in state.values()] == [(SIZE,)] * SVRG.state_vectors
    for r in steps[:5]:  # stops between two anchors
        walked = rule.apply(walking, walked, [r])
    data = rule.snapshot(walking, walked)
    assert len(data) == rule.snapshot_bytes(walking, walked) == 3 * 4 * SIZE
    restored = rule.restore(late, rule.init(late), data)
    for theta, reached in ((walking, walked), (late, restored)):
        assert same(rule.apply(theta, reached, steps[5:]), state) and torch.equal(theta, fused)


def test_an_anchor_without_records_leaves_the_old_one() -> None:
    rule, theta = rule_of(), first_theta()
    state = rule.apply(theta, rule.init(theta), given([3, 3, 3]))
    kept = {name: value.clone() for name, value in state.items()}
    state = rule.apply(theta, state, given([3, 3, 3, 0, 3])[3:])
    assert same(state, kept) and not torch.equal(state["anchor"], theta)
    waiting = first_theta()
    state = rule.apply(waiting, rule.init(waiting), given([0]))
    assert torch.equal(waiting, first_theta()) and rule.anchor(1, state) is state["anchor"]
    assert torch.equal(state["anchor"], waiting) and not state["full"].any()


# -- federated

METHOD: dict[str, Any] = {
    "estimator": "svrg", "optimizer": "svrg", "learning_rate": 0.02, "schedule": "constant", "warmup_steps": 0,
    "rounds": 8, "settings": values_of(anchor_rate=2.0),
}  # fmt: skip


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("seeds", ["shared", "independent"])
def test_it_runs_and_replays(tmp_path: Path, seeds: str, family: str) -> None:
    check_replay(tmp_path, make_spec(**METHOD, seeds=seeds, family=family))


@pytest.mark.parametrize(("size", "kind"), [(2000, "records"), (5, "snapshot")])
def test_a_late_client_has_the_anchor(tmp_path: Path, size: int, kind: str) -> None:
    spec = make_spec(**METHOD | {"size": size, "learning_rate": 0.24 / size, "queries": 8})
    check_late_client(tmp_path, spec, kind)


@pytest.mark.parametrize("batch_size", [3, 5, 50])
def test_an_anchor_is_made_on_all_examples_a_batch_at_a_time(tmp_path: Path, batch_size: int) -> None:
    """What is evaluated is what the estimator says; the ledger's anchor scalars are those of all data."""
    spec = make_spec(**METHOD | {"rounds": 2 * EVERY, "batch_size": batch_size})
    run, seen = start(tmp_path, spec), dict.fromkeys(range(4), 0)
    for round_ in range(spec.rounds):
        theta = run.coordinator.replica.theta.clone()
        for plan in run.coordinator.open_round():
            asked: list[LossRequest] = []

            def watched(request: LossRequest, asked: list[LossRequest] = asked) -> Tensor:
                asked.append(request)
                return losses(request)

            run.coordinator.receive(plan.client, answer(run.workers[plan.client], plan.to_bytes(), watched))
            total = len(Rows(plan.client))
            sizes = [len(request.batch) for request in asked]
            if round_ % EVERY == 0:
                assert sum(sizes) == total and max(sizes) <= batch_size
                assert all(torch.equal(request.theta, theta) for request in asked)
            else:
                assert sizes == 2 * [min(batch_size, total)]
            seen[plan.client] += sum(2 * len(request.seeds) * len(request.batch) for request in asked)
        run.coordinator.close_round()
        if round_ % EVERY == 0:
            entry = list(run.ledger.read())[-1]
            z = Isotropic(spec.family)
            x, y = union().inputs["x"].double(), union().inputs["y"].double()
            for seed, found in zip(entry.seeds[0].tolist(), entry.scalars[0].tolist(), strict=True):
                wanted = ((x @ theta.double() - y) * (x @ z.fill(torch.empty(12), seed).double())).mean()
                assert found == pytest.approx(float(wanted), rel=1e-3, abs=1e-3)
    estimator = spec.build_estimator()
    for client, count in seen.items():
        assert count == spec.rounds * estimator.evaluated(spec.queries, batch_size, len(Rows(client)))
    assert estimator.forwards(3) == pytest.approx((2 * 3 + 2 * 4 * 3) / 3)


def test_an_estimate_of_several_batches_weighs_examples_alike() -> None:
    parts = [Estimate(np.full((2, n), float(n)), float(n), np.full((2, n), -float(n))) for n in (1, 3)]
    joined = Estimate.joined(parts)
    assert joined.projected.tolist() == [[1.0, 3.0, 3.0, 3.0]] * 2 and joined.loss == 2.5
    assert joined.second is not None and np.array_equal(joined.second, -joined.projected)
    assert Estimate.joined(parts[:1]) is parts[0]


def test_a_contribution_is_as_small_as_any(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(**METHOD))
    for plan in run.coordinator.open_round():
        data = answer(run.workers[plan.client], plan.to_bytes())
        message = decode(data)
        assert isinstance(message, Contribution) and message.scalars.shape == (1, 3) and len(data) == 32 + 12 * 3


# -- limits


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"method.optimizer": "svrg"},
            '"svrg" needs method.estimator = "svrg", found "two-point": it needs diff',
        ),
        ({"method.estimator": "svrg"}, 'method.estimator = "svrg" needs method.optimizer = "svrg", found "sgd"'),
        (
            {"method.name": "mezo-svrg", "federation.local_steps": 2},
            "needs federation.local_steps = 1, found 2: what it",
        ),
        (
            {"method.name": "mezo-svrg", "federation.seeds": "pool"},
            'needs federation.seeds = .* found "pool": a pool\'s',
        ),
        ({"method.name": "mezo-svrg", "method.anchor_every": 0}, "method.anchor_every: .*greater than or equal to 1"),
        ({"method.name": "mezo-svrg", "method.anchor_rate": 0.0}, "method.anchor_rate: .*greater than 0"),
    ],
)
def test_what_is_not_valid_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_all_examples_take_part_in_an_anchor_so_only_clients_are_protected() -> None:
    assert ControlVariate.private == CLIENT_MODES and "example-local" not in CLIENT_MODES
    config = from_flat({"method.name": "mezo-svrg"})
    assert OPTIMIZERS[config.method.optimizer] is SVRG and set(config.settings()) == {*SVRG.settings, "anchor_every"}


def test_the_anchor_steps_are_the_same_for_both() -> None:
    rule, estimator = rule_of(), ControlVariate({"anchor_every": EVERY})
    state = rule.init(first_theta())
    for step in range(10):
        on_all = estimator.examples(step, 5, 100) == 100
        assert on_all == (rule.anchor(step, state) is None) == (step % EVERY == 0)
    assert TwoPoint().evaluated(3, 8, 5) == 30
