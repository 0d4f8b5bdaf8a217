"""HiZOO and HiSo against transcriptions of their equations, on an ill-conditioned quadratic, and as federated runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replays import at, check_late_client, check_replay, same
from tiny import Rows, losses, make_spec, start, theta0
from torch import Tensor

from fedzo import directions
from fedzo.config import Config, from_flat
from fedzo.directions.base import Directions, Isotropic, Scaled
from fedzo.errors import ConfigError
from fedzo.estimators import ESTIMATORS, Estimate, Estimator, Query, ThreePoint
from fedzo.evaluation import Batch, LossRequest
from fedzo.federation.messages import Contribution, RoundRecords, decode, max_contribution_bytes
from fedzo.optimizers import OPTIMIZERS, HiSo, HiZOO, Records, Rule, Schedule, Setup, State
from fedzo.structures import Frame, IsotropicStructure, Layout

SIZE, QUERIES = 50, 3


def values_of(name: str, **settings: Any) -> dict[str, Any]:
    """What a rule reads, faster than by default."""
    method = Config().method
    found = {key: getattr(method, key) for key in OPTIMIZERS[name].settings}
    return found | {"smoothing": 0.05} | settings


def rule_of(name: str, local_steps: int = 1, size: int = SIZE, **settings: Any) -> Rule:
    values = values_of(name, **settings)
    structure = IsotropicStructure(Frame("gaussian", Layout.flat(size), values=values))
    setup = Setup(Schedule("cosine", 0.05, 24, 3), QUERIES, structure, local_steps=local_steps, values=values)
    return OPTIMIZERS[name](setup)


def given(widths: list[int], scalars: int = 2, seed: int = 5) -> list[Records]:
    """A step of each width, after one another."""
    rng = np.random.default_rng(seed)

    def one(step: int, width: int) -> Records:
        seeds = rng.integers(0, 2**64, (1, width), dtype=np.uint64)
        return Records(step, seeds, rng.normal(size=(1, scalars * width)).astype(np.float32))

    return [one(step, width) for step, width in enumerate(widths)]


def first_theta() -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=SIZE).astype(np.float32))


def direction(seed: int, size: int = SIZE) -> Tensor:
    """float64 [size]."""
    return directions.fill(torch.empty(size), seed, "gaussian").double()


def run_estimator(estimator: Estimator, query: Query) -> tuple[Estimate, list[LossRequest]]:
    """The estimate on least squares, and what was asked."""
    steps, asked = estimator.estimate(query), []
    try:
        request = next(steps)
        while True:
            assert isinstance(request, LossRequest)
            asked.append(request)
            request = steps.send(losses(request))
    except StopIteration as stop:
        return stop.value, asked


# -- the estimator


@pytest.mark.parametrize("found", [Isotropic("gaussian"), Scaled(Isotropic("gaussian"), torch.linspace(0.2, 2, 12))])
def test_three_losses_give_slope_and_half_the_curvature(found: Directions) -> None:
    """Both differences of a quadratic have no error of their own, for each example and direction."""
    theta, batch, eps = theta0(), Rows(2).batch(np.arange(9)), 0.3
    estimate, (request,) = run_estimator(ThreePoint(), Query(theta, batch, (11, 2**64 - 1, 0), eps, 0, found))
    x, residual = batch.inputs["x"].double(), (batch.inputs["x"] @ theta - batch.inputs["y"]).double()
    assert estimate.second is not None and estimate.second.shape == estimate.projected.shape == (3, 9)
    for p, seed in enumerate(request.seeds):
        z = found.fill(torch.empty_like(theta), seed).double()
        np.testing.assert_allclose(estimate.projected[p], (residual * (x @ z)).numpy(), atol=2e-3)
        np.testing.assert_allclose(estimate.second[p], (0.5 * (x @ z) ** 2).numpy(), atol=2e-3)
    points = 1 + len(request.seeds) * len(request.offsets)
    assert request.origin and request.offsets == (eps, -eps) and points == ThreePoint().forwards(3) == 7
    assert ThreePoint.scalars == 2 and ThreePoint().evaluated(3, 8, 5) == 35


def test_the_second_scalar_keeps_its_sign() -> None:
    """Of a loss that bends down: what is averaged is no magnitude."""
    steps = ThreePoint().estimate(Query(theta0(), Rows(0).batch(np.arange(4)), (1,), 0.5, 0, Isotropic("gaussian")))
    next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(torch.tensor([[2.0] * 4, [1.0] * 4, [1.5, 1.5, 3.5, 1.5]]))
    assert stop.value.value.second.tolist() == [[-3.0, -3.0, 1.0, -3.0]]
    assert stop.value.value.projected.tolist() == [[-0.5, -0.5, -2.5, -0.5]]


# -- the rules are their papers' equations


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_hizoo_is_its_papers_algorithm(decay: float) -> None:
    rule, steps, theta = rule_of("hizoo", weight_decay=decay), given([QUERIES] * 12), first_theta()
    state = rule.apply(theta, rule.init(theta), steps)
    wanted, inverse, a = first_theta().double(), torch.ones(SIZE, dtype=torch.float64), 0.05  # inverse of Sigma
    for r in steps:
        lr, zs = rule.setup.schedule(r.step), [direction(seed) for seed in r.seeds[0].tolist()]
        g, h = r.scalars[0, :QUERIES].tolist(), r.scalars[0, QUERIES:].tolist()
        root = inverse.sqrt()
        bent = sum(abs(c) * (root * z) ** 2 for c, z in zip(h, zs, strict=True)) / QUERIES
        inverse = (1 - a) * inverse + a * bent
        slope = sum(c * z / inverse.sqrt() for c, z in zip(g, zs, strict=True)) / QUERIES
        wanted = wanted - lr * (slope + decay * wanted)
    torch.testing.assert_close(state["curvature"].double(), inverse, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(theta.double(), wanted, rtol=2e-5, atol=2e-6)
    assert float(inverse.max() / inverse.min()) > 1.5 and float((wanted - first_theta()).abs().max()) > 0.05


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("local_steps", [1, 4])
def test_hiso_is_its_papers_algorithm(local_steps: int, decay: float) -> None:
    rule, theta = rule_of("hiso", local_steps, smoothing=0.2, weight_decay=decay, adam_eps=0.01), first_theta()
    steps = given([QUERIES] * 12, scalars=1)
    state = rule.apply(theta, rule.init(theta), steps)
    wanted, moment, nu = first_theta().double(), torch.ones(SIZE, dtype=torch.float64), 0.2
    for round_ in range(12 // local_steps):
        fixed = moment
        for r in steps[round_ * local_steps : (round_ + 1) * local_steps]:
            pairs = zip(r.scalars[0].tolist(), r.seeds[0].tolist(), strict=True)
            delta = sum(c * direction(seed) / fixed.sqrt() for c, seed in pairs) / QUERIES
            wanted = wanted - rule.setup.schedule(r.step) * (delta + decay * wanted)
        moment = (1 - nu) * fixed + nu * (delta**2 + 0.01)
    torch.testing.assert_close(state["curvature"].double(), moment, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(theta.double(), wanted, rtol=2e-5, atol=2e-6)
    assert float(moment.max() / moment.min()) > 1.1 and float((wanted - first_theta()).abs().max()) > 0.05


def test_independent_seeds_are_the_weighted_sum_of_the_clients_curvatures() -> None:
    """|w h| = w |h|: a step of two clients' own records is the mean of their terms, whatever their signs."""
    rule, (one,) = rule_of("hizoo"), given([2 * QUERIES])
    theta = first_theta()
    found = rule.apply(theta, rule.init(theta), [one])["curvature"]
    bent = sum(
        abs(h) * direction(seed) ** 2 for h, seed in zip(one.second[0].tolist(), one.seeds[0].tolist(), strict=True)
    )
    torch.testing.assert_close(found.double(), 0.95 + 0.05 * bent / QUERIES, rtol=1e-5, atol=0.0)


# -- what they are for


CURVATURE = torch.logspace(-2, 2, 6, dtype=torch.float64)


def quadratic(theta: Tensor) -> float:
    """1/2 sum_i c_i theta_i^2 in float64, with c over four decades."""
    return 0.5 * float((CURVATURE * theta.double() ** 2).sum())


def descend(name: str, rate: float, steps: int, curvature: Tensor | None = None) -> tuple[Tensor, State]:
    """theta and state after steps on the quadratic from theta = 1."""
    values, eps, rng = values_of("hizoo", smoothing=0.02), 1e-3, np.random.default_rng(3)
    structure = IsotropicStructure(Frame("gaussian", Layout.flat(6), values=values))
    rule = OPTIMIZERS[name](Setup(Schedule("constant", rate, 10**6), QUERIES, structure, values=values))
    theta = torch.ones(6)
    state = rule.init(theta) if curvature is None else {"curvature": curvature.clone()}
    for step in range(steps):
        seeds, found = rng.integers(0, 2**64, (1, QUERIES), dtype=np.uint64), rule.directions(step, theta, state)
        z = [eps * found.fill(torch.empty(6), seed).double() for seed in seeds[0].tolist()]
        here, plus, minus = quadratic(theta), *([quadratic(theta + sign * d) for d in z] for sign in (1, -1))
        slopes = [(up - down) / (2 * eps) for up, down in zip(plus, minus, strict=True)]
        bends = [(up + down - 2 * here) / (2 * eps**2) for up, down in zip(plus, minus, strict=True)]
        scalars = np.array([slopes + (bends if name == "hizoo" else [])], dtype=np.float32)
        state = rule.apply(theta, state, [Records(step, seeds, scalars)])
    return theta, state


@pytest.fixture(scope="module")
def settled() -> Tensor:
    """HiZOO's H after many steps that hardly move theta."""
    return descend("hizoo", 1e-9, 1500)[1]["curvature"]


def test_hizoos_curvature_settles_on_the_hessians_diagonal(settled: Tensor) -> None:
    """H tends to (size / 2 + 1) times the diagonal: there E |h| z_i^2 = 1 for all i."""
    ratios = settled.double() / (CURVATURE * (6 / 2 + 1))
    assert torch.equal(settled.argsort(), torch.arange(6))
    assert float(ratios.log().abs().max()) < np.log(2.5), ratios


def test_hizoo_descends_an_ill_conditioned_quadratic_where_sgd_does_not(settled: Tensor) -> None:
    best = min(quadratic(descend("sgd", rate, 200)[0]) for rate in (1e-3, 3e-3, 1e-2))
    assert quadratic(descend("hizoo", 1.0, 200, settled)[0]) < best / 100


# -- state


@pytest.mark.parametrize("name", ["hizoo", "hiso"])
def test_step_by_step_and_restored_are_the_same_bits(name: str) -> None:
    made, scalars = OPTIMIZERS[name], 2 if name == "hizoo" else 1
    rule, steps = rule_of(name, 2, weight_decay=0.1), given([3, 6, 0, 3, 9, 3, 3, 0], scalars)
    fused, walking, late = first_theta(), first_theta(), first_theta()
    state, walked = rule.apply(fused, rule.init(fused), steps), rule.init(walking)
    assert {key: value.shape for key, value in state.items()} == {"curvature": (SIZE,)} and made.state_vectors == 1
    for r in steps[:4]:
        walked = rule.apply(walking, walked, [r])
    data = rule.snapshot(walking, walked)
    assert len(data) == rule.snapshot_bytes(walking, walked) == 8 * SIZE
    restored = rule.restore(late, rule.init(late), data)
    assert torch.equal(late, walking) and same(restored, walked)
    for theta, reached in ((walking, walked), (late, restored)):
        assert same(rule.apply(theta, reached, steps[4:]), state) and torch.equal(theta, fused)


@pytest.mark.parametrize("name", ["hizoo", "hiso"])
def test_curvature_stays_within_bounds(name: str) -> None:
    """Neither steps of no curvature nor enormous ones end in directions that are infinite or zero."""
    for size in (0.0, 1e30):
        rule, theta = rule_of(name, smoothing=0.9, adam_eps=1e-30), torch.zeros(SIZE)
        state = rule.init(theta)
        for step in range(40):
            seeds = np.full((1, 1), step, dtype=np.uint64)
            scalars = np.full((1, 2 if name == "hizoo" else 1), size, dtype=np.float32)
            state = rule.apply(theta.zero_(), state, [Records(step, seeds, scalars)])
        bound = 1e8 if size else 1e-8
        assert torch.equal(state["curvature"], torch.full((SIZE,), bound))
        z = rule.directions(40, theta, state).fill(torch.empty(SIZE), 1)
        assert bool(torch.isfinite(z).all()) and float(z.abs().min()) > 0


def test_scales_are_rounded_as_ieee_wants() -> None:
    """1 / sqrt(H) has two roundings, of the root and of its reciprocal, whatever the processor."""
    rule, theta = rule_of("hiso"), torch.zeros(100_003)
    curvature = torch.from_numpy(np.exp(np.random.default_rng(0).uniform(-18, 18, len(theta))).astype(np.float32))
    found = rule.directions(0, theta, {"curvature": curvature.clone()})
    root = curvature.double().sqrt().float()
    assert isinstance(found, Scaled) and torch.equal(found.scale, (1.0 / root.double()).float())


# -- federated

HIZOO: dict[str, Any] = {
    "estimator": "hizoo", "optimizer": "hizoo", "family": "gaussian", "learning_rate": 0.1, "schedule": "constant",
    "warmup_steps": 0, "rounds": 10, "settings": values_of("hizoo", smoothing=0.02),
}  # fmt: skip
HISO: dict[str, Any] = {
    "optimizer": "hiso", "learning_rate": 0.02, "schedule": "constant", "warmup_steps": 0, "rounds": 8,
    "settings": values_of("hiso", smoothing=0.2),
}  # fmt: skip


@pytest.mark.parametrize("seeds", ["shared", "independent"])
def test_hizoo_runs_and_replays(tmp_path: Path, seeds: str) -> None:
    run = check_replay(tmp_path, make_spec(**HIZOO, seeds=seeds))
    curvature = run.coordinator.replica.state["curvature"]
    assert float(curvature.max() / curvature.min()) > 1.2


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize("seeds", ["shared", "independent"])
def test_hiso_runs_and_replays(tmp_path: Path, seeds: str, local_steps: int, family: str) -> None:
    check_replay(tmp_path, make_spec(**HISO, seeds=seeds, local_steps=local_steps, family=family))


@pytest.mark.parametrize(("size", "kind"), [(2000, "records"), (12, "snapshot")])
@pytest.mark.parametrize("method", [HIZOO, HISO])
def test_a_late_client_has_the_curvature(tmp_path: Path, method: dict[str, Any], size: int, kind: str) -> None:
    rate = method["learning_rate"] * 12 / size
    check_late_client(tmp_path, make_spec(**method | {"size": size, "learning_rate": rate}), kind)


def test_hisos_local_steps_share_the_rounds_curvature(tmp_path: Path) -> None:
    """A client's local steps and the replay of the clients' mean scale by the same H."""
    run = start(tmp_path, make_spec(**HISO, local_steps=4))
    run.round()
    curvature, worker = run.coordinator.replica.state["curvature"].clone(), run.workers[2]
    assert float((curvature - 1.0).abs().max()) > 1e-3
    plan = run.coordinator.open_round()[2]
    steps, scales = worker.round(plan), []
    with pytest.raises(StopIteration):
        request: Any = next(steps)
        while True:
            assert isinstance(request.directions, Scaled)
            scales.append(request.directions.scale)
            request = steps.send(losses(request))
    assert len(scales) == 4 and all(torch.equal(scale, scales[0]) for scale in scales)
    torch.testing.assert_close(scales[0], 1.0 / curvature.sqrt())
    assert same(worker.replica.state, {"curvature": curvature})


@pytest.mark.parametrize("seeds", ["shared", "independent"])
def test_two_scalars_a_query_cross_messages_and_ledger(tmp_path: Path, seeds: str) -> None:
    """The second ones are those of the clients' mean loss: taken here from all data as one batch."""
    spec = make_spec(**HIZOO | {"seeds": seeds, "batch_size": 100, "aggregation": "mean"})
    run, sent = start(tmp_path, spec), {}

    def listen(_: int, client: int, data: bytes) -> list[bytes]:
        message = decode(data)
        assert isinstance(message, Contribution)
        sent[client] = message
        assert len(data) == max_contribution_bytes(1, 3, 2) == 32 + (8 + 4 * 2) * 3
        return [data]

    summary = run.round(listen)
    (entry,) = run.ledger.read()
    queries = 3 if seeds == "shared" else 12
    assert entry.seeds.shape == (1, queries) and entry.scalars.shape == (1, 2 * queries)
    assert all(message.scalars.shape == (1, 6) for message in sent.values())
    assert summary.scalars == 2 * queries and summary.bytes_up == 4 * (32 + 16 * 3)
    carried = RoundRecords(entry.seeds, entry.scalars)
    assert len(carried.to_bytes()) == carried.nbytes == 7 + (8 + 4 * 2) * queries

    records, theta = entry.records(), theta0()
    assert np.array_equal(np.concatenate([records.projected, records.second], axis=1), entry.scalars)
    parts = [Rows(client).batch(np.arange(100)[: len(Rows(client))]) for client in range(4)]
    if seeds == "shared":
        union = {name: torch.cat([part.inputs[name] for part in parts]) for name in ("x", "y")}
        batches, weights = [Batch(union, torch.zeros(len(union["y"]), dtype=torch.int64))], [1.0]
    else:
        total = sum(len(part) for part in parts)
        batches, weights = parts, [len(part) / total for part in parts]
    for i, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
        mine = records.seeds[0, 3 * i : 3 * i + 3].tolist()
        query = Query(theta, batch, tuple(mine), spec.eps, 0, Isotropic("gaussian"))
        estimate, _ = run_estimator(ThreePoint(), query)
        assert estimate.second is not None
        here = slice(3 * i, 3 * i + 3)
        np.testing.assert_allclose(records.projected[0, here], weight * estimate.projected.mean(1), rtol=1e-4)
        np.testing.assert_allclose(records.second[0, here], weight * estimate.second.mean(1), rtol=1e-4)
    state = at(run, 1).state["curvature"]
    assert same({"curvature": state}, run.coordinator.replica.state)


# -- limits


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"method.optimizer": "hizoo"},
            '"hizoo" needs method.estimator = "hizoo", found "two-point": it needs curva',
        ),
        ({"method.estimator": "hizoo"}, 'method.estimator = "hizoo" needs method.optimizer = "hizoo", found "sgd"'),
        ({"method.estimator": "hizoo", "method.optimizer": "hiso"}, 'needs method.optimizer = "hizoo", found "hiso"'),
        (
            {"method.estimator": "hizoo", "method.optimizer": "hizoo"},
            'needs method.directions = "gaussian", found "rademacher": the square of a random sign is 1',
        ),
        (
            {"method.name": "hizoo", "federation.local_steps": 4},
            "needs federation.local_steps = 1, found 4: what it does next depends on",
        ),
        ({"method.name": "hizoo", "federation.seeds": "pool"}, 'needs federation.seeds = .* found "pool": a pool\'s'),
        ({"method.name": "hiso", "federation.seeds": "pool"}, 'needs federation.seeds = .* found "pool": a pool\'s'),
        ({"method.name": "hiso", "space.theta_dtype": "bfloat16"}, 'needs space.theta_dtype = "float32"'),
        ({"method.name": "hizoo", "method.directions": "rademacher"}, 'is method.directions = "gaussian", found'),
        ({"method.optimizer": "hizo"}, "Did you mean 'hizoo'"),
    ],
)
def test_what_is_not_valid_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_names_give_the_parts() -> None:
    for name, local_steps in (("hizoo", 1), ("hiso", 4)):
        config = from_flat({"method.name": name, "federation.local_steps": local_steps})
        assert config.method.optimizer == name and set(config.settings()) == set(OPTIMIZERS[name].settings)
    assert ESTIMATORS["hizoo"] is ThreePoint and OPTIMIZERS["hizoo"] is HiZOO and OPTIMIZERS["hiso"] is HiSo
