"""Workers, coordinator and ledger of private runs against attackers: what each may send, must refuse, must not tell.

`test_private_runs.py` plays whole runs; here single parties are given what a hostile, broken or curious other one gives
them. Noise and draws cannot be seeded: what is asked of them holds but for a chance of less than 1e-6.
"""

import dataclasses
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_runs import config, fedzo, make_data, options, run
from tiny import (
    SIZE,
    Federation,
    Rows,
    answer,
    losses,
    make_account,
    make_replica,
    make_spec,
    make_terms,
    make_worker,
    private_spec,
    respond,
    rounds_of,
    start,
    theta0,
)
from torch import Tensor

from fedzo import engine
from fedzo.errors import LedgerError, ProtocolError, RunError
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Contribution, Failure, Held, Plan, decode
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.optimizers import Records
from fedzo.privacy import sampling
from fedzo.privacy.accounting import epsilon
from fedzo.privacy.mechanisms import LEVELS, MECHANISMS, Ints, Mechanism
from fedzo.privacy.terms import Terms
from fedzo.privacy_report import privacy_figures, spent
from fedzo.run_folder import BUDGETS

pytest.importorskip("opendp")
pytest.importorskip("dp_accounting")

MODES = ["example-local", "client-central", "client-local", "client-secagg"]
LOCAL = ["example-local", "client-local"]
OWN = ["example-local", "client-local", "client-secagg"]  # modes in which a client keeps a budget
PROGRAM = [sys.executable, "-c", "from fedzo.cli import main; main()"]


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ints]]:
    """The real code with noise of 0; what was released, in grid steps."""
    released: list[Ints] = []

    def hushed(law: type[Mechanism]) -> type[Mechanism]:
        class Silent(law):
            def _draw(self, count: int, scale: float) -> list[int]:
                return [0] * count

            def values(self, steps: Ints, bound: float) -> npt.NDArray[np.float64]:
                released.append(steps.copy())
                return super().values(steps, bound)

        return Silent

    for name, law in list(MECHANISMS.items()):
        monkeypatch.setitem(MECHANISMS, name, hushed(law))
    yield released


def contribution(data: bytes) -> Contribution:
    message = decode(data)
    assert isinstance(message, Contribution)
    return message


def plan_of(spec: RunSpec, client: int = 0, path: Path | None = None) -> Plan:
    """The first plan of a client."""
    from tempfile import mkdtemp

    made = start(path or Path(mkdtemp()), spec)
    plans = {plan.client: plan for plan in made.coordinator.open_round()}
    made.ledger.close()
    return plans[client]


def fixed(value: float) -> Callable[[Any], Tensor]:
    """An evaluation that finds the same loss everywhere."""
    return lambda request: torch.full_like(respond(request), value)


# -- the worker: what it releases


@pytest.mark.parametrize("rule", ["sgd", "adam", "momentum"])
def test_steps_over_examples_move_by_released_scalars_only(rule: str, tmp_path: Path) -> None:
    """Else theta of a later step, and with it the later scalars, would hold what was never noised."""
    settings = {
        "adam": {"beta1": 0.9, "beta2": 0.99, "adam_eps": 1e-8},
        "momentum": {"momentum": 0.9, "nesterov": False},
    }
    spec = private_spec(
        make_terms("example-local"), local_steps=4, batch_size=64, optimizer=rule, settings=settings.get(rule, {})
    )  # of 8 examples each is drawn for certain
    seen: list[Tensor] = []

    def watched(request: Any) -> Tensor:
        seen.append(request.theta.clone())
        return losses(request)

    plan = plan_of(spec)
    sent = contribution(answer(make_worker(spec, 0, None, tmp_path), plan.to_bytes(), watched))
    assert len(seen) == 4 and (sent.scalars != 0).all()
    twin = make_replica(spec)
    state = twin.state
    for k, stood in enumerate(seen):
        assert torch.equal(twin.theta, stood)
        state = twin.rule.apply(twin.theta, state, [Records(k, plan.seeds[k : k + 1], sent.scalars[k : k + 1])])


def test_a_worker_s_replica_never_holds_what_it_did_not_release(tmp_path: Path) -> None:
    for mode in MODES:
        spec = private_spec(make_terms(mode), local_steps=3)
        worker = make_worker(spec, 0, None, tmp_path / mode)
        answer(worker, plan_of(spec).to_bytes())
        assert worker.replica.digest().hex() == spec.theta0 and torch.equal(worker.replica.theta, theta0())


@pytest.mark.parametrize("loss", [0.0, 2.5])
def test_an_answer_does_not_tell_how_many_examples_there_are(loss: float, tmp_path: Path, no_noise: list[Ints]) -> None:
    """Byte for byte, where noise and scalars are 0: neither their number nor their loss is in it."""
    for mode in MODES:
        spec = private_spec(make_terms(mode, clipping="adaptive"), local_steps=2)
        plan = plan_of(spec).to_bytes()
        told = set()
        for count in (0, 1, 3, 50):
            if mode == "example-local" and count:
                continue  # there the count of adaptive clipping is of the examples drawn: noise hides it
            worker = make_worker(spec, 0, None, tmp_path / f"{mode}-{count}", Rows(0, SIZE, count))
            told.add(answer(worker, plan, fixed(loss)))
            assert worker.hello().examples == 0
        assert len(told) == 1
    spec = private_spec(make_terms("example-local"))
    workers = [make_worker(spec, 0, None, tmp_path / str(n), Rows(0, SIZE, n)) for n in (0, 2, 40)]
    assert len({answer(worker, plan_of(spec).to_bytes(), fixed(loss)) for worker in workers}) == 1


@pytest.mark.parametrize("mode", ["example-local", "client-central", "client-local"])
def test_each_byte_of_an_answer_is_accounted_for(mode: str, tmp_path: Path) -> None:
    spec = private_spec(make_terms(mode, clipping="adaptive"), local_steps=2, queries=3)
    plan = plan_of(spec)
    data = answer(make_worker(spec, 0, None, tmp_path), plan.to_bytes())
    counts = 2 if mode in LOCAL else 1
    head = struct.pack("<2sBB8sIIHHH", b"fz", PROTOCOL, 6, spec.run_id, 0, 0, 2, 3, counts)
    seeds, message = plan.seeds.astype("<u8").tobytes(), contribution(data)
    assert message.counts is not None and message.counts.size == counts
    assert data == head + message.counts.tobytes() + seeds + message.scalars.tobytes()
    assert len(data) == 26 + 4 * counts + 12 * 6


def raises(request: Any) -> Tensor:
    raise RuntimeError("the text of an example")


def one_spoilt(request: Any) -> Tensor:
    found = respond(request)
    found[..., 0] = float("nan")
    return found


FAULTS: dict[str, Callable[[Any], Tensor]] = {
    "not a number": fixed(float("nan")),
    "infinite": fixed(float("inf")),
    "beyond float32": fixed(3e38),
    "one example not a number": one_spoilt,
    "an error": raises,
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("local_steps", [1, 3])
def test_a_fault_is_answered_like_any_other_plan(mode: str, fault: str, local_steps: int, tmp_path: Path) -> None:
    """An answer that is missing, shorter or of another kind where one example spoils a loss would tell of it."""
    if mode == "client-central" and fault == "an error":
        return  # there the server is trusted, and an error is its to see
    spec = private_spec(make_terms(mode), local_steps=local_steps, batch_size=64)
    plan = plan_of(spec).to_bytes()
    usual = answer(make_worker(spec, 0, None, tmp_path / "usual"), plan)
    worker = make_worker(spec, 0, None, tmp_path / "fault")
    found = answer(worker, plan, FAULTS[fault])
    assert len(found) == len(usual) and type(decode(found)) is type(decode(usual))
    assert b"example" not in found
    if mode in LOCAL:
        scalars = contribution(found).scalars
        assert np.isfinite(scalars).all() and (scalars != 0).all()  # noise, as ever
    elif mode == "client-secagg":
        assert worker.held is not None and worker.held.all()


@pytest.mark.parametrize("mode", LOCAL)
def test_an_error_of_a_later_step_is_covered_too(mode: str, tmp_path: Path) -> None:
    spec = private_spec(make_terms(mode), local_steps=3, batch_size=64)
    calls = 0

    def at_last(request: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return raises(request) if calls > 1 else losses(request)

    sent = contribution(answer(make_worker(spec, 0, None, tmp_path), plan_of(spec).to_bytes(), at_last))
    assert (sent.scalars != 0).all() and calls == 3


def test_an_error_s_text_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = private_spec(make_terms("client-local"))
    answer(make_worker(spec, 0, None, tmp_path), plan_of(spec).to_bytes(), raises)
    assert "RuntimeError" in caplog.text and "example" not in caplog.text


@pytest.mark.parametrize("mode", MODES)
def test_empty_draws_and_clients_without_data(mode: str, tmp_path: Path) -> None:
    spec = private_spec(make_terms(mode), batch_size=1)
    worker = make_worker(spec, 0, None, tmp_path, Rows(0, SIZE, 0))
    data = answer(worker, plan_of(spec).to_bytes(), raises)  # nothing is asked
    full = answer(make_worker(spec, 0, None, tmp_path / "full"), plan_of(spec).to_bytes())
    assert len(data) == len(full) and type(decode(data)) is type(decode(full))
    if mode in LOCAL:
        assert (contribution(data).scalars != 0).all()


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("mode", ["client-local", "client-central", "client-secagg"])
def test_a_choice_is_clipped_after_it_was_made(
    mode: str, local_steps: int, tmp_path: Path, no_noise: list[Ints]
) -> None:
    """The choice of conservative steps multiplies scalars by +1, 0 or -1 as the un-noised loss says: it is a part of
    what a client gives, and bounded with it."""
    spec = private_spec(make_terms(mode, clip=1e-3), local_steps=local_steps, optimizer="conservative")
    for client in range(4):
        worker = make_worker(spec, client, None, tmp_path)
        answer(worker, plan_of(spec, client).to_bytes())
        vectors = no_noise if mode != "client-secagg" else [worker.held]
        assert vectors and any(vector.any() for vector in vectors)
        assert all((vector.astype(object) ** 2).sum() <= LEVELS**2 for vector in vectors)
        no_noise.clear()


def test_a_choice_is_noised(tmp_path: Path) -> None:
    """A step that is taken back is all zeros before the noise, and may not be after it."""
    spec = private_spec(make_terms("client-local"), local_steps=3, optimizer="conservative")
    sent = contribution(answer(make_worker(spec, 0, None, tmp_path), plan_of(spec).to_bytes(), fixed(1.0)))
    assert (sent.scalars != 0).all() and len(set(np.abs(sent.scalars.ravel()).tolist())) == 9


@pytest.mark.parametrize("mode", MODES)
def test_second_scalars_are_clipped_with_the_first(mode: str, tmp_path: Path, no_noise: list[Ints]) -> None:
    """HiZOO sends a curvature beside each projected gradient: one vector, one bound."""
    spec = private_spec(
        make_terms(mode, clip=1e-3), estimator="hizoo", optimizer="hizoo", family="gaussian",
        settings={"smoothing": 1e-3, "weight_decay": 0.0}, queries=2, batch_size=1,
    )  # fmt: skip
    assert spec.sanitiser is not None and spec.sanitiser.coordinates == 4
    for _ in range(4):  # batches of about one example
        no_noise.clear()
        worker = make_worker(spec, 0, None, tmp_path, Rows(0, SIZE, 1))
        data = answer(worker, plan_of(spec).to_bytes())
        vector = worker.held if mode == "client-secagg" else no_noise[-1]
        assert vector is not None and vector.size == 4 and vector.all()
        assert LEVELS**2 * 0.99 < (vector.astype(object) ** 2).sum() <= LEVELS**2
        if mode != "client-secagg":
            assert contribution(data).scalars.shape == (1, 4)


def test_second_scalars_are_noised(tmp_path: Path) -> None:
    spec = private_spec(
        make_terms("example-local"), estimator="hizoo", optimizer="hizoo", family="gaussian", queries=2,
        settings={"smoothing": 1e-3, "weight_decay": 0.0},
    )  # fmt: skip
    plan = plan_of(spec).to_bytes()
    sent = [contribution(answer(make_worker(spec, 0, None, tmp_path), plan, fixed(1.0))).scalars for _ in range(2)]
    assert (sent[0] != sent[1]).all() and all(one.all() for one in sent)


# -- the worker: what it refuses


REFUSED_PLANS: dict[str, Callable[[Plan], Plan]] = {
    "no bound": lambda plan: dataclasses.replace(plan, clip=0.0),
    "a negative bound": lambda plan: dataclasses.replace(plan, clip=-1.0),
    "a bound that is no number": lambda plan: dataclasses.replace(plan, clip=float("nan")),
    "an infinite bound": lambda plan: dataclasses.replace(plan, clip=float("inf")),
    "a larger batch": lambda plan: dataclasses.replace(plan, batch_size=plan.batch_size + 1),
    "a batch of none": lambda plan: dataclasses.replace(plan, batch_size=0),
    "more steps": lambda plan: dataclasses.replace(plan, seeds=np.repeat(plan.seeds, 2, axis=0)),
    "fewer steps": lambda plan: dataclasses.replace(plan, seeds=plan.seeds[:1]),
    "more queries": lambda plan: dataclasses.replace(plan, seeds=np.repeat(plan.seeds, 2, axis=1)),
}


@pytest.mark.parametrize("name", list(REFUSED_PLANS))
@pytest.mark.parametrize("mode", MODES)
def test_a_plan_that_the_budget_does_not_count_on_is_refused(mode: str, name: str, tmp_path: Path) -> None:
    spec = private_spec(make_terms(mode), local_steps=2)
    worker = make_worker(spec, 0, None, tmp_path)
    with pytest.raises(ProtocolError, match=r"clipping bound|steps, queries and batch size"):
        next(worker.round(REFUSED_PLANS[name](plan_of(spec))))
    assert worker.account is None or worker.account.releases == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("clip", [1e-310, 1e-305, 1e-170, 1e300])
@pytest.mark.parametrize("mode", LOCAL)
def test_no_bound_and_eps_of_a_plan_make_scalars_outshout_the_noise(mode: str, clip: float, tmp_path: Path) -> None:
    """A hostile server's eps of 1e-30 makes every difference 0; at its bound of 1e-310 each 0 became -2^63 grid steps,
    and all signs of what was released were negative, if there was an example, and random if there was none."""
    spec = private_spec(make_terms(mode), queries=60, batch_size=64)
    plan = dataclasses.replace(plan_of(spec), clip=clip, eps=1e-30)
    sent = contribution(answer(make_worker(spec, 0, None, tmp_path, Rows(0, SIZE, 1)), plan.to_bytes()))
    assert 0 < int(np.signbit(sent.scalars).sum()) < 60


@pytest.mark.parametrize(
    "change",
    [
        {"estimator": "fzoo"},
        {"estimator": "svrg", "optimizer": "svrg", "settings": {"anchor_every": 2, "anchor_rate": 1.0}},
        {"optimizer": "conservative"},
        {"settings": {"first_order": "head", "first_order_optimizer": "sgd", "first_order_rate": 1e-3}},
    ],
    ids=["fzoo", "svrg", "conservative", "hybrid"],
)
def test_a_header_whose_method_its_mode_does_not_cover_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """The configuration refuses it, and a hostile server writes the header without one: svrg takes all examples at its
    anchors where the account counts on a draw; fzoo divides all scalars by what one example may move."""
    spec = private_spec(make_terms("example-local"), **change)
    with pytest.raises(ProtocolError, match="not covered"):
        make_worker(spec, 0, None, tmp_path)


def test_a_worker_without_a_budget_is_none(tmp_path: Path) -> None:
    for mode in OWN:
        with pytest.raises(ProtocolError, match=f'privacy.mode = "{mode}" needs a budget of the client'):
            make_worker(private_spec(make_terms(mode)), 0)
    assert make_worker(private_spec(make_terms("client-central")), 0).account is None


@pytest.mark.parametrize("mode", OWN)
def test_the_budget_is_written_before_a_loss_is_asked_for(mode: str, tmp_path: Path) -> None:
    spec = private_spec(make_terms(mode), local_steps=3)
    worker = make_worker(spec, 0, None, tmp_path)
    wanted = 3 if mode == "example-local" else 1
    steps = worker.round(plan_of(spec))
    next(steps)
    assert json.loads((tmp_path / "0.json").read_text())["releases"] == wanted
    steps.close()  # the process dies here
    assert make_account(spec, 0, tmp_path, 8).releases == wanted


@pytest.mark.parametrize("mode", OWN)
def test_beyond_its_budget_a_client_says_so_and_nothing_else(mode: str, tmp_path: Path) -> None:
    spec = private_spec(with_budget(make_terms(mode), 2), batch_size=64)
    plan = plan_of(spec)
    asked: list[Any] = []

    def watched(request: Any) -> Tensor:
        asked.append(request)
        return losses(request)

    found = [
        decode(answer(make_worker(spec, 0, None, tmp_path), plan.to_bytes(), watched)) for _ in range(4)
    ]  # the same plan, asked again and again, by a server that forgets
    assert [isinstance(one, Failure) for one in found] == [False, False, True, True]
    assert isinstance(found[2], Failure) and found[2].reason == "budget" and len(asked) == 2


def with_budget(terms: Terms, releases: int, coordinates: int = 3, rate: float = 1.0) -> Terms:
    """With the epsilon of exactly so many releases."""
    release = terms.release(coordinates, rate)
    return dataclasses.replace(terms, epsilon=epsilon(release, releases, terms.delta) * 1.0001, releases=releases)


# -- draws


def drawn_rows(spec: RunSpec, path: Path, rows: Rows, rounds: int) -> list[list[int]]:
    """The examples of each round's batches."""
    found: list[list[int]] = []
    worker = make_worker(spec, 0, None, path, rows)
    taken = rows.batch

    def watched(indices: npt.NDArray[np.int64]) -> Any:
        found[-1] += indices.tolist()
        return taken(indices)

    rows.batch = watched
    plan = plan_of(spec)
    for _ in range(rounds):
        found.append([])
        answer(worker, plan.to_bytes())
    return found


@pytest.mark.parametrize("kind", ["poisson", "fixed"])
def test_batches_are_not_a_function_of_the_seed(kind: str, tmp_path: Path) -> None:
    """Who knows the seed would know who took part, and there would be no amplification to count on."""
    rounds = 120
    spec = private_spec(make_terms("example-local", sampling=kind, rate=0.25, releases=rounds), batch_size=10)
    first, second = (drawn_rows(spec, tmp_path / name, Rows(0, SIZE, 40), rounds) for name in "ab")
    assert first[:3] != second[:3] and len({tuple(batch) for batch in first}) > rounds // 2
    sizes = np.array([len(batch) for batch in first + second])
    if kind == "fixed":
        assert set(sizes.tolist()) == {10}
    else:
        assert abs(sizes.mean() - 10.0) < 6.0 * np.sqrt(7.5 / len(sizes)) and len(set(sizes.tolist())) > 3
    hits = np.bincount([i for batch in first + second for i in batch], minlength=40) / len(sizes)
    assert np.abs(hits - 0.25).max() < 6.0 * np.sqrt(0.1875 / len(sizes))
    assert all(len(set(batch)) == len(batch) and sorted(batch) == batch for batch in first)


def test_other_modes_draw_batches_by_the_seed(tmp_path: Path) -> None:
    """No amplification is claimed there, and a run without noise repeats itself."""
    spec = private_spec(make_terms("client-local"), batch_size=10)
    first, second = (drawn_rows(spec, tmp_path / name, Rows(0, SIZE, 40), 1) for name in "ab")
    assert first == second


@pytest.mark.parametrize("kind", ["poisson", "fixed"])
def test_clients_of_a_central_run_are_not_a_function_of_the_seed(kind: str, tmp_path: Path) -> None:
    per_round = 3 if kind == "fixed" else 0
    spec = private_spec(
        make_terms("client-central", sampling=kind, rate=0.3, asked=per_round, releases=200), clients=10, rounds=200,
        clients_per_round=per_round, client_rate=0.0 if per_round else 0.3,
    )  # fmt: skip
    asked = []
    for name in "ab":
        run_, sets = start(tmp_path / name, spec), []
        for _ in range(100):
            sets.append(tuple(plan.client for plan in run_.coordinator.open_round()))
        asked.append(sets)
        run_.ledger.close()
    assert asked[0][:10] != asked[1][:10]
    sizes = np.array([len(one) for one in asked[0] + asked[1]])
    assert abs(sizes.mean() - 3.0) < 6.0 * np.sqrt(2.1 / 200)
    assert (set(sizes.tolist()) == {3}) == (kind == "fixed")


def tables(ledger: Ledger) -> dict[str, list[Any]]:
    """All that a ledger's file holds."""
    names = [name for (name,) in ledger._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {name: ledger._db.execute(f"SELECT * FROM {name}").fetchall() for name in names}


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_a_central_run_s_ledger_does_not_depend_on_the_draw(
    clipping: str, tmp_path: Path, no_noise: list[Ints], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, and with clients that all give zeros, whatever differs between two draws is a leak: in the file of
    the ledger, in what the run's figures say, or in the records that clients are sent."""
    terms = make_terms("client-central", clipping=clipping, sampling="poisson", rate=0.5, clip_rate=1e-9)
    spec = private_spec(terms, client_rate=0.5)
    kept, told, sent = [], [], []
    for draw in ([0], [1, 2, 3]):
        monkeypatch.setattr(sampling, "poisson", lambda total, rate, draw=draw: np.array(draw, dtype=np.int64))
        made = start(tmp_path / str(len(draw)), spec)
        made.evaluate = fixed(1.0)
        for _ in range(3):
            # In the last round nobody answers, of the one that was asked, or two of three.
            made.round(lambda round_, client, data: [data] if round_ < 2 or client in (1, 2) else [])
        if clipping == "fixed":  # the count of an adaptive bound is of who took part: noise hides it
            kept.append(tables(made.ledger))
        else:
            kept.append({name: rows for name, rows in tables(made.ledger).items() if name not in ("rounds", "header")})
        told.append(privacy_figures(made.ledger, spent(made.ledger, tmp_path)))
        monkeypatch.setattr(sampling, "poisson", lambda total, rate: np.arange(total))
        sent.append({plan.client: plan.catch_up.records for plan in made.coordinator.open_round()})
        made.ledger.close()
    assert kept[0] == kept[1] and told[0] == told[1]
    assert kept[0]["charges"] == [(round_, None, 1) for round_ in range(3)]
    for one, other in zip(sent[0].items(), sent[1].items(), strict=True):
        assert one[0] == other[0]
        for mine, theirs in zip(one[1][::-1], other[1][::-1], strict=False):
            assert mine.seeds.tolist() == theirs.seeds.tolist() and mine.scalars.shape == theirs.scalars.shape


def test_a_central_run_s_metrics_hide_the_draw_too(tmp_path: Path) -> None:
    chosen = config(
        make_data(tmp_path / "data"), privacy__mode="client-central", privacy__delta=1e-3, federation__client_rate=0.5,
        federation__rounds=4, evaluation__every=0,
    )  # fmt: skip
    with run(tmp_path / "run", chosen) as ledger:
        assert all(entry.clients == () for entry in ledger.read())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "round":
            assert line["loss"] is None
            hidden = ("sampled", "accepted", "dropped", "bytes_up", "bytes_down", "artifact_bytes")
            assert [line[name] for name in hidden] == [None] * 6
    assert not (tmp_path / "run" / BUDGETS).exists()


# -- the coordinator


@pytest.mark.parametrize("mode", MODES)
def test_a_round_is_charged_before_its_plans_leave(mode: str, tmp_path: Path) -> None:
    """Killed between the charge and the commit it is charged twice, never less than it may have released."""
    spec = private_spec(make_terms(mode), local_steps=2)
    each = 2 if mode == "example-local" else 1
    for times in (1, 2, 3):
        made = start(tmp_path, spec)
        made.coordinator.open_round()
        with Ledger(tmp_path / "ledger.sqlite") as other:  # committed, and no plan was seen yet
            charges = other.charges()
            assert charges == ({None: times} if mode == "client-central" else dict.fromkeys(range(4), times * each))
            assert other.rounds == 0
        made.ledger.close()


def test_a_charge_that_cannot_be_written_lets_no_plan_leave(tmp_path: Path) -> None:
    made = start(tmp_path, private_spec(make_terms("client-central")))
    made.round()
    made.ledger._db.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON charges BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(LedgerError, match=r"budget of round 1 could not be charged .*the round was not begun"):
        made.coordinator.open_round()
    assert made.ledger.charges() == {None: 1} and made.ledger.rounds == 1
    made.ledger._db.execute("DROP TRIGGER full")
    made.round()
    assert made.ledger.rounds == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_run_ends_before_its_budget_is_exceeded(mode: str, tmp_path: Path) -> None:
    coordinates = 3
    terms = with_budget(make_terms(mode), 4, coordinates)
    spec = private_spec(terms, batch_size=64, rounds=9)
    made = start(tmp_path, spec)
    made.finish()
    assert made.coordinator.finished and made.coordinator.ended
    assert ("has no privacy budget" if mode == "client-central" else "0 of 4 clients have") in made.coordinator.ended
    (tmp_path / BUDGETS / spec.run_id.hex()).mkdir(parents=True)
    for file in (tmp_path / BUDGETS).glob("*.json"):
        file.rename(tmp_path / BUDGETS / spec.run_id.hex() / file.name)
    assert [one.releases for one in spent(made.ledger, tmp_path / BUDGETS)] == [4] * (
        4 if mode != "client-central" else 1
    )
    assert privacy_figures(made.ledger, spent(made.ledger, tmp_path / BUDGETS))["epsilon_spent"] <= terms.epsilon
    with pytest.raises(ProtocolError):
        made.coordinator.open_round()
    made.ledger.close()
    for file in (tmp_path / BUDGETS / spec.run_id.hex()).glob("*.json"):
        file.rename(tmp_path / BUDGETS / file.name)
    again = start(tmp_path, spec)  # and is still at its end when it is opened once more
    again.finish()
    scalars = [entry.scalars.size for entry in rounds_of(again.ledger)]
    assert [size > 0 for size in scalars] == [True] * 4 + [False] * (len(scalars) - 4)


def test_small_clients_stop_earlier_and_the_quorum_counts_the_others(tmp_path: Path) -> None:
    """With privacy.sampling_rate below a small client's own rate, it is released with more of each example's part."""
    sizes = {0: 8, 1: 8, 2: 80, 3: 80}
    terms = with_budget(make_terms("example-local", rate=0.1), 12, 3, 0.1)
    spec = private_spec(terms, batch_size=8, rounds=12, quorum=2)
    made = start(tmp_path, spec, rows=lambda client: Rows(client, SIZE, sizes[client]))
    summaries = [made.round() for _ in range(12)]
    assert [made.workers[client].account.releases for client in (2, 3)] == [12, 12]
    few = [made.workers[client].account.releases for client in (0, 1)]
    release = terms.release(3, 1.0)
    assert few[0] == few[1] < 12
    assert epsilon(release, few[0], terms.delta) <= terms.epsilon < epsilon(release, few[0] + 1, terms.delta)
    assert summaries[few[0]].dropped == {"budget": 2} and summaries[few[0]].accepted == 2
    assert not summaries[-1].dropped and summaries[-1].sampled == 2  # who is spent is asked no more
    strict = start(tmp_path / "strict", dataclasses.replace(spec, quorum=3), rows=made.rows)
    strict.finish()
    assert "2 of 4 clients have privacy budget" in strict.coordinator.ended
    assert strict.ledger.rounds == few[0] + 1
    last = rounds_of(strict.ledger)[-1]
    assert last.seeds.size == 0  # of two of three nothing becomes a record


def test_a_private_hello_says_no_example_count(tmp_path: Path) -> None:
    made = start(tmp_path, private_spec(make_terms("client-local")), clients=[])
    hello = make_worker(made.coordinator.spec, 0, None, tmp_path).hello()
    with pytest.raises(ProtocolError, match="in a private run it must not say"):
        made.coordinator.admit(dataclasses.replace(hello, examples=8))
    made.coordinator.admit(hello)
    made.coordinator.open_round()
    assert made.ledger.members()[0]["examples"] == 0


def test_open_answers_have_no_place_in_a_private_run(tmp_path: Path) -> None:
    """Nor private ones in an open run: what a client sends by mistake is not made a record."""
    open_run, private = (
        start(tmp_path / "open", make_spec()),
        start(tmp_path / "p", private_spec(make_terms("client-local"))),
    )
    usual = contribution(answer(open_run.workers[1], open_run.coordinator.open_round()[1].to_bytes()))
    noised = contribution(answer(private.workers[1], private.coordinator.open_round()[1].to_bytes()))
    for made, wrong in ((private, usual), (open_run, noised)):
        forged = dataclasses.replace(wrong, run_id=made.coordinator.spec.run_id)
        made.coordinator.receive(1, forged.to_bytes())
        made.coordinator.receive(2, Held(made.coordinator.spec.run_id, 0, 2).to_bytes())
        assert made.coordinator.close_round().dropped == {"malformed": 2, "no-reply": 2}


def test_clients_weigh_the_same_whatever_they_hold(tmp_path: Path, no_noise: list[Ints]) -> None:
    spec = private_spec(make_terms("client-local", clip=1e6), aggregation="mean")
    made, sent = start(tmp_path, spec, rows=lambda client: Rows(client, SIZE, 3 + 40 * client)), []

    def listen(round_: int, client: int, data: bytes) -> list[bytes]:
        sent.append(contribution(data).scalars.astype(np.float64))
        return [data]

    made.round(listen)
    np.testing.assert_allclose(rounds_of(made.ledger)[0].scalars, np.mean(sent, axis=0), rtol=1e-6)


def test_a_private_round_s_summary_has_no_loss(tmp_path: Path) -> None:
    for mode in MODES:
        made = start(tmp_path / mode, private_spec(make_terms(mode)))
        summary = made.round()
        assert summary.loss is None and summary.told == "private" and summary.scalars == 3 and summary.clip == 2.0


# -- adaptive clipping


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_moves_travels_and_survives_a_restart(mode: str, tmp_path: Path) -> None:
    """From far above all norms it falls as nearly all are within."""
    terms = make_terms(mode, clipping="adaptive", clip=1e4, noise_multiplier=0.01, epsilon=1e8, clip_rate=0.5)
    spec = private_spec(terms, batch_size=8, rounds=6, scalar_bound=1e9)
    made, bounds = start(tmp_path, spec), []
    for round_ in range(3):
        summary = made.round()
        assert {plan.clip for (r, _), plans in made.plans.items() for plan in plans if r == round_} == {
            bounds[-1] if bounds else 1e4
        }
        bounds.append(summary.clip)
    assert 1e4 > bounds[0] > bounds[1] > bounds[2]
    assert bounds[0] == pytest.approx(1e4 * np.exp(-0.5 * 0.5), rel=0.2)
    made.ledger.close()
    again = start(tmp_path, spec)
    assert {plan.clip for plan in again.coordinator.open_round()} == {bounds[2]}
    again.ledger.close()
    last = start(tmp_path, spec)
    last.finish()
    assert [summary["clip"] for summary in last.ledger.summaries()][:3] == bounds


def test_a_fixed_bound_stays(tmp_path: Path) -> None:
    made = start(tmp_path, private_spec(make_terms("client-local")))
    made.finish()
    assert {plan.clip for plans in made.plans.values() for plan in plans} == {2.0}
    assert {summary["clip"] for summary in made.ledger.summaries()} == {2.0}


# -- secure sums


def play_secure(
    made: Federation, gone: Callable[[int], bool] = lambda client: False
) -> tuple[Any, list[bytes], list[Ints]]:
    """A round over the engine's transport; what went up, and the vectors that were summed."""
    up: list[bytes] = []
    summed: list[Ints] = []

    def exchange(parcels: Any) -> Any:
        for client, plan in parcels:
            if not gone(client):
                up.append(answer(made.workers[client], plan))
                yield client, up[-1]

    def add(clients: Any, least: int) -> Any:
        vectors = [made.workers[client].held for client in clients]
        summed.extend(vectors)
        return (tuple(clients), np.sum(vectors, axis=0)) if len(vectors) >= least else None

    return engine.play_round(made.coordinator, engine.Transport(exchange, add)), up, summed


@pytest.mark.parametrize("missing", [0, 2])
def test_a_secure_sum_has_the_planned_noise(missing: int, tmp_path: Path) -> None:
    """Whoever gives nothing, the sum of a round's records keeps at least the noise of the terms."""
    terms = make_terms("client-secagg", asked=5, tolerance=2, clip=3.0)
    spec = private_spec(terms, clients=5, queries=400, rounds=6, learning_rate=1e-30)
    made, noise = start(tmp_path, spec, rows=lambda client: Rows(client, SIZE, 0)), []
    for _ in range(6):
        summary, up, summed = play_secure(made, lambda client: client < missing)
        assert summary.accepted == 5 - missing and len(summed) == 5 - missing
        assert [len(data) for data in up] == [20] * (5 - missing)  # a head: that one is held
        assert all(isinstance(decode(data), Held) for data in up)
    noise = np.concatenate([entry.scalars.ravel() for entry in rounds_of(made.ledger)]).astype(np.float64)
    planned = 1.0 * 3.0 / 5.0  # multiplier, bound, clients asked
    assert abs(noise.std() / (planned * np.sqrt((5 - missing) / 3)) - 1.0) < 6.0 / np.sqrt(2 * noise.size)
    assert rounds_of(made.ledger)[0].clients == tuple(range(missing, 5))


def test_a_secure_sum_of_too_few_is_void_and_charged(tmp_path: Path) -> None:
    spec = private_spec(make_terms("client-secagg", asked=5, tolerance=1), clients=5)
    made = start(tmp_path, spec)
    summary, _, summed = play_secure(made, lambda client: client < 2)
    assert (summary.accepted, summary.scalars, summed) == (0, 0, [])  # nothing was even added up
    assert summary.dropped == {"no-reply": 2, "quorum": 3}
    assert rounds_of(made.ledger)[0].clients == () and made.coordinator.replica.digest().hex() == spec.theta0
    assert made.ledger.charges() == dict.fromkeys(range(5), 1)
    summary, _, summed = play_secure(made)
    assert summary.accepted == 5 and len(summed) == 5


def test_a_total_that_is_no_sum_of_a_round_is_refused(tmp_path: Path) -> None:
    made = start(tmp_path, private_spec(make_terms("client-secagg", asked=4, tolerance=1)))
    for plan in made.coordinator.open_round()[:3]:
        made.coordinator.receive(plan.client, answer(made.workers[plan.client], plan.to_bytes()))
    assert made.coordinator.holders == (0, 1, 2) and made.coordinator.threshold == 3
    zeros = np.zeros(3, dtype=np.int64)
    for wrong in (((0, 1), zeros), ((0, 1, 3), zeros), ((0, 1, 2), zeros[:2]), ((0, 1, 2), np.zeros((3, 1)))):
        with pytest.raises(ProtocolError, match="a secure sum of"):
            made.coordinator.receive_total(wrong)


def test_a_transport_without_sums_is_refused(tmp_path: Path) -> None:
    made = start(tmp_path, private_spec(make_terms("client-secagg")))

    def exchange(parcels: Any) -> Any:
        return [(client, answer(made.workers[client], plan)) for client, plan in parcels]

    with pytest.raises(RunError, match="needs a transport with secure sums"):
        engine.play_round(made.coordinator, engine.Transport(exchange))


def test_the_sum_is_that_of_the_clipped_parts(tmp_path: Path, no_noise: list[Ints]) -> None:
    terms = make_terms("client-secagg", clip=0.5)
    made = start(tmp_path, private_spec(terms))
    _, _, summed = play_secure(made)
    wanted = np.sum(summed, axis=0) * (0.5 / LEVELS) / 4
    np.testing.assert_allclose(rounds_of(made.ledger)[0].scalars[0], wanted, rtol=1e-6)


# -- runs of the engine and the command line


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


PRIVATE = {"privacy__delta": 1e-3, "evaluation__every": 0, "federation__rounds": 2}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by mode."""
    where = tmp_path_factory.mktemp("finished")
    for mode in MODES:
        answer_ = fedzo("run", *options(data, privacy__mode=mode, **PRIVATE), "--out", where / mode, "--json")
        assert answer_.code == 0, answer_.err
        figures = json.loads(answer_.out.splitlines()[-1])
        assert figures["privacy"] == mode and 1.9 < figures["epsilon_spent"] <= figures["epsilon"] == 2.0
        assert figures["noise_multiplier"] > 0 and "ended" not in figures
    return {mode: where / mode for mode in MODES}


REFUSED: list[Any] = [
    ({"privacy__epsilon": 0.0}, ("privacy.epsilon",)),
    ({"privacy__epsilon": -1.0}, ("privacy.epsilon",)),
    ({"privacy__epsilon": "much"}, ("privacy.epsilon",)),
    ({"privacy__delta": 1.0}, ("privacy.delta",)),
    ({"privacy__delta": -0.1}, ("privacy.delta",)),
    ({"privacy__delta": 0.0}, ("privacy.delta", "laplace")),
    ({"privacy__delta": 0.5}, ("privacy.delta", "examples of a client")),
    ({"privacy__mode": "client-central", "privacy__delta": 0.4}, ("privacy.delta", "3 clients")),
    ({"privacy__mode": "example"}, ("privacy.mode",)),
    ({"privacy__mechanism": "uniform"}, ("privacy.mechanism",)),
    ({"privacy__clip": 0.0}, ("privacy.clip",)),
    ({"privacy__clip": -2.0}, ("privacy.clip",)),
    ({"privacy__noise_multiplier": -1.0}, ("privacy.noise_multiplier",)),
    ({"privacy__noise_multiplier": 1e13}, ("privacy.noise_multiplier",)),
    ({"privacy__noise_multiplier": 0.01}, ("privacy.noise_multiplier", "one release takes epsilon")),
    ({"privacy__sampling_rate": 1.5}, ("privacy.sampling_rate",)),
    ({"privacy__sampling_rate": -0.5}, ("privacy.sampling_rate",)),
    ({"privacy__mode": "client-local", "privacy__sampling_rate": 0.5}, ("privacy.sampling_rate", "example-local")),
    ({"privacy__quantile": 1.0}, ("privacy.quantile",)),
    ({"privacy__clip_share": 0.0}, ("privacy.clip_share",)),
    ({"privacy__clip_share": 1.0}, ("privacy.clip_share",)),
    ({"privacy__clip_rate": 0.0}, ("privacy.clip_rate",)),
    ({"federation__client_rate": 1.5}, ("federation.client_rate",)),
    ({"privacy__mode": "client-central", "federation__clients_per_round": 2}, ("clients_per_round", "client_rate")),
    (
        {"privacy__mode": "client-central", "privacy__sampling": "fixed", "federation__client_rate": 0.5},
        ("client_rate", "clients_per_round"),
    ),
    ({"privacy__mode": "client-central", "federation__seeds": "independent"}, ("federation.seeds", "shared")),
    ({"privacy__mode": "client-secagg", "federation__seeds": "pool"}, ("federation.seeds", "shared")),
    ({"privacy__mode": "client-central", "federation__aggregation": "median"}, ("aggregation", "uniform")),
    ({"privacy__mode": "client-secagg", "federation__aggregation": "trimmed-mean"}, ("aggregation", "uniform")),
    ({"privacy__mode": "client-central", "federation__quorum": 2}, ("federation.quorum", "set it to 1")),
    ({"privacy__mode": "client-secagg", "privacy__mechanism": "laplace"}, ("privacy.mechanism", "gaussian")),
    ({"privacy__mode": "client-secagg", "federation__client_rate": 0.5}, ("federation.client_rate", "= 0")),
    ({"privacy__mode": "client-secagg", "federation__clients_per_round": 2}, ("at least 3 clients",)),
    # With 3 clients asked none may be missing, as a secure sum of 2 would tell each of them the other's vector.
    ({"privacy__mode": "client-secagg", "privacy__tolerance": 1}, ("privacy.tolerance",)),
    ({"space__kind": "sparse", "space__mask": "sensitive"}, ("space.mask", "space.calibration")),
    ({"space__kind": "sparse", "space__mask": "forward"}, ("space.mask", "space.calibration")),
    ({"method__clip": 3.0}, ("method.clip", "privacy.clip")),
    ({"method__name": "fzoo"}, ("example-local", "fzoo", "client-local")),
    ({"method__name": "mezo-svrg"}, ("example-local", "svrg")),
    ({"method__name": "zo-sgd-cons"}, ("example-local", "conservative")),
    *[
        ({"privacy__mode": mode, "method__first_order": "*norm*"}, (mode, "first_order", "no privacy mode"))
        for mode in MODES
    ],
]


@pytest.mark.parametrize(("keys", "named"), REFUSED, ids=str)
def test_the_command_line_refuses_what_cannot_be_promised(
    keys: dict[str, Any], named: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    """With the key and what to change, before anything is written."""
    chosen = options(data, **{"privacy__mode": "example-local", **PRIVATE, **keys})
    found = fedzo("run", *chosen, "--out", tmp_path / "run")
    assert found.code == 2 and "Traceback" not in found.err
    assert all(part in found.err for part in named), found.err
    assert list(tmp_path.iterdir()) == []


def test_tuning_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[privacy]\nmode = 'example-local'\ndelta = 1e-3\n")
    found = fedzo("tune", tmp_path / "c.toml", "--budget", 1, "--out", tmp_path / "tuned.toml")
    assert found.code == 2 and "privacy.mode" in found.err and "public data" in found.err
    assert not (tmp_path / "tuned.toml").exists()


def edited(path: Path, section: str, key: str, value: str) -> None:
    """Sets a key of a run's config.toml."""
    lines, here, done = [], "", False
    for line in (path / "config.toml").read_text().splitlines():
        here = line.strip("[]") if line.startswith("[") else here
        change = here == section and line.startswith(f"{key} = ")
        lines.append(f"{key} = {value}" if change else line)
        done = done or change
    assert done
    (path / "config.toml").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("privacy", "mode", '"none"'),
        ("privacy", "mode", '"client-local"'),
        ("privacy", "epsilon", "3.0"),
        ("privacy", "delta", "0.0001"),
        ("privacy", "mechanism", '"laplace"'),
        ("privacy", "noise_multiplier", "9.0"),
        ("privacy", "clip", "2.0"),
        ("privacy", "clipping", '"adaptive"'),
        ("privacy", "quantile", "0.7"),
        ("privacy", "clip_rate", "0.1"),
        ("privacy", "clip_share", "0.2"),
        ("privacy", "sampling", '"fixed"'),
        ("privacy", "sampling_rate", "0.9"),
        ("method", "batch_size", "2"),
        ("federation", "rounds", "5"),
    ],
)
def test_a_run_goes_on_under_its_own_terms_only(
    section: str, key: str, value: str, finished: dict[str, Path], tmp_path: Path
) -> None:
    """The message names the key that was changed, not what the change does to another."""
    copy = Path(shutil.copytree(finished["example-local"], tmp_path / "run"))
    edited(copy, section, key, value)
    with Ledger(copy / "ledger.sqlite") as ledger:
        before = ledger.head, ledger.charges()
    found = fedzo("resume", copy)
    assert found.code in (1, 2) and "Traceback" not in found.err
    error = found.err[found.err.index("error:") :]
    assert f"its {section}.{key} is" in error or f"its {key} is" in error, error
    with Ledger(copy / "ledger.sqlite") as ledger:
        assert (ledger.head, ledger.charges()) == before


def test_an_open_run_does_not_become_private(data: Path, tmp_path: Path) -> None:
    assert fedzo("run", *options(data, **PRIVATE), "--out", tmp_path / "run", "-q").code == 0
    edited(tmp_path / "run", "privacy", "mode", '"client-local"')
    found = fedzo("resume", tmp_path / "run")
    assert found.code == 1 and "privacy.mode" in found.err and "Traceback" not in found.err


def test_plans() -> None:
    chosen = [
        "privacy",
        "plan",
        "--rounds",
        100,
        "--sampling-rate",
        0.1,
        "--units",
        500,
        "--epsilon",
        1,
        "--delta",
        1e-4,
    ]
    found = fedzo(*chosen, "--json")
    assert found.code == 0
    figures = json.loads(found.out)
    assert (figures["releases"], figures["sampling"], figures["neighbours"]) == (100, "poisson", "zero-out")
    assert figures["expected_units"] == 50.0 and 0.99 < figures["epsilon_pld"] <= 1.0 < figures["epsilon_rdp"]
    assert figures["scalar_error"] == pytest.approx(figures["noise_multiplier"] / 50.0)
    steps = json.loads(fedzo(*chosen, "--local-steps", 4, "--json").out)
    assert steps["releases"] == 400 and steps["noise_multiplier"] > figures["noise_multiplier"]
    text = fedzo(*chosen)
    assert text.code == 0 and "noise multiplier" in text.out and "scalar error" in text.out
    fixed_ = json.loads(fedzo(*chosen, "--sampling", "fixed", "--json").out)
    assert fixed_["neighbours"] == "replace-one" and fixed_["noise_multiplier"] > figures["noise_multiplier"]
    for wrong in (["--epsilon", 0], ["--delta", 0], ["--delta", 1], ["--sampling-rate", 1.5], ["--sampling-rate", 0],
                  ["--clip", 0], ["--delta", 0.01], ["--mode", "client-local"]):  # fmt: skip
        refused = fedzo(*chosen, *wrong)
        assert refused.code == 2 and wrong[0] in refused.err and "Traceback" not in refused.err


@pytest.mark.parametrize("mode", MODES)
def test_reports(mode: str, finished: dict[str, Path]) -> None:
    found = fedzo("privacy", "report", finished[mode], "--json")
    assert found.code == 0
    figures = json.loads(found.out)
    assert [one["client"] for one in figures["clients"]] == ([None] if mode == "client-central" else [0, 1, 2])
    assert all(one["releases"] == 2 and one["own"] == (mode != "client-central") for one in figures["clients"])
    assert all(1.9 < one["epsilon"] <= 2.0 for one in figures["clients"])
    assert figures["epsilon_spent"] == max(one["epsilon"] for one in figures["clients"])
    assert f"({figures['epsilon_spent']:.3g}, 0.001)" in figures["statement"] or "(2, 0.001)" in figures["statement"]
    assert ("each single example" if mode == "example-local" else "as a whole") in figures["statement"]
    text = fedzo("privacy", "report", finished[mode])
    assert text.code == 0 and "differential privacy" in text.out
    assert ("counted by" in text.out) == (mode != "client-central")
    told = fedzo("inspect", finished[mode])
    assert told.code == 0 and mode in told.out and "epsilon spent" in told.out
    assert json.loads(fedzo("inspect", finished[mode], "--json").out)["epsilon"] == 2.0
    assert fedzo("verify", finished[mode]).code == 0


@pytest.mark.parametrize("text", ["", "null", "{}", "[]", '{"run": "x", "releases": "y"}'])
def test_a_report_on_a_damaged_budget(text: str, finished: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished["client-local"], tmp_path / "run"))
    (file,) = copy.glob(f"{BUDGETS}/*/1.json")
    file.write_text(text)
    for command in (("privacy", "report"), ("inspect",)):
        found = fedzo(*command, copy)
        assert found.code == 1 and "1.json cannot be read" in found.err and "Traceback" not in found.err
    edited(copy, "federation", "rounds", "2")
    with Ledger(copy / "ledger.sqlite") as ledger, pytest.raises(RunError, match="cannot be read"):
        spent(ledger, copy / BUDGETS)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_ends_early_says_so(mode: str, data: Path, tmp_path: Path) -> None:
    # A whole batch each time: with noise 1 of 3 rounds epsilon is about 6.
    chosen = options(
        data, **PRIVATE | {"federation__rounds": 9}, privacy__mode=mode, privacy__noise_multiplier=2.0,
        privacy__epsilon=4.0, method__batch_size=12,
    )  # fmt: skip
    found = fedzo("run", *chosen, "--out", tmp_path / "run", "--json")
    assert found.code == 0, found.err
    figures = json.loads(found.out)
    assert 0 < figures["rounds"] < 9 and figures["epsilon_spent"] <= 4.0
    wanted = "the run has no privacy budget left" if mode == "client-central" else "0 of 3 clients have privacy budget"
    assert wanted in figures["ended"]
    assert "validation_loss" in figures  # evaluated at its end
    told = fedzo("privacy", "report", tmp_path / "run")
    assert wanted in told.out
    again = fedzo("resume", tmp_path / "run", "--json")
    assert again.code == 0 and json.loads(again.out)["epsilon_spent"] == figures["epsilon_spent"]


def test_secure_sums_in_one_process(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up: list[bytes] = []
    answered = engine.answer

    def listened(*arguments: Any) -> bytes:
        up.append(answered(*arguments))
        return up[-1]

    monkeypatch.setattr(engine, "answer", listened)
    chosen = config(data, privacy__mode="client-secagg", **PRIVATE)
    with run(tmp_path / "run", chosen) as ledger:
        assert [entry.scalars.shape for entry in ledger.read()] == [(1, 2)] * 2
        assert ledger.spec.terms is not None and ledger.spec.terms.asked == 3
    assert len(up) == 6 and all(isinstance(decode(one), Held) and len(one) == 20 for one in up)


@pytest.mark.parametrize("mode", ["example-local", "client-central"])
def test_two_runs_of_one_configuration_differ_and_each_replays(mode: str, data: Path, tmp_path: Path) -> None:
    heads, ids = set(), set()
    for name in "ab":
        chosen = config(data, privacy__mode=mode, **PRIVATE)
        with run(tmp_path / name, chosen) as ledger:
            heads.add(tuple(entry.scalars.tobytes() for entry in ledger.read()))
            ids.add(ledger.spec.run_id)
        assert fedzo("verify", tmp_path / name).code == 0
    assert len(heads) == len(ids) == 2  # a nonce: no budget is taken for another run's


def test_a_run_that_is_not_private_is_as_it_was(data: Path, tmp_path: Path) -> None:
    found = fedzo("run", *options(data, evaluation__every=0), "--out", tmp_path / "run", "--json")
    figures = json.loads(found.out)
    assert figures["privacy"] == "none" and "epsilon" not in figures
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.spec.privacy == {} and ledger.spec.terms is None and ledger.spec.sanitiser is None
        assert not ledger.charges() and not ledger.ended
        assert all(isinstance(summary["loss"], float) and summary["clip"] is None for summary in ledger.summaries())
        assert [member["examples"] for member in ledger.members().values()] == [12, 12, 12]
        assert spent(ledger, tmp_path) == []
    assert not (tmp_path / "run" / BUDGETS).exists()
    report = fedzo("privacy", "report", tmp_path / "run")
    assert report.code == 0 and "not private" in report.out
    made = start(tmp_path / "tiny", make_spec())
    plan = made.coordinator.open_round()[1]
    sent = contribution(answer(made.workers[1], plan.to_bytes()))
    assert plan.clip == 0.0 and sent.examples == 9 and sent.loss is not None and sent.counts is None
    assert made.workers[1].hello().examples == 9


def _rounds(path: Path) -> int:
    try:
        with Ledger(path / "ledger.sqlite") as ledger:
            return ledger.rounds
    except (LedgerError, sqlite3.Error):
        return -1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["example-local", "client-central"])
def test_kill_9_and_resume(mode: str, tmp_path: Path) -> None:
    """The embedded default, killed at any moment: what is told afterwards counts every round that was asked."""
    path, rounds = tmp_path / "run", 12
    chosen = [
        "-o", f"privacy.mode={mode}", "-o", "privacy.delta=1e-4", "-o", f"federation.rounds={rounds}",
        "-o", "evaluation.every=0", "-o", "runtime.threads=1", "-o", "data.partition=iid",
    ]  # fmt: skip
    command = [*PROGRAM, "run", *chosen, "--out", str(path), "-q"]
    environment = dict(os.environ, COLUMNS="80")
    kills = 0
    for target in (1, 4, 7):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while process.poll() is None and _rounds(path) < target and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        command = [*PROGRAM, "resume", str(path), "-q"]
    assert kills == 3 and 7 <= _rounds(path) < rounds
    last = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert last.returncode == 0 and "Traceback" not in last.stderr, last.stderr
    with Ledger(path / "ledger.sqlite") as ledger:
        terms, charges, done = ledger.spec.terms, ledger.charges(), ledger.rounds
        assert terms is not None and terms.releases == rounds
        asked = [round_ for (round_,) in ledger._db.execute("SELECT DISTINCT round FROM charges")]
        assert sorted(asked) == list(range(done))
        each = spent(ledger, path / BUDGETS)
    assert all(one.epsilon <= terms.epsilon for one in each)
    if mode == "client-central":
        assert done <= charges[None] <= rounds and each[0].releases == charges[None]
        assert each[0].epsilon == epsilon(terms.release(2, units=10), charges[None], terms.delta)
    else:
        for one in each:
            kept = json.loads(next(path.glob(f"{BUDGETS}/*/{one.client}.json")).read_text())
            assert one.own and one.releases == kept["releases"] <= rounds
            # It answered in as many rounds as the ledger says, and was charged for those that were lost.
            with Ledger(path / "ledger.sqlite") as ledger:
                took_part = sum(one.client in entry.clients for entry in ledger.read())
            assert took_part <= one.releases <= charges[one.client]
    found = fedzo("privacy", "report", path, "--json")
    assert found.code == 0 and json.loads(found.out)["epsilon_spent"] <= 2.0
    assert fedzo("verify", path, "--chain-only").code == 0
