"""Private runs on least squares: real coordinator, ledger, workers, noise and budgets, interrupted at every point."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.config import from_flat
from fedzo.errors import ConfigError, LedgerError, ProtocolError, RunError
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Contribution, Plan, decode
from fedzo.federation.spec import RunSpec
from fedzo.federation.worker import Worker
from fedzo.privacy.account import Account, Budget
from fedzo.privacy.accounting import Release, epsilon
from fedzo.privacy.mechanisms import LEVELS, Gaussian, Laplace
from fedzo.privacy.terms import Terms
from fedzo.privacy_report import spent

pytest.importorskip("opendp")
pytest.importorskip("dp_accounting")


def terms(mode: str, **changes: Any) -> Terms:
    values: dict[str, Any] = {
        "mode": mode, "mechanism": "gaussian", "epsilon": 1e3, "delta": 1e-5, "noise_multiplier": 2.0, "clip": 1.0,
        "clipping": "fixed", "quantile": 0.5, "clip_rate": 0.2, "clip_share": 0.05, "sampling": "none", "rate": 1.0,
        "releases": 6, "tolerance": 0, "asked": 4 if mode == "client-secagg" else 0, "levels": LEVELS, "nonce": "n",
    }  # fmt: skip
    return Terms(**{**values, **changes})


def private(mode: str, spec: dict[str, Any] | None = None, **changes: Any) -> RunSpec:
    return tiny.make_spec(privacy=terms(mode, **changes).to_header(), aggregation="uniform", **(spec or {}))


class Nothing(tiny.Rows):
    """A client without examples."""

    def __init__(self) -> None:
        super().__init__(0)
        self.x, self.y = self.x[:0], self.y[:0]


def worker(spec: RunSpec, client: int, folder: Path, data: Any = None) -> Worker:
    assert spec.terms is not None and spec.sanitiser is not None
    account = None
    if not spec.terms.secret:
        release = spec.terms.release(spec.sanitiser.coordinates)
        account = Account(folder / f"{client}.json", spec.run_id, Budget(spec.terms, release))
    return Worker(
        client, tiny.make_replica(spec), tiny.Rows(client) if data is None else data, fingerprint=spec.fingerprint,
        space_hash=spec.space_hash, theta0=spec.theta0, account=account,
    )  # fmt: skip


def server(path: Path, spec: RunSpec) -> tuple[Coordinator, dict[int, Worker]]:
    """A coordinator of a new run, or of the one that is there, with workers whose budgets are in the same folder."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "ledger.sqlite"
    ledger = Ledger(file, write=True) if file.exists() else Ledger.create(file, spec)
    coordinator = Coordinator(ledger, tiny.make_replica(spec))
    workers = {client: worker(spec, client, path) for client in range(spec.clients)}
    for one in workers.values():
        coordinator.admit(one.hello())
    return coordinator, workers


def play(coordinator: Coordinator, workers: dict[int, Worker], stop: int = 10**9) -> int:
    """Rounds to the end, or until so many answers were given; how many were."""
    given_ = 0
    while not coordinator.finished:
        plans = coordinator.open_round()
        while plans:
            again = []
            for plan in plans:
                if given_ == stop:
                    return given_
                data = tiny.answer(workers[plan.client], plan.to_bytes())
                given_ += 1
                again.append(coordinator.receive(plan.client, data))
            plans = [plan for plan in again if plan is not None]
        if holders := coordinator.holders:
            vectors = [workers[client].held for client in holders]
            coordinator.receive_total((holders, np.sum([v for v in vectors if v is not None], axis=0)))
        coordinator.close_round()
    return given_


@settings(max_examples=12, deadline=None)
@given(
    stops=st.lists(st.integers(0, 9), min_size=1, max_size=3), mode=st.sampled_from(["example-local", "client-local"])
)
def test_after_a_crash_anywhere_no_release_is_uncounted(
    stops: list[int], mode: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed after any number of answers, again and again: reported epsilon is never below what was released."""
    path, spec = tmp_path_factory.mktemp("run"), private(mode)
    released = 0
    for stop in [*stops, 10**9]:
        coordinator, workers = server(path, spec)
        released += play(coordinator, workers, stop)
        coordinator.ledger.close()
    with Ledger(path / "ledger.sqlite") as ledger:
        assert ledger.rounds == 6
        accounts = [worker(spec, client, path).account for client in range(4)]
        own = [account.releases for account in accounts if account is not None]
        counted = sum(own)
        assert counted == released  # each answer was charged, and by its client
        assert sum(ledger.charges().values()) >= released
        budgets = path / "budgets" / spec.run_id.hex()
        budgets.mkdir(parents=True)
        for client in range(4):
            (path / f"{client}.json").rename(budgets / f"{client}.json")
        for one in spent(ledger, path / "budgets"):
            assert spec.terms is not None and spec.sanitiser is not None
            release = spec.terms.release(spec.sanitiser.coordinates)
            assert one.epsilon >= epsilon(release, own[one.client or 0], 1e-5) > 0


@pytest.mark.parametrize("mode", ["client-central", "client-secagg"])
def test_a_round_begun_anew_is_charged_anew(mode: str, tmp_path: Path) -> None:
    for _ in range(2):
        coordinator, workers = server(tmp_path, private(mode))
        coordinator.open_round()
        coordinator.ledger.close()
    coordinator, workers = server(tmp_path, private(mode))
    play(coordinator, workers)
    charges = coordinator.ledger.charges()
    assert charges == ({None: 8} if mode == "client-central" else dict.fromkeys(range(4), 8))


def test_who_knows_every_seed_cannot_take_the_noise_away(tmp_path: Path) -> None:
    """The published codes draw the noise from the generator of the direction's seed; ours is none of any seed's."""
    spec = private("example-local", {"queries": 2, "seeds": "shared"})
    coordinator, workers = server(tmp_path, spec)
    plan = coordinator.open_round()[0]
    torch.manual_seed(0), np.random.seed(0)
    first = decode(tiny.answer(workers[0], plan.to_bytes()))
    torch.manual_seed(0), np.random.seed(0)
    second = decode(tiny.answer(workers[0], plan.to_bytes()))
    assert isinstance(first, Contribution) and isinstance(second, Contribution)
    assert not np.array_equal(first.scalars, second.scalars)  # all that a seed decides is the same
    assert spec.sanitiser is not None and spec.terms is not None
    values = np.zeros((2, 0))
    noises = np.array([spec.sanitiser.examples(values, 1.0)[0] for _ in range(50)], dtype=np.float64)
    for seed in (*plan.seeds.ravel().tolist(), spec.seed):
        generator = torch.Generator().manual_seed(seed % 2**63)
        for guess in (
            torch.normal(0.0, 1.0, (50, 2), generator=generator).numpy(),
            np.random.default_rng(seed).normal(size=(50, 2)),
        ):
            left = noises - guess * spec.terms.noise_multiplier / spec.batch_size
            assert left.std() > 0.8 * noises.std()  # a right guess would leave nothing


@pytest.mark.parametrize("mode", ["example-local", "client-local", "client-central", "client-secagg"])
def test_nothing_but_noised_scalars_leaves(mode: str, tmp_path: Path) -> None:
    """Clients without data, losses that are not finite and an evaluation that fails answer like any other."""
    spec = private(mode, {"local_steps": 2})
    coordinator, workers = server(tmp_path, spec)
    plans = {plan.client: plan for plan in coordinator.open_round()}

    def infinite(request: Any) -> torch.Tensor:
        return tiny.losses(request) * float("nan")

    def broken(request: Any) -> torch.Tensor:
        raise ValueError("secret text")

    answers = [tiny.answer(workers[0], plans[0].to_bytes()), tiny.answer(workers[1], plans[1].to_bytes(), infinite)]
    answers.append(tiny.answer(worker(spec, 2, tmp_path, Nothing()), plans[2].to_bytes()))
    for data in answers:
        message = decode(data)
        assert len(data) == len(answers[0]) and type(message) is type(decode(answers[0]))
        if isinstance(message, Contribution):
            assert message.examples is None and message.loss is None and np.isfinite(message.scalars).all()
            if mode.endswith("local"):
                assert (message.scalars != 0).all()
    if mode != "client-central":
        steps = workers[3].round(plans[3])
        next(steps)
        try:
            while True:
                steps.throw(ValueError("secret text"))
        except StopIteration as stop:
            assert len(stop.value.to_bytes()) == len(answers[0])


def test_later_steps_stand_on_noised_scalars(tmp_path: Path) -> None:
    spec = private("client-local", {"local_steps": 3, "schedule": "constant"})
    coordinator, workers = server(tmp_path, spec)
    plan = coordinator.open_round()[0]
    seen: list[torch.Tensor] = []

    def look(request: Any) -> torch.Tensor:
        seen.append(request.theta.clone())
        return tiny.losses(request)

    message = decode(tiny.answer(workers[0], plan.to_bytes(), look))
    assert isinstance(message, Contribution)
    rule, theta = tiny.make_replica(spec).rule, tiny.theta0()
    from fedzo.optimizers import Records

    for k, stood in enumerate(seen):
        assert torch.equal(theta, stood)
        rule.apply(theta, {}, [Records(k, plan.seeds[k : k + 1], message.scalars[k : k + 1])])


def test_a_plan_beyond_the_terms_is_refused(tmp_path: Path) -> None:
    """A server that asks for larger batches would raise the chance of an example beyond what is accounted."""
    spec = private("example-local", sampling="poisson", rate=0.5)
    coordinator, workers = server(tmp_path, spec)
    plan: Plan = coordinator.open_round()[0]
    for changed in (replace(plan, batch_size=6), replace(plan, seeds=plan.seeds[:, :2]), replace(plan, clip=0.0)):
        with pytest.raises(ProtocolError):
            tiny.answer(workers[0], changed.to_bytes())
    assert not (tmp_path / "0.json").exists()


def test_draws_are_not_of_the_seed_and_the_ledger_does_not_tell_them(tmp_path: Path) -> None:
    spec = private("client-central", {"clients": 12, "rounds": 8}, sampling="poisson", rate=0.5, releases=8)
    sets = []
    for name in ("a", "b"):
        coordinator, workers = server(tmp_path / name, spec)
        chosen = []
        while not coordinator.finished:
            plans = coordinator.open_round()
            chosen.append(tuple(plan.client for plan in plans))
            for plan in plans:
                again = coordinator.receive(plan.client, tiny.answer(workers[plan.client], plan.to_bytes()))
                if again is not None:
                    coordinator.receive(plan.client, tiny.answer(workers[plan.client], again.to_bytes()))
            coordinator.close_round()
        sets.append(chosen)
        assert all(entry.clients == () for entry in coordinator.ledger.read())
        for summary in coordinator.ledger.summaries():
            hidden = ("sampled", "accepted", "dropped", "bytes_up", "bytes_down")
            assert [summary[name] for name in hidden] == [None] * 5
        assert set(coordinator.ledger.charges()) == {None}
    assert sets[0] != sets[1]


def test_a_run_ends_before_its_budget_does(tmp_path: Path) -> None:
    release = terms("client-central").release(3)
    limit = epsilon(release, 4, 1e-5) * 1.0001
    spec = private("client-central", epsilon=limit)
    coordinator, workers = server(tmp_path, spec)
    play(coordinator, workers)
    assert coordinator.ledger.rounds == 4 and "budget" in coordinator.ended
    spec = private("client-local", epsilon=limit)
    coordinator, workers = server(tmp_path / "local", spec)
    play(coordinator, workers)
    assert all(one.account is not None and one.account.releases == 4 for one in workers.values())
    assert "0 of 4 clients have privacy budget" in coordinator.ended


def test_accounts_are_kept_and_checked(tmp_path: Path) -> None:
    budget = Budget(terms("client-local", epsilon=5.0), Release("gaussian", 2.0))
    one, other = (Account(tmp_path / "0.json", b"12345678", budget) for _ in range(2))
    most = max(n for n in range(1, 20) if epsilon(budget.release, n, 1e-5) <= 5.0)
    for turn in range(most):  # two processes of one client
        assert (one if turn % 2 else other).charge(1)
    assert not one.charge(1) and not other.charge(1)
    assert Account(tmp_path / "0.json", b"12345678", budget).releases == most
    with pytest.raises(RunError, match="another run"):
        Account(tmp_path / "0.json", b"87654321", budget)
    (tmp_path / "0.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        Account(tmp_path / "0.json", b"12345678", budget)


@settings(max_examples=60, deadline=None)
@given(
    columns=st.lists(
        st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=3, max_size=3), min_size=1, max_size=6
    ),
    bound=st.floats(1e-3, 1e3),
    law=st.sampled_from([Gaussian, Laplace]),
)
def test_no_vector_is_longer_than_the_bound_on_the_grid(columns: Iterable[Any], bound: float, law: Any) -> None:
    values, mechanism = np.array(list(columns), dtype=np.float64).T, law(1.0)
    steps, within = mechanism.clip(values, bound)
    exact = [sum(abs(int(k)) ** mechanism.order for k in column) for column in steps.T]
    assert max(exact) <= LEVELS**mechanism.order
    for column, found, inside in zip(values.T, steps.T, within, strict=True):
        if inside:
            assert np.abs(mechanism.values(found, bound) - column).max() <= bound / LEVELS * 1.01
        if not np.isfinite(column).all():
            assert not found.any() and not inside


def test_the_noise_has_its_law() -> None:
    for law in (Gaussian, Laplace):
        drawn = law(1.5).draw(20_000).astype(np.float64) / LEVELS
        assert abs(drawn.mean()) < 0.1 and drawn.std() == pytest.approx(law(1.5).deviation, rel=0.06)
    share = private("client-secagg", tolerance=1).sanitiser
    assert share is not None
    sums = [sum(share.share(np.zeros((1, 3)), 1.0) for _ in range(3)) for _ in range(1500)]
    assert np.std(sums) / LEVELS == pytest.approx(2.0, rel=0.08)  # with one of four missing


REFUSED = [
    ({"privacy.epsilon": 0.0}, "privacy.epsilon"),
    ({"privacy.delta": 1.0}, "privacy.delta"),
    ({"privacy.delta": 0.0}, "laplace"),
    ({"privacy.mode": "client-central", "privacy.delta": 0.2}, "1 / 10 clients"),
    ({"privacy.clip": 0.0}, "privacy.clip"),
    ({"privacy.sampling_rate": 1.5}, "privacy.sampling_rate"),
    ({"privacy.mode": "client-central", "federation.clients_per_round": 3}, "federation.client_rate instead"),
    ({"privacy.mode": "client-central", "federation.seeds": "independent"}, "federation.seeds"),
    ({"privacy.mode": "client-secagg", "federation.aggregation": "median"}, "federation.aggregation"),
    ({"privacy.mode": "client-secagg", "privacy.mechanism": "laplace"}, "gaussian"),
    ({"method.name": "fzoo"}, "not covered"),
    ({"method.name": "mezo-svrg"}, "not covered"),
    ({"method.clip": 3.0}, "method.clip"),
    ({"space.kind": "sparse", "space.mask": "sensitive"}, "space.calibration"),
]


@pytest.mark.parametrize(("keys", "named"), REFUSED)
def test_what_cannot_be_promised_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        from_flat({"privacy.mode": "example-local", **keys})


def test_refusals_that_need_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small_runs.make_data(tmp_path / "data")
    options = small_runs.options(data, privacy__mode="example-local", privacy__delta=0.2)
    found = small_runs.fedzo("run", *options, "--out", tmp_path / "run")
    assert found.code == 2 and "1 / 12 examples" in found.err and not (tmp_path / "run").exists()
    monkeypatch.setattr("fedzo.privacy.mechanisms.importlib.util.find_spec", lambda name: None)
    options = small_runs.options(data, privacy__mode="example-local", privacy__delta=1e-3)
    found = small_runs.fedzo("run", *options, "--out", tmp_path / "run")
    assert found.code == 2 and "opendp" in found.err and not (tmp_path / "run").exists()


def test_the_command_line_tells_and_resumes_only_the_same_terms(tmp_path: Path) -> None:
    data = small_runs.make_data(tmp_path / "data")
    options = small_runs.options(
        data, privacy__mode="example-local", privacy__delta=1e-3, privacy__epsilon=6.0, federation__rounds=2
    )
    found = small_runs.fedzo("run", "-q", *options, "--out", tmp_path / "run")
    assert found.code == 0 and "example-local" in found.out and "epsilon spent" in found.out
    told = small_runs.fedzo("privacy", "report", tmp_path / "run")
    assert told.code == 0 and "differential privacy" in told.out and "the client" in told.out
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("epsilon = 6.0", "epsilon = 7.0"))
    found = small_runs.fedzo("resume", tmp_path / "run")
    assert found.code == 1 and "other privacy terms" in found.err and "privacy.epsilon" in found.err
    planned = small_runs.fedzo("privacy", "plan", "--rounds", 10, "--sampling-rate", 0.1, "--units", 100, "--json")
    assert planned.code == 0 and '"scalar_error"' in planned.out
    assert small_runs.fedzo("privacy", "plan", "--rounds", 10, "--epsilon", -1).code == 2
    tuned = small_runs.fedzo("tune", path, "--budget", 1, "--out", tmp_path / "tuned.toml")
    assert tuned.code != 0 and "public data" in tuned.err


def test_a_damaged_header_is_refused() -> None:
    with pytest.raises(LedgerError, match="privacy terms"):
        Terms.from_header({"mode": "example-local"})
