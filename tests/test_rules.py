"""The update rules against plain transcriptions of their papers' equations, torch.optim, and as federated runs."""

import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Rows, losses, make_replica, make_spec, make_worker, mean_loss, start, theta0
from torch import Tensor

from fedzo import directions
from fedzo.config import Config, from_flat
from fedzo.errors import ConfigError, ProtocolError
from fedzo.evaluation import Batch, LossRequest, Request
from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import CatchUp, RoundRecords
from fedzo.federation.replica import theta_digest
from fedzo.limits import CLIENT_MODES
from fedzo.optimizers import OPTIMIZERS, PoolSGD, Records, Rule, Schedule, Setup, State
from fedzo.optimizers.base import rounded, square_root
from fedzo.optimizers.conservative import Conservative
from fedzo.optimizers.dizo import DiZO
from fedzo.spaces import Segment
from fedzo.structures import Frame, IsotropicStructure, Layout

LAYOUT = Layout((Segment("a", (20, 10), 0, 200), Segment("b", (100,), 200, 100), Segment("c", (33,), 300, 33)))
SIZE, QUERIES, EPS = LAYOUT.size, 4, 1e-2
NAMES = ("sign", "momentum", "adam", "adamw", "conservative", "dizo")
# Several projections of several steps in a few steps, none of which reaches its bounds at once.
SHORT = {"project_every": 2, "project_steps": 3, "projection_rate": 0.3, "eps": EPS}


def values_of(name: str, **settings: Any) -> dict[str, Any]:
    """The settings that a rule reads: given ones, else the defaults."""
    method = Config().method
    short = SHORT if name == "dizo" else {}
    return {key: getattr(method, key) for key in OPTIMIZERS[name].settings} | short | settings


def rule_of(name: str, queries: int = QUERIES, schedule: Schedule | None = None, **settings: Any) -> Rule:
    values = values_of(name, **settings)
    structure = IsotropicStructure(Frame("gaussian", LAYOUT, values=values))
    return OPTIMIZERS[name](Setup(schedule or Schedule("cosine", 0.05, 24, 3), queries, structure, values=values))


def first_theta() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=SIZE).astype(np.float32))


def given(widths: list[int], step: int = 0, seed: int = 5) -> list[Records]:
    """A step of each width, after one another."""
    rng = np.random.default_rng(seed)

    def one(at: int, width: int) -> Records:
        seeds = rng.integers(0, 2**64, (1, width), dtype=np.uint64)
        return Records(at, seeds, rng.normal(size=(1, width)).astype(np.float32))

    return [one(step + i, width) for i, width in enumerate(widths)]


def estimate(records: Records, queries: int = QUERIES) -> Tensor:
    """1/P sum_r g_r z_r of a step, float64 [SIZE]."""
    total = torch.zeros(SIZE, dtype=torch.float64)
    for seed, g in zip(records.seeds[0].tolist(), records.scalars[0].tolist(), strict=True):
        total += g / queries * directions.fill(torch.empty(SIZE), seed, "gaussian").double()
    return total


# -- the equations of the papers, in float64


def sign_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any]) -> Tensor:
    for r in steps:
        theta = theta - lr(r.step) * (torch.sign(estimate(r)) + v["weight_decay"] * theta)
    return theta


def momentum_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any]) -> Tensor:
    m = None
    for r in steps:
        g = estimate(r) + v["weight_decay"] * theta
        m = g if m is None else v["momentum"] * m + g
        theta = theta - lr(r.step) * (g + v["momentum"] * m if v["nesterov"] else m)
    return theta


def adam_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any], apart: bool = False) -> Tensor:
    m = second = torch.zeros_like(theta)
    b1, b2, decay = v["beta1"], v["beta2"], v["weight_decay"]
    for t, r in enumerate(steps, 1):
        g = estimate(r) + (0.0 if apart else decay) * theta
        m, second = b1 * m + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / (torch.sqrt(second / (1 - b2**t)) + v["adam_eps"])
        theta = theta - lr(r.step) * (step + (decay if apart else 0.0) * theta)
    return theta


def adamw_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any]) -> Tensor:
    return adam_of_paper(theta, steps, lr, v, apart=True)


def sgd_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any]) -> Tensor:
    for r in steps:
        theta = theta - lr(r.step) * (estimate(r) + v["weight_decay"] * theta)
    return theta


def dizo_of_paper(theta: Tensor, steps: list[Records], lr: Schedule, v: dict[str, Any]) -> Tensor:
    """With norms: gamma_l is the length of the drift, kept within (1 +- tau) of its length before the projection."""
    anchor, tau = theta.clone(), v["projection_clip"]
    gammas: list[float] | None = None
    for r in steps:
        if r.step % (v["project_every"] + v["project_steps"]) < v["project_every"]:
            theta, gammas = sgd_of_paper(theta, [r], lr, v), None
            continue
        drift = [(theta - anchor)[s.offset : s.offset + s.size] for s in LAYOUT.segments]
        if gammas is None:
            lengths = [float(d.norm()) for d in drift]
            gammas = list(lengths)
        u = [directions.fill(torch.empty(3), seed, "rademacher").tolist() for seed in r.seeds[0].tolist()]
        rate = v["projection_rate"] * lr(r.step) / lr.learning_rate
        for i, segment in enumerate(LAYOUT.segments):
            slope = sum(g * EPS / tau * signs[i] for g, signs in zip(r.scalars[0].tolist(), u, strict=True)) / QUERIES
            low, high = (1 - tau) * lengths[i], (1 + tau) * lengths[i]
            gammas[i] = min(max(gammas[i] - rate * lengths[i] * slope, low), high)
            here = slice(segment.offset, segment.offset + segment.size)
            theta[here] = anchor[here] + gammas[i] * drift[i] / drift[i].norm()
    return theta


PAPERS: dict[str, Callable[[Tensor, list[Records], Schedule, dict[str, Any]], Tensor]] = {
    "sign": sign_of_paper, "momentum": momentum_of_paper, "adam": adam_of_paper, "adamw": adamw_of_paper,
    "conservative": sgd_of_paper, "dizo": dizo_of_paper,
}  # fmt: skip


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("schedule", [Schedule("constant", 0.05, 24), Schedule("cosine", 0.05, 24, 3)])
@pytest.mark.parametrize("name", [*NAMES, "nesterov"])
def test_a_rule_is_its_papers_equation(name: str, schedule: Schedule, decay: float) -> None:
    look_ahead = {"nesterov": True} if name == "nesterov" else {}
    name = "momentum" if look_ahead else name
    rule, steps, theta = (
        rule_of(name, schedule=schedule, weight_decay=decay, **look_ahead),
        given([4] * 12),
        first_theta(),
    )
    if name == "dizo":  # scalars of the size that projections bring, so that some are cut and others not
        steps = [Records(r.step, r.seeds, r.scalars * (10 if r.step % 5 > 1 else 1)) for r in steps]
    rule.apply(theta, rule.init(theta), steps)
    wanted = PAPERS[name](first_theta().double(), steps, schedule, dict(rule.setup.values))
    torch.testing.assert_close(theta.double(), wanted, rtol=2e-5, atol=2e-6)
    assert float((wanted - first_theta()).abs().max()) > 0.01


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("momentum", lambda p, wd: torch.optim.SGD(p, 0.0, momentum=0.9, weight_decay=wd)),
        ("nesterov", lambda p, wd: torch.optim.SGD(p, 0.0, momentum=0.9, weight_decay=wd, nesterov=True)),
        ("adam", lambda p, wd: torch.optim.Adam(p, 0.0, weight_decay=wd)),
        ("adamw", lambda p, wd: torch.optim.AdamW(p, 0.0, weight_decay=wd)),
    ],
)
def test_torch_makes_the_same_steps(name: str, make: Callable[..., torch.optim.Optimizer], decay: float) -> None:
    look_ahead = {"nesterov": True} if name == "nesterov" else {}
    rule = rule_of("momentum" if look_ahead else name, weight_decay=decay, **look_ahead)
    theta, parameter = first_theta(), first_theta().requires_grad_()
    state, optimizer = rule.init(theta), make([parameter], decay)
    for r in given([5] * 24):
        parameter.grad = rule.gradient(theta, state, r)
        optimizer.param_groups[0]["lr"] = rule.setup.schedule(r.step)
        optimizer.step()
        state = rule.apply(theta, state, [r])
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-5, atol=2e-6)


# -- the same bits


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", NAMES)
def test_step_by_step_and_restored_and_forked_are_the_same_bits(name: str, decay: float) -> None:
    rule, steps = rule_of(name, weight_decay=decay), given([4, 8, 0, 4, 12, 4, 4, 0, 4, 4, 8, 4])
    fused, walking, late = first_theta(), first_theta(), first_theta()
    state, walked, restored = rule.apply(fused, rule.init(fused), steps), rule.init(walking), rule.init(late)
    for r in steps[:4]:
        walked = rule.apply(walking, walked, [r])
    data = rule.snapshot(walking, walked)
    assert len(data) == rule.snapshot_bytes(walking, walked)
    with pytest.raises(ProtocolError, match=f"has {len(data) - 1} bytes, wanted {len(data)}"):
        rule.restore(late, restored, data[:-1])
    assert torch.equal(late, first_theta()) and same(restored, rule.init(first_theta()))
    restored = rule.restore(late, restored, data)
    assert torch.equal(late, walking) and same(restored, walked)
    other, (local, forked) = walking.clone(), rule.fork(walked)
    forked = local.apply(other, forked, steps[4:])  # must leave the rule's own state alone
    for r in steps[4:]:
        walked = rule.apply(walking, walked, [r])
    restored = rule.apply(late, restored, steps[4:])
    for theta, reached in ((walking, walked), (late, restored), (other, forked)):
        assert torch.equal(theta, fused) and same(reached, state)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_records_changes_nothing(name: str) -> None:
    rule, theta = rule_of(name, weight_decay=0.3), first_theta()
    state = rule.apply(theta, rule.init(theta), given([4, 4, 4]))
    before, remembered = theta.clone(), {key: value.clone() for key, value in state.items()}
    state = rule.apply(theta, state, given([0, 0, 0], step=3))
    assert torch.equal(theta, before) and same(state, remembered)


@pytest.mark.parametrize("name", NAMES)
def test_state_takes_as_many_vectors_as_it_says(name: str) -> None:
    state = rule_of(name).init(first_theta())
    assert sum(value.numel() == SIZE for value in state.values()) == OPTIMIZERS[name].state_vectors


def test_arithmetic_that_replays_rounds_correctly() -> None:
    """float32 roots, quotients, products and sums are the exact ones, rounded (twice does no harm from float64)."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(np.exp(rng.normal(scale=14, size=100_003)).astype(np.float32)) for _ in range(2))
    assert torch.equal(square_root(a.clone()), torch.sqrt(a.double()).float())
    assert torch.equal(a / b, (a.double() / b.double()).float())
    assert torch.equal(a * b, (a.double() * b.double()).float())
    assert torch.equal(a * rounded(0.9), (a.double() * rounded(0.9)).float())
    assert torch.equal(a.clone().add_(0.25), (a.double() + 0.25).float())


def test_adams_bias_correction_counts_the_steps_applied() -> None:
    """A skipped step moves the schedule on, not the count: the first step of Adam is lr wherever it is."""
    rule, theta = rule_of("adam", schedule=Schedule("constant", 0.05, 24)), first_theta()
    state = rule.apply(theta, rule.init(theta), given([0, 0, 0, 4]))
    torch.testing.assert_close((theta - first_theta()).abs(), torch.full((SIZE,), 0.05), rtol=1e-4, atol=1e-6)
    assert state["powers"].tolist() == [0.9, 0.999]
    for r in given([4] * 9, step=4):
        state = rule.apply(theta, state, [r])
    np.testing.assert_allclose(state["powers"].numpy(), [0.9**10, 0.999**10], rtol=1e-15)


def test_entries_that_no_direction_moves_stay_under_adam() -> None:
    """0 / (sqrt(0) + eps) is 0: directions of a subset of theta leave the rest where it was."""
    rule, theta = rule_of("adam"), first_theta()
    gradient = torch.ones(SIZE)
    gradient[:100] = 0.0
    rule.move(theta, rule.init(theta), gradient, 0.05)
    assert torch.equal(theta[:100], first_theta()[:100]) and not torch.equal(theta[100:], first_theta()[100:])


# -- conservative


def settle(
    rule: Rule, theta: Tensor, batch: Batch, records: Records, answer: Callable[[LossRequest], Tensor]
) -> tuple[np.ndarray[Any, Any], list[LossRequest]]:
    """The settled scalars, and what was asked."""
    asked: list[LossRequest] = []
    steps: Generator[Request, Tensor, Any] = rule.settle(theta, {}, batch, records)
    try:
        request = next(steps)
        while True:
            assert isinstance(request, LossRequest)
            asked.append(request)
            request = steps.send(answer(request))
    except StopIteration as stop:
        return stop.value, asked


def conservative_of(queries: int, decay: float = 0.0, learning_rate: float = 0.02) -> Rule:
    values = {"weight_decay": decay}
    structure = IsotropicStructure(Frame(layout=Layout.flat(12), values=values))
    return Conservative(Setup(Schedule("constant", learning_rate, 9), queries, structure, values=values))


def slopes(batch: Batch, seeds: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The derivatives of the mean loss of a batch along directions at theta0."""
    x, y, theta = batch.inputs["x"], batch.inputs["y"], theta0()
    gradient = ((x @ theta - y)[:, None] * x).mean(0)
    found = [float(gradient @ directions.fill(torch.empty(12), seed, "rademacher")) for seed in seeds]
    return np.array([found], dtype=np.float32)


@pytest.mark.parametrize(("factor", "choice"), [(1.0, 1), (-1.0, -1), (1e3, 0), (-1e3, 0)])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("queries", [1, 3])
def test_conservative_takes_the_best_of_three(queries: int, decay: float, factor: float, choice: int) -> None:
    rule, batch = conservative_of(queries, decay), Rows(0).batch(np.arange(8))
    seeds = list(range(queries))
    records = Records(2, np.array([seeds], dtype=np.uint64), factor * slopes(batch, seeds))
    theta = theta0()
    found, asked = settle(rule, theta, batch, records, losses)
    assert torch.equal(theta, theta0())
    assert sum(len(request.offsets) for request in asked) == Conservative.forwards
    assert len(asked) == (1 if queries == 1 and not decay else 3)
    # By hand: theta (shrunk by decay), and a step along the mean over the queries, each way.
    lr, x, y = 0.02, batch.inputs["x"].double(), batch.inputs["y"].double()
    z = torch.stack([directions.fill(torch.empty(12), seed, "rademacher") for seed in seeds]).double()
    move = lr * (torch.from_numpy(records.scalars[0]).double() @ z) / queries
    at = [0.5 * ((x @ (theta0().double() * (1 - lr * decay) - c * move) - y) ** 2).mean() for c in (1, 0, -1)]
    assert choice == (1, 0, -1)[int(np.argmin(at))]
    assert np.array_equal(found, choice * records.scalars)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("means", "choice"),
    [
        ((1.0, 1.0, 1.0), 1),
        ((2.0, 1.0, 1.0), 0),
        ((math.nan, 1.0, 2.0), 0),
        ((math.inf, math.nan, 9.0), -1),
        ((-math.inf, 1.0, 2.0), 0),
        ((math.nan, math.inf, math.nan), 0),
    ],
)
def test_conservative_ties_and_losses_that_are_not_finite(queries: int, means: tuple[float, ...], choice: int) -> None:
    rule, batch = conservative_of(queries), Rows(0).batch(np.arange(8))
    records = Records(0, np.arange(queries, dtype=np.uint64)[None], np.ones((1, queries), dtype=np.float32))
    answers = iter(means)

    def answer(request: LossRequest) -> Tensor:
        return torch.tensor([[[next(answers)] * 8 for _ in request.offsets]])

    found, _ = settle(rule, theta0(), batch, records, answer)
    assert np.array_equal(found, choice * records.scalars)


def test_conservative_on_a_rounded_theta_tries_what_it_would_do() -> None:
    """A bfloat16 theta moves by stochastic rounding, which a point theta + c z does not know of."""
    rule, batch = conservative_of(1), Rows(0).batch(np.arange(8))
    records = Records(4, np.array([[3]], dtype=np.uint64), np.ones((1, 1), dtype=np.float32))
    theta = theta0().bfloat16()
    _, asked = settle(rule, theta, batch, records, lambda request: torch.ones(1, 1, 8))
    rule.apply(theta, {}, [records])
    assert len(asked) == 3 and torch.equal(asked[0].theta, theta)
    assert torch.equal(asked[1].theta, theta0().bfloat16())


def test_a_pool_settles_as_its_sgd() -> None:
    rule = make_spec(optimizer="conservative", seeds="pool", queries=1).build_rule(Layout.flat(12))
    assert isinstance(rule, PoolSGD)
    batch, seeds = Rows(0).batch(np.arange(8)), rule.pool[:1]
    records = Records(1, seeds[None], -slopes(batch, seeds.tolist()))
    found, _ = settle(rule, theta0(), batch, records, losses)
    assert np.array_equal(found, -records.scalars)


def test_a_choice_is_covered_by_privacy_of_clients_only() -> None:
    assert Conservative.private == CLIENT_MODES and "example-local" not in CLIENT_MODES


# -- DiZO


def drifted() -> tuple[DiZO, Tensor, State]:
    """After two steps of SGD, before a projection."""
    rule, theta = rule_of("dizo", schedule=Schedule("constant", 0.05, 24)), first_theta()
    assert isinstance(rule, DiZO)
    return rule, theta, rule.apply(theta, rule.init(theta), given([4, 4]))


def test_a_projection_is_queried_at_the_edges_of_its_range() -> None:
    rule, theta, state = drifted()
    assert [rule.projects(step) for step in range(7)] == [False, False, True, True, True, False, False]
    tau, seed = 0.2, 77
    u = directions.fill(torch.empty(3), seed, "rademacher").tolist()
    z = rule.directions(2, theta, state).fill(torch.empty(SIZE), seed)
    for segment, sign in zip(LAYOUT.segments, u, strict=True):
        here = slice(segment.offset, segment.offset + segment.size)
        drift = (theta - first_theta())[here]
        torch.testing.assert_close((theta + EPS * z)[here], first_theta()[here] + (1 + tau * sign) * drift)
        torch.testing.assert_close((theta - EPS * z)[here], first_theta()[here] + (1 - tau * sign) * drift)
    # In the middle of a projection as well: of the drift as SGD left it.
    state = rule.apply(theta, state, given([4], step=2, seed=8))
    assert (state["ratios"] != 1.0).all()
    later = rule.directions(3, theta, state).fill(torch.empty(SIZE), seed)
    torch.testing.assert_close(later, z, rtol=1e-4, atol=1e-4)


def test_a_projections_directions_do_not_depend_on_the_range() -> None:
    rule, theta, state = drifted()
    found = rule.directions(2, theta, state)
    z = found.fill(torch.empty(SIZE), 5)
    for first, stop in ((0, 1), (150, 310), (200, 300), (299, SIZE)):
        assert torch.equal(found.fill(torch.empty(stop - first), 5, offset=first), z[first:stop])
    moved = found.replay(theta.clone(), np.array([5], np.uint64), np.array([0.5], np.float32))
    assert torch.equal(moved, theta + z * 0.5)


def test_a_projection_descends_along_the_ratios() -> None:
    """On a quadratic the two-point scalars are exact, so a step is the gradient in the ratios, projected on u."""
    rule, theta, state = drifted()
    target, anchor, drift = (
        torch.linspace(-2, 2, SIZE).double(),
        first_theta().double(),
        (theta - first_theta()).double(),
    )

    def loss(point: Tensor) -> Tensor:
        return 0.05 * ((point - target) ** 2).sum()

    ratios = torch.ones(3, dtype=torch.float64, requires_grad=True)
    grown = torch.cat([a.expand(s.size) for a, s in zip(ratios, LAYOUT.segments, strict=True)])
    loss(anchor + grown * drift).backward()
    seed = 9
    z = rule.directions(2, theta, state).fill(torch.empty(SIZE), seed).double()
    g = float(loss(theta.double() + EPS * z) - loss(theta.double() - EPS * z)) / (2 * EPS)
    records = Records(2, np.array([[seed]], np.uint64), np.array([[g]], np.float32))
    before = float(loss(theta.double()))
    state = rule.apply(theta, state, [records])
    u = directions.fill(torch.empty(3), seed, "rademacher").double()
    assert ratios.grad is not None
    wanted = 1.0 - 0.3 / QUERIES * (ratios.grad @ u) * u
    assert (wanted - 1.0).abs().max() < 0.2  # not cut
    torch.testing.assert_close(state["ratios"], wanted, rtol=1e-5, atol=1e-6)
    assert float(loss(theta.double())) < before


def test_a_projection_stays_within_its_range_and_begins_anew() -> None:
    rule, theta, state = drifted()
    for r in given([4, 4, 4], step=2):
        state = rule.apply(theta, state, [Records(r.step, r.seeds, 1e4 * r.scalars)])
        assert ((state["ratios"] - 1.0).abs() - 0.2).abs().max() < 1e-12
    state = rule.apply(theta, state, given([4], step=5))
    assert state["ratios"].tolist() == [1.0] * 3


def test_a_drift_of_nothing_is_projected_to_nothing() -> None:
    """Rounds without records may leave a projection with theta0."""
    rule, theta = rule_of("dizo"), first_theta()
    state = rule.apply(theta, rule.init(theta), given([0, 0, 4, 4]))
    assert torch.equal(theta, first_theta())
    assert not rule.directions(3, theta, state).fill(torch.empty(SIZE), 1).any()


def test_a_snapshot_leaves_theta0_out() -> None:
    rule, theta, state = drifted()
    assert rule.snapshot_bytes(theta, state) == 4 * SIZE + 8 * len(LAYOUT.segments)


# -- federated

RATES = {"sign": 0.1, "momentum": 0.004, "adam": 0.1, "adamw": 0.1, "conservative": 0.02, "dizo": 0.02}
CASES = [
    (name, local_steps, seeds)
    for name in NAMES
    for local_steps in ((1,) if name == "dizo" else (1, 4))
    for seeds in (("shared", "independent", "pool") if name == "conservative" else ("shared", "independent"))
]


@pytest.mark.parametrize(("name", "local_steps", "seeds"), CASES)
def test_a_federated_run_replays(tmp_path: Path, name: str, local_steps: int, seeds: str) -> None:
    spec = make_spec(
        optimizer=name, local_steps=local_steps, seeds=seeds, learning_rate=RATES[name], schedule="constant",
        warmup_steps=0, settings=values_of(name, weight_decay=0.0 if seeds == "pool" else 0.01), rounds=6,
    )  # fmt: skip
    whole = start(tmp_path / "whole", spec)
    head = whole.finish()
    entries, theta = list(whole.ledger.read()), whole.coordinator.replica.theta
    assert mean_loss(theta) < 0.9 * mean_loss(theta0())

    replayed = make_replica(spec)
    replay(whole.ledger, replayed)
    assert torch.equal(replayed.theta, theta) and entries[-1].digest == theta_digest(theta)
    if local_steps == 1:  # its own rounds' theta
        assert all(torch.equal(worker.replica.theta, replayed_at(whole.ledger, 5)) for worker in whole.workers.values())

    middle = make_replica(spec)
    replay(whole.ledger, middle, 3)
    tail = tuple(RoundRecords(entry.seeds, entry.scalars) for entry in entries)
    snapshot = middle.rule.snapshot(middle.theta, middle.state)
    for missed in (CatchUp("records", 0, 3, tail[:3]), CatchUp("snapshot", 0, 3, snapshot=snapshot)):
        late = make_worker(spec, 3).replica
        late.catch_up(missed)
        assert late.digest() == entries[2].digest
        late.catch_up(CatchUp("records", 3, 6, tail[3:]))
        assert torch.equal(late.theta, theta) and same(late.state, replayed.state)

    halted = start(tmp_path / "halted", spec)
    for _ in range(3):
        halted.round()
    halted.coordinator.open_round()  # killed with a round in flight
    halted.ledger.close()
    assert start(tmp_path / "halted", spec).finish() == head


def replayed_at(ledger: Ledger, rounds: int) -> Tensor:
    replica = make_replica(ledger.spec)
    replay(ledger, replica, rounds)
    return replica.theta


@pytest.mark.parametrize("name", NAMES)
def test_a_late_client_joins_a_run(tmp_path: Path, name: str) -> None:
    spec = make_spec(optimizer=name, learning_rate=RATES[name], settings=values_of(name))
    run = start(tmp_path, spec, clients=range(3))
    for _ in range(4):
        run.round()
    late = run.join(3)
    summary = run.round()
    assert summary.accepted == 4 and not summary.dropped
    assert torch.equal(late.replica.theta, replayed_at(run.ledger, 4))


# -- limits


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        *(
            ({"method.optimizer": name, "federation.seeds": "pool"}, f'"{name}" needs federation.seeds = "shared" or')
            for name in NAMES
            if name != "conservative"
        ),
        *(
            (
                {"method.optimizer": name, "space.theta_dtype": "bfloat16"},
                f'"{name}" needs space.theta_dtype = "float32"',
            )
            for name in NAMES
            if name != "conservative"
        ),
        *(({"method.optimizer": name, "space.kind": "codes"}, f'"{name}" needs space.kind = ') for name in NAMES),
        (
            {"method.optimizer": "dizo", "federation.local_steps": 4},
            '"dizo" needs federation.local_steps = 1, found 4: what it does next depends on',
        ),
        ({"method.optimizer": "dizo", "method.projection_clip": 1.0}, "method.projection_clip: .*less than 1"),
        ({"method.optimizer": "adams"}, "Did you mean 'adam'"),
    ],
)
def test_what_is_not_valid_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_dizo_refuses_scalars_that_are_no_derivatives() -> None:
    (limit,) = (limit for limit in DiZO.limits if limit.key == "method.estimator")
    fault = limit.fault({"method.estimator": "fzoo"})
    assert fault is not None and 'found "fzoo": a projection needs scalars that are derivatives' in fault


def test_conservative_is_valid_where_sgd_is() -> None:
    for change in ({"federation.seeds": "pool"}, {"space.theta_dtype": "bfloat16"}, {"federation.local_steps": 4}):
        assert from_flat({"method.optimizer": "conservative", **change}).method.optimizer == "conservative"
