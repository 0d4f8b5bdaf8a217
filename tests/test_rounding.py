"""Stochastic rounding of a bfloat16 theta: the formula in numpy, both implementations, unbiasedness, special values."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import small_runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedzo import directions, engine
from fedzo.directions import FAMILIES, numba_cpu, philox, reference
from fedzo.errors import DivergedError, SpaceError
from fedzo.experiment import Experiment
from fedzo.federation.artifact import pack_values, unpack_values
from fedzo.federation.coordinator import Coordinator, RoundSummary, replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import CatchUp
from fedzo.federation.replica import Replica, theta_digest
from fedzo.models import load_model
from fedzo.optimizers import Records
from fedzo.report import verify
from fedzo.run_folder import RunFolder
from fedzo.spaces import draw_mask, full, sparse

RNG = np.random.default_rng(3)
offsets = st.one_of(st.integers(0, 300), st.integers(2**40 - 300, 2**40 + 300), st.integers(0, 2**61))
sizes = st.one_of(st.integers(0, 70), st.integers(0, 10_000))


def tiny_opt() -> nn.Module:
    from transformers import AutoModelForCausalLM, OPTConfig

    torch.manual_seed(0)
    config = OPTConfig(
        num_hidden_layers=2, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=2, vocab_size=97
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def bits(theta: Tensor) -> npt.NDArray[np.uint16]:
    return theta.view(torch.uint16).numpy()


def some_theta(size: int, seed: int = 0) -> Tensor:
    """Values over many binades, subnormal ones, both zeros, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    theta = torch.from_numpy(rng.standard_normal(size) * 10.0 ** rng.integers(-8, 3, size)).to(torch.bfloat16)
    raw = bits(theta)
    raw[5::13] = rng.integers(0, 0x80, len(raw[5::13])) | 0x8000 * rng.integers(0, 2, len(raw[5::13]))  # subnormal
    raw[6::97] = 0x7F7F  # the largest finite value
    raw[7::101], raw[8::101], raw[9::101] = 0x7F80, 0xFF80, 0xFFC1
    return theta


def some_steps(steps: int, width: int, scale: float = 1e-3) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
    seeds = RNG.integers(0, 2**64, (steps, width), dtype=np.uint64)
    return seeds, (RNG.standard_normal((steps, width)) * scale).astype(np.float32)


def streams(steps: int) -> npt.NDArray[np.uint64]:
    return RNG.integers(0, 2**64, steps, dtype=np.uint64)


def formula(
    theta: Tensor,
    seeds: npt.NDArray[np.uint64],
    coefficients: npt.NDArray[np.float32],
    family: str,
    rounding: npt.NDArray[np.uint64],
    offset: int = 0,
) -> npt.NDArray[np.uint16]:
    """The definition, in numpy's integers and float32."""
    values = (bits(theta).astype(np.uint32) << np.uint32(16)).view(np.float32)
    size = len(values)
    for step in range(len(seeds)):
        for seed, c in zip(seeds[step].tolist(), coefficients[step], strict=True):
            z = directions.fill(torch.empty(size), seed, family, offset=offset).numpy()
            with np.errstate(over="ignore", invalid="ignore"):
                values = values + c * z
        words = philox.words(int(rounding[step]), 4 * (size // 8 + 2), offset // 8)
        halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), axis=1).reshape(-1)
        raw = values.view(np.uint32)
        rounded = np.where(np.isfinite(values), raw + halves[offset % 8 :][:size], raw) & np.uint32(0xFFFF0000)
        values = np.where(np.isnan(values), np.uint32(0x7FC00000), rounded).view(np.float32)
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@settings(deadline=None, max_examples=60)
@given(
    size=sizes,
    offset=offsets,
    steps=st.integers(1, 3),
    width=st.integers(0, 3),
    family=st.sampled_from(FAMILIES),
    scale=st.sampled_from([1e-38, 1e-3, 1.0, 1e38]),
)
def test_both_implementations_are_the_formula(
    size: int, offset: int, steps: int, width: int, family: str, scale: float
) -> None:
    theta, rounding = some_theta(size), streams(steps)
    seeds, coefficients = some_steps(steps, width, scale)
    coefficients = np.nan_to_num(coefficients, posinf=3e38, neginf=-3e38)
    wanted = formula(theta, seeds, coefficients, family, rounding, offset)
    for implementation in (numba_cpu, reference):
        found = implementation.replay_rounded(theta.clone(), seeds, coefficients, family, rounding, offset=offset)
        assert (bits(found) == wanted).all(), implementation.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_stepwise_in_parts_and_on_any_threads(family: str, restore_threads: None) -> None:
    size = 2 * numba_cpu.CHUNK + 17
    theta, (seeds, coefficients), rounding = some_theta(size), some_steps(4, 2), streams(4)
    torch.set_num_threads(1)
    fused = directions.replay_rounded(theta.clone(), seeds, coefficients, family, rounding)
    torch.set_num_threads(3)
    threaded = directions.replay_rounded(theta.clone(), seeds, coefficients, family, rounding)
    stepwise, parts = theta.clone(), theta.clone()
    for s in range(4):
        one = slice(s, s + 1)
        directions.replay_rounded(stepwise, seeds[one], coefficients[one], family, rounding[one])
    for start, stop in [(0, 1), (1, 1000), (1000, 300_001), (300_001, size)]:
        directions.replay_rounded(parts[start:stop], seeds, coefficients, family, rounding, offset=start)
    for other in (threaded, stepwise, parts):
        assert (bits(other) == bits(fused)).all()


def test_rounding_is_unbiased_where_plain_rounding_swallows_everything() -> None:
    """A step of a tenth of the gap to the next bfloat16 value: on average it is taken, either sign, to 5 sigma."""
    size, count = 256, 4000
    theta = torch.from_numpy(np.random.default_rng(0).uniform(1.0, 1.9, size)).to(torch.bfloat16)
    theta[::2] *= -1
    gap, c = 2.0**-7, np.full((1, 1), 0.1 * 2.0**-7, np.float32)
    seed = np.array([[7]], np.uint64)
    wanted = directions.axpy(theta.float(), 7, float(c[0, 0]), "rademacher")
    assert torch.equal(wanted.to(torch.bfloat16), theta)
    total = torch.zeros(size, dtype=torch.float64)
    for stream in range(count):
        moved = directions.replay_rounded(theta.clone(), seed, c, "rademacher", np.array([stream], np.uint64))
        assert ((moved.float() - wanted).abs() < gap).all()
        total += moved.double()
    sigma = gap * (0.1 * 0.9 / count) ** 0.5
    error = total / count - wanted.double()
    assert error.abs().max() < 5 * sigma
    assert abs(float(error.mean())) < 5 * sigma / size**0.5


def test_values_that_bfloat16_holds_stay() -> None:
    theta = some_theta(5000)
    theta = theta[~theta.isnan()].contiguous()
    none = np.empty((3, 0), np.uint64), np.empty((3, 0), np.float32)
    assert (bits(directions.replay_rounded(theta.clone(), *none, "rademacher", streams(3))) == bits(theta)).all()
    zero = np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.float32)  # -0 + 0 is 0
    assert torch.equal(directions.replay_rounded(theta.clone(), *zero, "gaussian", streams(1)), theta)


def test_special_values() -> None:
    raw = np.array([0x7F80, 0xFF80, 0x7FC0, 0xFF81, 0x7FFF, 0x7F7F, 0x0001, 0x8001, 0x0000], np.uint16)
    theta = torch.from_numpy(raw.copy()).view(torch.bfloat16)
    tiny = np.full((1, 1), 1e-45, np.float32)
    for implementation in (numba_cpu, reference):
        seen: list[set[int]] = [set() for _ in raw]
        for stream in range(300):
            rounding = np.array([stream], np.uint64)
            moved = implementation.replay_rounded(
                theta.clone(), np.ones((1, 1), np.uint64), tiny, "rademacher", rounding
            )
            for place, value in enumerate(bits(moved).tolist()):
                seen[place].add(value)
        assert seen[:5] == [{0x7F80}, {0xFF80}, {0x7FC0}, {0x7FC0}, {0x7FC0}]
        assert seen[5] == {0x7F7F}  # a tiny step is lost in float32, and nothing is cut off
        assert all(value <= {0, 1, 2, 0x8000, 0x8001, 0x8002} for value in seen[6:])
    huge = np.full((1, 64), 2e36, np.float32)  # beyond half the gap of the largest values: some become infinite
    theta = torch.full((4096,), 3.3895314e38).to(torch.bfloat16)
    moved = directions.replay_rounded(theta, np.zeros((1, 64), np.uint64), huge, "rademacher", streams(1))
    assert set(bits(moved).tolist()) <= set(range(0x7F00, 0x7F81)) and moved.isinf().any() and not moved.isnan().any()


def test_bad_arguments_change_nothing() -> None:
    theta, (seeds, coefficients), rounding = some_theta(9), some_steps(2, 3), streams(2)
    before = bits(theta).copy()
    for arguments, message in [
        ((theta.float(), seeds, coefficients, "rademacher", rounding), "must be torch.bfloat16"),
        ((theta, seeds[0], coefficients[0], "rademacher", rounding), "must be 2-D of one shape"),
        ((theta, seeds, coefficients, "rademacher", rounding[:1]), r"must be uint64 of shape \(2,\)"),
        ((theta, seeds, coefficients, "rademacher", rounding.astype(np.int64)), "rounding is int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            directions.replay_rounded(*arguments)
    coefficients[1, 1] = np.inf
    with pytest.raises(DivergedError, match="coefficient 4 of 6 is inf"):
        directions.replay_rounded(theta, seeds, coefficients, "rademacher", rounding)
    assert (bits(theta) == before).all()


# A replica with a bfloat16 theta


def test_digest_of_a_replica_fused_step_by_step_and_from_a_snapshot(tmp_path: Path) -> None:
    def load() -> Tensor:
        return tiny.theta0().to(torch.bfloat16)

    spec = tiny.make_spec(theta_dtype="bfloat16", local_steps=2, theta0=theta_digest(load()).hex())
    records = [Records(2 * i, *some_steps(2, 3, 0.1)) for i in range(6)]
    fused, stepwise, other = (Replica(spec, load) for _ in range(3))
    assert fused.digest() == hashlib.sha256(bits(load()).astype("<u2").tobytes()).digest()
    fused.apply(records)
    for entry in records:
        stepwise.apply([entry])
    assert stepwise.digest() == fused.digest() != other.digest()
    snapshot = fused.rule.snapshot(fused.theta, fused.state)
    other.catch_up(CatchUp("snapshot", 0, 6, snapshot=snapshot))
    assert other.digest() == fused.digest() and len(snapshot) == 2 * spec.size
    fused.reset()
    assert fused.digest().hex() == spec.theta0


def test_initial_values_cross_in_bfloat16() -> None:
    theta, other = tiny.theta0().to(torch.bfloat16), tiny.other_theta0().to(torch.bfloat16)
    unpack_values(pack_values(theta, [(tiny.SIZE - 4, 4)]), other)
    assert torch.equal(theta, other)


# theta as the model's own weights


def test_adopted_parameters_are_theta() -> None:
    model = tiny_opt()
    space = full(model, exclude=("*layer_norm*",))
    wanted = space.theta0(model, torch.bfloat16)
    theta = space.adopt(model, torch.bfloat16)
    assert theta.dtype == torch.bfloat16 and torch.equal(theta, wanted)
    parameters = space.parameters(model)
    start, size = theta.data_ptr(), theta.numel() * theta.element_size()
    for parameter in parameters.values():
        assert parameter.dtype == torch.bfloat16 and start <= parameter.data_ptr() < start + size
    assert {p.dtype for name, p in model.named_parameters() if name not in parameters} == {torch.float32}
    found = space.bound(model)
    assert found is not None and found.data_ptr() == start and torch.equal(found, theta)
    assert full(model).bound(model) is None and full(tiny_opt()).bound(tiny_opt()) is None
    theta.zero_()
    assert not any(parameter.any() for parameter in parameters.values())
    assert torch.equal(space.read(model, torch.bfloat16), theta)


def test_other_spaces_keep_float32() -> None:
    model = tiny_opt()
    space = sparse(model, draw_mask(model, 0.1, "random", "base"))
    with pytest.raises(SpaceError, match="wants a contiguous float32 vector"):
        space.check(torch.zeros(space.size, dtype=torch.bfloat16))
    with pytest.raises(SpaceError, match="is trained in part and cannot become a view"):
        space.adopt(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# whole runs on the embedded model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.make_data(tmp_path_factory.mktemp("data"))


def test_run_replay_and_export(tmp_path: Path, data: Path) -> None:
    chosen = small_runs.config(data, space__theta_dtype="bfloat16", method__learning_rate=1e-2)
    with small_runs.run(tmp_path / "run", chosen) as ledger:
        entries = list(ledger.read())
        assert ledger.spec.theta_dtype == "bfloat16" and len({entry.digest for entry in entries}) == 3
        assert verify(ledger, Experiment(chosen)) == 3
        experiment = Experiment(chosen)
        replica = experiment.replica(ledger.spec)
        replay(ledger, replica)
        assert replica.digest() == entries[-1].digest
        weights = replica.theta
        assert experiment.space.bound(experiment.loaded.model).data_ptr() == weights.data_ptr()
        assert theta_digest(experiment.replica(ledger.spec).theta).hex() == ledger.spec.theta0  # the same memory, reset
        assert experiment.theta0().data_ptr() == weights.data_ptr() and replica.theta.numel() == 0
        rounded = Experiment(small_runs.config(data)).theta0().to(torch.bfloat16)
        assert torch.equal(experiment.theta0(), rounded)
    answer = small_runs.fedzo("replay", tmp_path / "run", "--out", tmp_path / "model", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["theta_digest"] == entries[-1].digest.hex()
    loaded = load_model(str(tmp_path / "model"), "causal").model
    moved = experiment.replica(ledger.spec)
    with Ledger(tmp_path / "run" / "ledger.sqlite") as again:
        replay(again, moved)
    assert torch.equal(experiment.space.theta0(loaded, torch.bfloat16), moved.theta)


def test_kill_and_resume_is_the_whole_run(tmp_path: Path, data: Path) -> None:
    chosen = small_runs.config(data, space__theta_dtype="bfloat16", method__learning_rate=1e-2)

    class KilledError(Exception):
        pass

    class Stop:
        def round(self, summary: RoundSummary) -> None:
            if summary.round == 0:
                raise KilledError

        def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None: ...

    folder = RunFolder.create(tmp_path / "cut", chosen)
    with pytest.raises(KilledError):
        engine.run(Experiment(chosen), folder, [Stop()])
    with engine.run(Experiment(chosen), folder) as cut, small_runs.run(tmp_path / "whole", chosen) as whole:
        assert cut.head == whole.head


@pytest.mark.parametrize("steps", [1, 2])
def test_sharing_the_weights_changes_nothing(tmp_path: Path, data: Path, steps: int) -> None:
    """Server and workers over one theta, and over a theta and model each."""
    chosen = small_runs.config(
        data, space__theta_dtype="bfloat16", method__learning_rate=1e-2, federation__local_steps=steps,
        federation__clients_per_round=2,
    )  # fmt: skip

    def apart(experiment: Experiment, coordinator: Coordinator) -> engine.Transport:
        other = Experiment(chosen)
        replica = other.replica(coordinator.spec)
        workers = {number: other.worker(number, replica) for number in range(coordinator.spec.clients)}
        for worker in workers.values():
            coordinator.admit(worker.hello())
        return engine.Transport(
            lambda parcels: [(n, engine.answer(workers[n], other.evaluator, plan)) for n, plan in parcels]
        )

    with small_runs.run(tmp_path / "shared", chosen) as shared:
        folder = RunFolder.create(tmp_path / "apart", chosen)
        with engine.run(Experiment(chosen), folder, connect=apart) as separate:
            assert separate.head == shared.head
