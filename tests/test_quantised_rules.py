"""QZO and QuZO against transcriptions of their equations, in the mean over roundings, and as federated runs."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import config, make_data, run
from torch import Tensor

from fedzo import engine
from fedzo.config import from_flat
from fedzo.directions import fill, philox, reference
from fedzo.directions.base import Isotropic
from fedzo.engine import in_process, play_round
from fedzo.errors import ConfigError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator, replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import CatchUp, RoundRecords
from fedzo.federation.replica import theta_digest
from fedzo.optimizers import OPTIMIZERS, Records, Rule, Schedule, Setup
from fedzo.optimizers.quantised import QZO, QuZO
from fedzo.run_folder import RunFolder
from fedzo.runtime import import_bitsandbytes
from fedzo.spaces import Segment
from fedzo.structures import Frame, IsotropicStructure, Layout
from fedzo.structures.quantised import Rounded

EPS, QUERIES = 0.02, 3
# Rows of different steps, one of zeros that no step can move, and a parameter of plain values in between.
FIRST, LAST = torch.tensor([0.05, 0.013, 0.0, 0.2]), torch.tensor([0.03, 0.07])
CODES = Layout(
    (
        Segment("a", (4, 8), 0, 32, holds="codes", steps=FIRST),
        Segment("norm", (5,), 32, 5),
        Segment("b", (2, 12), 37, 24, holds="codes", steps=LAST),
    )
)
SCALES = Layout((Segment("a", (40,), 0, 40, holds="scales"), Segment("norm", (5,), 40, 5)))
WORTH = torch.cat([FIRST.repeat_interleave(8), torch.full((5,), torch.nan), LAST.repeat_interleave(12)])
HELD = ~WORTH.isnan()


def codes0() -> Tensor:
    rng = np.random.default_rng(1)
    theta = torch.from_numpy(rng.integers(-127, 128, CODES.size).astype(np.float32))
    theta[~HELD] = torch.from_numpy(rng.normal(size=5).astype(np.float32))
    theta[16:24] = 0.0
    return theta


def rule_of(made: type[Rule], layout: Layout, schedule: Schedule | None = None, rounding: int = 9, **more: Any) -> Rule:
    values: dict[str, Any] = {"eps": EPS, "weight_decay": 0.0, "queries": QUERIES, "family": "gaussian"} | more
    queries, family = values.pop("queries"), values.pop("family")
    structure = IsotropicStructure(Frame(family, layout, values=values))
    return made(Setup(schedule or Schedule("cosine", 0.02, 24, 3), queries, structure, rounding, values=values))


def given(widths: list[int], seed: int = 5) -> list[Records]:
    """A step of each width, after one another."""
    rng = np.random.default_rng(seed)

    def one(step: int, width: int) -> Records:
        seeds = rng.integers(0, 2**64, (1, width), dtype=np.uint64)
        return Records(step, seeds, rng.normal(size=(1, width)).astype(np.float32))

    return [one(step, width) for step, width in enumerate(widths)]


def whole(theta: Tensor) -> bool:
    """Whether all codes are whole numbers in [-127, 127]."""
    held = theta[HELD]
    return torch.equal(held, held.round()) and float(held.abs().max()) <= 127.0


# -- QZO


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_qzo_is_sgd_that_keeps_scales_from_becoming_negative(decay: float) -> None:
    rule, steps = rule_of(QZO, SCALES, Schedule("constant", 0.05, 24), weight_decay=decay), given([QUERIES] * 8)
    start = torch.rand(45, generator=torch.Generator().manual_seed(1)) * 0.1
    theta, wanted = start.clone(), start.double()
    assert rule.apply(theta, rule.init(theta), steps) == {}
    for r in steps:
        pairs = zip(r.scalars[0].tolist(), r.seeds[0].tolist(), strict=True)
        slope = sum(g * fill(torch.empty(45), seed, "gaussian").double() for g, seed in pairs) / QUERIES
        wanted = wanted - 0.05 * (slope + decay * wanted)
        wanted[:40] = wanted[:40].clamp(min=0.0)
    torch.testing.assert_close(theta.double(), wanted, rtol=1e-5, atol=1e-6)
    assert int((theta[:40] == 0.0).sum()) > 3 and float(theta.min()) < 0.0  # plain values may be negative


# -- QuZO's points


def test_points_are_whole_codes_on_both_sides() -> None:
    theta, points = codes0(), Rounded(Isotropic("gaussian"), CODES)
    plus, minus = (points.axpy(theta, 77, c, out=torch.empty_like(theta)) for c in (EPS, -EPS))
    assert whole(plus) and whole(minus) and not torch.equal(plus, minus)
    inside = HELD & (plus.abs() < 127) & (minus.abs() < 127)
    assert torch.equal((plus + minus)[inside], 2 * theta[inside])
    zero = torch.zeros_like(theta)
    there, back = (points.axpy(zero, 77, c, out=torch.empty_like(zero)) for c in (EPS, -EPS))
    assert torch.equal(there, -back) and int(there[:16].count_nonzero()) > 3
    assert not plus[16:24].any()  # a row without a step stays
    wild = points.axpy(theta, 77, 1e4, out=torch.empty_like(theta))
    assert whole(wild) and float(wild[:8].abs().min()) == 127.0


@pytest.mark.parametrize("which", [0, 1])
def test_points_are_the_quotients_rounded_at_random(which: int) -> None:
    theta, seed = codes0(), 2**64 - 7
    found = Rounded(Isotropic("gaussian"), CODES, which).axpy(theta, seed, EPS, out=torch.empty_like(theta))
    low, high = philox.words(seed, 4, 2**63).tolist()[2 * which : 2 * which + 2]
    moved = fill(torch.empty(CODES.size), seed, "gaussian") * np.float32(EPS).item()
    quotient = torch.where(HELD & (WORTH != 0), moved / WORTH, 0.0)
    rounded = reference.round_stochastically(quotient, low | high << 32)
    wanted = torch.where(HELD, (theta + rounded).clamp(-127, 127), theta + moved)
    assert torch.equal(found, wanted)


def test_points_do_not_depend_on_the_range() -> None:
    theta, points = codes0(), Rounded(Isotropic("rademacher"), CODES)
    at_once = points.axpy(theta, 3, EPS, out=torch.empty_like(theta))
    for start, stop in ((0, 1), (5, 30), (30, 40), (36, 38), (40, CODES.size)):
        part = theta[start:stop].clone()
        assert torch.equal(points.axpy(part, 3, EPS, offset=start), at_once[start:stop])
        assert torch.equal(
            points.fill(torch.empty(stop - start), 3, offset=start), points.fill(torch.empty(61), 3)[start:stop]
        )


def test_the_two_roundings_of_a_direction_are_independent_and_unbiased() -> None:
    layout = Layout((Segment("a", (1, 64), 0, 64, holds="codes", steps=torch.tensor([1.0])),))
    first, second = (Rounded(Isotropic("rademacher"), layout, which) for which in (0, 1))
    errors = []
    for seed in range(500):
        z = 0.3 * fill(torch.empty(64), seed, "rademacher")
        errors.append([points.axpy(torch.zeros(64), seed, 0.3) - z for points in (first, second)])
    a, b = (torch.cat([pair[i] for pair in errors]) for i in (0, 1))
    n, variance = len(a), 0.3 * 0.7
    assert abs(float(a.mean())) < 5 * (variance / n) ** 0.5 and abs(float(b.mean())) < 5 * (variance / n) ** 0.5
    assert float(a.var()) == pytest.approx(variance, rel=0.03)
    assert abs(float((a * b).mean())) < 5 * variance / n**0.5


# -- QuZO's steps


def test_quzo_is_its_equation() -> None:
    rule, steps, theta = rule_of(QuZO, CODES), given([3, 6, 3, 3]), codes0()
    assert rule.apply(theta, rule.init(theta), steps) == {}
    wanted = codes0()
    for r in steps:
        total, lr = torch.zeros(CODES.size), rule.setup.schedule(r.step)
        for g, seed in zip(r.scalars[0].tolist(), r.seeds[0].tolist(), strict=True):
            z, (low, high) = fill(torch.empty(CODES.size), seed, "gaussian"), philox.words(seed, 4, 2**63).tolist()[2:]
            quotient = torch.where(HELD & (WORTH != 0), z * np.float32(EPS).item() / WORTH, 0.0)
            codes = reference.round_stochastically(quotient, low | high << 32)  # u step / eps
            total = total + codes * np.float32(-lr / QUERIES * g / EPS).item()
            moved = wanted + z * np.float32(-lr / QUERIES * g).item()
            wanted = torch.where(HELD, wanted, moved)
        low, high = philox.words(9, 4, r.step).tolist()[:2]
        whole_steps = reference.round_stochastically(torch.where(HELD, total, 0.0), low | high << 32)
        wanted = torch.where(HELD, (wanted + whole_steps).clamp(-127, 127), wanted)
    assert torch.equal(theta, wanted) and whole(theta)
    assert int((theta != codes0())[HELD].sum()) > 20 and not theta[16:24].any()
    assert float((theta - codes0())[~HELD].abs().min()) > 0


def test_codes_stay_whole_however_far_a_step_goes() -> None:
    theta = codes0()
    for scale in (1.0, 1e3, 1e6):
        (records,) = given([QUERIES])
        rule_of(QuZO, CODES).apply(theta, {}, [Records(0, records.seeds, records.scalars * np.float32(scale))])
        assert whole(theta)
    assert int((theta.abs() == 127).sum()) > 30


def test_a_step_of_quzo_is_sgds_in_the_mean() -> None:
    """With the perturbation's rounding for the update too, the entries' own terms would count 3.3 times."""
    size, worth, queries, rate = 8, 0.1, 2500, 1.0
    layout = Layout((Segment("a", (1, size), 0, size, holds="codes", steps=torch.tensor([worth])),))
    slope = torch.tensor([2.0, -3.0, 1.0, 0.5, -1.5, 2.5, -2.0, 1.0])  # of a loss linear in the weights
    eps = 0.3 * worth
    seeds = np.random.default_rng(4).integers(0, 2**64, (1, queries), dtype=np.uint64)

    def moved(perturb: int) -> Tensor:
        points = Rounded(Isotropic("rademacher"), layout, perturb)
        g = [float(slope @ points.axpy(torch.zeros(size), seed, eps)) * worth / eps for seed in seeds[0].tolist()]
        rule = rule_of(QuZO, layout, Schedule("constant", rate, 9), eps=eps, queries=queries, family="rademacher")
        theta = torch.zeros(size)
        rule.apply(theta, {}, [Records(0, seeds, np.array([g], dtype=np.float32))])
        assert torch.equal(theta, theta.round())
        return theta * worth  # in weights

    found, biased = moved(0), moved(1)
    norm = float(slope @ slope)
    assert -float(found @ slope) / norm == pytest.approx(rate, abs=0.3)
    assert -float(biased @ slope) / norm > 2.5 * rate
    spread = 3.3 * norm**0.5 * rate / queries**0.5 + worth
    assert float((found + rate * slope).abs().max()) < 5 * spread


def test_steps_round_independently_of_one_another_and_in_the_mean() -> None:
    """A step of a quarter of a code moves a quarter of the codes by one."""
    layout = Layout((Segment("a", (1, 4000), 0, 4000, holds="codes", steps=torch.tensor([1.0])),))
    records = Records(0, np.array([[5]], dtype=np.uint64), np.array([[0.25]], dtype=np.float32))
    moves = []
    for rounding in (1, 2):
        theta = torch.zeros(4000)
        rule = rule_of(QuZO, layout, Schedule("constant", 1.0, 9), rounding, eps=3.0, queries=1)
        rule.apply(theta, {}, [records])
        moves.append(theta)
    codes = Rounded(Isotropic("gaussian"), layout, 1).axpy(torch.zeros(4000), 5, 3.0)
    wanted = -0.25 * codes / 3.0
    for theta in moves:
        assert float((theta - wanted).abs().max()) < 1.0
        assert abs(float((theta - wanted).mean())) < 5 * 0.5 / 4000**0.5
    assert 0.05 < float((moves[0] != moves[1]).float().mean()) < 0.6


def test_step_by_step_restored_and_forked_are_the_same_bits() -> None:
    for rule, theta0 in ((rule_of(QuZO, CODES), codes0()), (rule_of(QZO, SCALES), torch.rand(45) * 0.1)):
        steps = given([3, 6, 0, 3, 9])
        fused, walking, other = theta0.clone(), theta0.clone(), torch.zeros_like(theta0)
        rule.apply(fused, rule.init(fused), steps)
        for r in steps[:3]:
            rule.apply(walking, {}, [r])
        data = rule.snapshot(walking, {})
        assert len(data) == 4 * len(theta0) == rule.snapshot_bytes(walking, {})
        rule.restore(other, {}, data)
        local, state = rule.fork({})
        local.apply(other, state, steps[3:])
        rule.apply(walking, {}, steps[3:])
        assert torch.equal(walking, fused) and torch.equal(other, fused)


# -- federated runs

CASES = [
    ("qzo", "scales", "nf4", 1),
    ("qzo", "scales", "int8", 4),
    ("quzo", "codes", "int8", 1),
    ("quzo", "codes", "int8", 4),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        import_bitsandbytes()
    except ImportError:
        pytest.skip("needs bitsandbytes: install fedzo[quantised]")
    return make_data(tmp_path_factory.mktemp("data"))


def settings(optimizer: str, space: str, base: str, local_steps: int) -> dict[str, Any]:
    return {
        "space__kind": space, "model__quantisation": base, "method__optimizer": optimizer,
        "federation__local_steps": local_steps, "method__eps": 1e-3 if space == "scales" else 5e-3,
        "method__learning_rate": 1e-3, "data__clients": 4, "federation__rounds": 2, "evaluation__every": 0,
        "data__limit": 24, "evaluation__limit": 4, "method__batch_size": 2, "method__queries": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("optimizer", "space", "base", "local_steps"), CASES)
def test_a_run_replays_and_late_clients_catch_up(
    tmp_path: Path, data: Path, optimizer: str, space: str, base: str, local_steps: int
) -> None:
    chosen = config(data, **settings(optimizer, space, base, local_steps))
    party = Experiment(chosen)
    with closing(run(tmp_path / "whole", chosen)) as ledger:
        entries, head, theta0 = list(ledger.read()), ledger.head, party.theta0()
        end, middle = party.replica(ledger.spec), party.replica(ledger.spec)
        replay(ledger, end)
        replay(ledger, middle, 1)
        assert len({entry.digest for entry in entries} | {theta_digest(theta0)}) == 3  # every round moved theta
        tail = tuple(RoundRecords(entry.seeds, entry.scalars) for entry in entries)
        snapshot = middle.rule.snapshot(middle.theta, middle.state)
        for missed in (CatchUp("records", 0, 1, tail[:1]), CatchUp("snapshot", 0, 1, snapshot=snapshot)):
            late = party.replica(ledger.spec)
            late.catch_up(missed)
            assert late.digest() == entries[0].digest
            late.catch_up(CatchUp("records", 1, 2, tail[1:]))
            assert late.digest() == end.digest() == entries[1].digest
    if space == "codes":
        assert torch.equal(end.theta, end.theta.round()) and float(end.theta.abs().max()) <= 127
        assert 0.001 < float((end.theta != theta0).float().mean()) < 0.999
    else:
        assert float(end.theta.min()) >= 0.0

    folder = RunFolder.create(tmp_path / "halted", chosen)
    halted = Coordinator(engine.start(folder, party), party.replica(ledger.spec))
    exchange = in_process(party, halted)
    play_round(halted, exchange)
    halted.open_round()  # killed with a round in flight
    halted.ledger.close()
    with closing(engine.run(party, folder)) as resumed:
        assert isinstance(resumed, Ledger) and resumed.head == head


# -- limits

INT8 = {"space.kind": "codes", "model.quantisation": "int8"}


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        (
            {"method.optimizer": "quzo"},
            '"quzo" needs space.kind = "codes", found "full": it moves theta by whole',
        ),
        ({"method.optimizer": "qzo"}, '"qzo" needs space.kind = "scales", found "full": it keeps quantisation scales'),
        (
            INT8,
            '"sgd" needs space.kind = .*, found "codes": codes of a quantised base are whole numbers',
        ),
        ({**INT8, "method.optimizer": "adam"}, '"adam" needs space.kind = .*, found "codes": .* moved by quzo'),
        (
            {**INT8, "method.name": "quzo", "method.weight_decay": 0.1},
            "needs method.weight_decay = 0.0, found 0.1: shr",
        ),
        ({**INT8, "method.name": "quzo", "federation.seeds": "pool"}, 'found "pool": theta is rounded at every step'),
        ({**INT8, "method.optimizer": "quzo", "method.estimator": "forward-gradient"}, "have no derivative"),
        (
            {"space.kind": "scales", "model.quantisation": "nf4", "method.name": "qzo", "federation.seeds": "pool"},
            'found "pool": the projection makes theta no sum over seeds',
        ),
    ],
)
def test_what_is_not_valid_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat(flat)


def test_weight_decay_shrinks_scales() -> None:
    keys = {"space.kind": "scales", "model.quantisation": "nf4", "method.name": "qzo", "method.weight_decay": 0.1}
    assert from_flat(keys).settings()["weight_decay"] == 0.1
    assert OPTIMIZERS["qzo"] is QZO and OPTIMIZERS["quzo"] is QuZO
