"""Coordinator and worker: what the invariants promise, with real ledgers and replicas."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import (
    SIZE,
    Federation,
    answer,
    losses,
    make_spec,
    make_worker,
    mean_loss,
    other_theta0,
    rounds_of,
    start,
    theta0,
    with_initial,
)
from torch import Tensor

from fedzo.errors import LedgerError, ProtocolError
from fedzo.evaluation import LossRequest
from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import NO_DIGEST, Ledger
from fedzo.federation.messages import Behind, CatchUp, Contribution, Failure, Plan, decode
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import RunSpec
from fedzo.optimizers import Records
from fedzo.structures import Layout

COMBINATIONS = [
    *(("shared", name) for name in ("mean", "uniform", "median", "trimmed-mean", "norm-bound")),
    *(
        (seeds, name)
        for seeds in ("independent", "pool", "weighted-pool")
        for name in ("mean", "uniform", "norm-bound")
    ),
]


def fresh(spec: RunSpec) -> Replica:
    return Replica(spec, lambda: theta0(spec.size))


def contribution(data: bytes) -> Contribution:
    message = decode(data)
    assert isinstance(message, Contribution)
    return message


# -- theta is a pure function of the ledger


@pytest.mark.parametrize("local_steps", [1, 4])
@pytest.mark.parametrize(("seeds", "aggregation"), COMBINATIONS)
def test_replay_is_the_run_bit_for_bit(tmp_path: Path, seeds: str, aggregation: str, local_steps: int) -> None:
    spec = make_spec(seeds=seeds, aggregation=aggregation, local_steps=local_steps)
    run = start(tmp_path, spec)
    run.finish()
    recorded = [entry.digest for entry in rounds_of(run.ledger)]
    assert len(set(recorded)) == 6  # every round moved theta
    assert recorded[-1] == run.coordinator.replica.digest()
    assert mean_loss(run.coordinator.replica.theta) < mean_loss(theta0())

    stepwise = fresh(spec)
    for entry in rounds_of(run.ledger):
        stepwise.apply([entry.records()])
        assert theta_digest(stepwise.theta) == entry.digest
    for stop in range(7):
        fused = fresh(spec)
        replay(run.ledger, fused, stop)
        assert theta_digest(fused.theta) == [theta_digest(theta0()), *recorded][stop]
    for worker in run.workers.values():  # clients stood at the last plan's theta
        assert theta_digest(worker.replica.theta) == recorded[-2]


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
def test_same_seed_same_ledger_and_another_seed_another(tmp_path: Path, family: str) -> None:
    spec = make_spec(family=family, clients_per_round=2)
    head = start(tmp_path / "a", spec).finish()
    assert start(tmp_path / "b", spec).finish() == head
    other = start(tmp_path / "c", dataclasses.replace(spec, seed=8))
    other.finish()
    assert other.coordinator.replica.digest() != rounds_of(Ledger(tmp_path / "a" / "ledger.sqlite"))[-1].digest


def test_the_order_of_answers_does_not_matter(tmp_path: Path) -> None:
    heads = []
    for name, order in (("a", 1), ("b", -1)):
        run = start(tmp_path / name, make_spec(seeds="independent", local_steps=2))
        while not run.coordinator.finished:
            plans = run.coordinator.open_round()
            for plan in plans[::order]:
                run.coordinator.receive(plan.client, answer(run.workers[plan.client], plan.to_bytes()))
            run.coordinator.close_round()
        heads.append(run.ledger.head)
    assert heads[0] == heads[1]


@pytest.mark.parametrize("seeds", ["shared", "independent", "pool", "weighted-pool"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, seeds: str) -> None:
    spec = make_spec(seeds=seeds, clients_per_round=3, local_steps=2)
    head = start(tmp_path / "whole", spec).finish()
    for _ in range(6):
        run = start(tmp_path / "parts", spec)
        run.coordinator.open_round()  # in flight when the process dies
        run.ledger.close()
        run = start(tmp_path / "parts", spec)
        run.round()
        run.ledger.close()
    assert Ledger(tmp_path / "parts" / "ledger.sqlite").head == head


def test_a_round_leaves_the_replica_as_it_was(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(local_steps=4))
    plan = run.coordinator.open_round()[0]
    worker = run.workers[plan.client]
    seen: list[LossRequest] = []

    def watched(request: LossRequest) -> Tensor:
        seen.append(request)
        return losses(request)

    sent = contribution(answer(worker, plan.to_bytes(), watched))
    assert theta_digest(worker.replica.theta).hex() == run.coordinator.spec.theta0
    assert sent.scalars.shape == (4, 3) and len(seen) == 4
    assert [request.seeds for request in seen] == [tuple(seeds) for seeds in plan.seeds.tolist()]
    # The client's own steps: what its records alone would have done.
    alone = theta0()
    rule = run.coordinator.spec.build_rule(Layout.flat(SIZE))
    rule.apply(alone, rule.init(alone), [Records(0, sent.seeds[:3], sent.scalars[:3])])
    assert torch.equal(seen[-1].theta, alone)


def test_a_round_is_committed_before_it_is_told(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    summary = run.round()
    with Ledger(tmp_path / "ledger.sqlite") as other:
        assert other.rounds == summary.round + 1
        assert other.summaries() == [vars(summary)]
    assert (summary.sampled, summary.accepted, summary.dropped, summary.scalars) == (4, 4, {}, 3)
    assert summary.bytes_up == 4 * (32 + 12 * 3)
    assert summary.bytes_down == sum(len(plans[0].to_bytes()) for plans in run.plans.values())


@pytest.mark.parametrize("seeds", ["shared", "independent", "pool", "weighted-pool"])
@pytest.mark.parametrize("aggregation", ["mean", "uniform"])
def test_records_are_the_weighted_contributions(tmp_path: Path, seeds: str, aggregation: str) -> None:
    """A client of n examples weighs n in "mean", 1 in "uniform"; the sum of weights is 1."""
    run, sent = start(tmp_path, make_spec(seeds=seeds, aggregation=aggregation, local_steps=2)), {}

    def listen(round_: int, client: int, data: bytes) -> list[bytes]:
        sent[client] = contribution(data)
        return [data]

    run.round(listen)
    (entry,) = rounds_of(run.ledger)
    counts = [sent[client].examples if aggregation == "mean" else 1 for client in range(4)]
    scaled = [sent[client].scalars.astype(float) * counts[client] / sum(counts) for client in range(4)]
    if seeds == "shared":
        assert np.array_equal(entry.seeds, sent[0].seeds)
        np.testing.assert_allclose(entry.scalars, sum(scaled), rtol=1e-6)
    else:
        assert np.array_equal(entry.seeds, np.concatenate([sent[client].seeds for client in range(4)], axis=1))
        np.testing.assert_allclose(entry.scalars, np.concatenate(scaled, axis=1), rtol=1e-6)


def test_a_full_disk_stops_the_run_and_resume_ends_it_alike(tmp_path: Path) -> None:
    spec = make_spec(seeds="independent", queries=100, local_steps=2)
    head = start(tmp_path / "whole", spec).finish()
    run = start(tmp_path / "full", spec)
    run.round()
    (pages,) = run.ledger._db.execute("PRAGMA page_count").fetchone()
    run.ledger._db.execute(f"PRAGMA max_page_count = {pages + 8}")
    with pytest.raises(LedgerError, match=r"could not be written .* `fedzo resume`"):
        run.finish()
    assert 1 <= run.ledger.rounds < 6
    run.ledger.close()
    assert start(tmp_path / "full", spec).finish() == head


# -- catching up


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"size": 2000}, "records"),
        ({}, "snapshot"),
        ({"seeds": "pool", "pool_size": 8, "size": 2000}, "snapshot"),
        ({"seeds": "weighted-pool", "pool_size": 8, "size": 2000}, "snapshot"),
    ],
)
@pytest.mark.parametrize("local_steps", [1, 4])
def test_a_late_client_catches_up(tmp_path: Path, changes: dict[str, object], kind: str, local_steps: int) -> None:
    spec = make_spec(**changes, local_steps=local_steps)
    run = start(tmp_path, spec, clients=[0, 1])
    for _ in range(4):
        run.round()
    late = run.join(3)
    summary = run.round()
    plan = run.plans[4, 3][0]
    assert plan.catch_up.kind == kind
    assert any(plan.digest)
    assert summary.accepted == 3 and not summary.dropped
    assert theta_digest(late.replica.theta) == plan.digest
    records = sum(7 + 12 * entry.seeds.size for entry in rounds_of(run.ledger)[:4])
    assert len(plan.to_bytes()) <= 89 + 20 + 8 * plan.seeds.size + records  # the cheaper of the two
    run.finish()
    assert rounds_of(run.ledger)[-1].clients == (0, 1, 3)


def test_pool_snapshot_never_exceeds_the_pool(tmp_path: Path) -> None:
    spec = make_spec(seeds="pool", pool_size=8, rounds=30, size=500)
    run = start(tmp_path, spec, clients=[0])
    for _ in range(29):
        run.round()
    run.join(1)
    run.round()
    assert len(run.plans[29, 1][0].catch_up.snapshot) == 8 * 8


def test_initial_values_go_to_a_client_whose_own_differ(tmp_path: Path) -> None:
    spec = with_initial()
    run = start(tmp_path, spec, clients=[0])
    worker = run.join(1, other_theta0)
    run.finish()
    assert run.plans[0, 1][0].initial and not run.plans[0, 0][0].initial
    assert not run.plans[5, 1][0].initial
    assert rounds_of(run.ledger)[-1].clients == (0, 1)
    assert theta_digest(worker.replica.theta) == rounds_of(run.ledger)[-2].digest
    # A holder of the base model whose head was drawn anew replays the ledger as well.
    replica = Replica(spec, other_theta0)
    replay(run.ledger, replica)
    assert replica.digest() == run.coordinator.replica.digest()


@pytest.mark.parametrize("digest_every", [1, 100])
@pytest.mark.parametrize("seeds", ["shared", "pool", "weighted-pool"])
def test_a_restarted_worker_says_that_it_is_behind(tmp_path: Path, seeds: str, digest_every: int) -> None:
    spec = with_initial(seeds=seeds, digest_every=digest_every, pool_size=3, size=2000, clients=2)
    run = start(tmp_path, spec, clients=[0])
    run.join(1, lambda: other_theta0(2000))
    for _ in range(3):
        run.round()
    # Client 1 misses two rounds, so that its next plan may be a snapshot, and restarts without a new handshake.
    for _ in range(2):
        run.round(lambda round_, client, data: [data] if client == 0 else [])
    restarted = make_worker(spec, 1, lambda: other_theta0(2000))
    run.workers[1] = restarted
    summary = run.round()
    assert summary.accepted == 2 and not summary.dropped
    first, second = run.plans[5, 1]
    assert first.catch_up.start > 0 and second.catch_up.start == 0 and second.initial
    assert theta_digest(restarted.replica.theta) == theta_digest(run.workers[0].replica.theta)


def test_behind_is_granted_twice_a_round(tmp_path: Path) -> None:
    """A client may be several processes that stand at different rounds: the second new plan suits all of them."""
    run = start(tmp_path, make_spec(rounds=20))
    for _ in range(5):
        run.round()
    spec = run.coordinator.spec
    run.coordinator.open_round()
    ask = [Behind(spec.run_id, 5, 2, applied).to_bytes() for applied in (4, 3, 2, 0)]
    granted = [run.coordinator.receive(2, data) for data in ask]
    assert granted[0] is None  # it stands at 4 as far as the coordinator knows: the plan was right
    assert [plan and plan.catch_up.start for plan in granted[1:]] == [3, 0, None]
    assert isinstance(granted[2], Plan)
    newcomer = make_worker(spec, 2)
    assert run.coordinator.receive(2, answer(newcomer, granted[2].to_bytes())) is None
    summary = run.coordinator.close_round()
    assert summary.dropped == {"behind": 2, "no-reply": 3} and summary.accepted == 1


def test_a_wrong_theta_is_noticed_and_heals(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    run.round()
    run.workers[2].replica.theta[5] += 1e-3
    summary = run.round()
    assert summary.dropped == {"digest": 1} and summary.accepted == 3
    summary = run.round()
    assert not summary.dropped and summary.accepted == 4
    assert run.plans[2, 2][0].catch_up.start == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("local_steps", [1, 4])
def test_a_client_that_diverges_fails_alone(tmp_path: Path, value: float, local_steps: int) -> None:
    spec = make_spec(local_steps=local_steps)
    run = start(tmp_path, spec)
    plans = run.coordinator.open_round()
    for plan in plans:
        broken = plan.client == 1
        data = answer(
            run.workers[plan.client],
            plan.to_bytes(),
            (lambda request: torch.full((len(request.seeds), 2, len(request.batch)), value)) if broken else losses,
        )
        run.coordinator.receive(plan.client, data)
    summary = run.coordinator.close_round()
    assert summary.dropped == {"not-finite": 1} and summary.accepted == 3
    assert not run.round().dropped


def test_a_worker_refuses_a_plan_that_is_not_its_own(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    plan = run.coordinator.open_round()[0]
    with pytest.raises(ProtocolError, match="client 0"):
        next(run.workers[1].round(plan))
    with pytest.raises(ProtocolError, match="another run"):
        next(run.workers[0].round(dataclasses.replace(plan, run_id=bytes(8))))


def test_a_replica_refuses_catch_ups_that_do_not_fit() -> None:
    replica = fresh(make_spec())
    before = replica.digest()
    for wrong, message in (
        (CatchUp("records", 2, 3), "start at round 2"),
        (CatchUp("records", 0, 3), "stands at round 0"),
        (CatchUp("none", 1, 1), "stands at round 0"),
        (CatchUp("snapshot", 0, 3, snapshot=bytes(5)), "5 bytes"),
    ):
        with pytest.raises(ProtocolError, match=message):
            replica.catch_up(wrong)
    assert theta_digest(replica.theta) == before


# -- the handshake


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": 1}, "protocol is 1, the run's is 5"),
        ({"fingerprint": "a"}, "fingerprint is 'a'"),
        ({"mask": "a"}, "mask is 'a'"),
        ({"space_hash": "a"}, "space_hash"),
        ({"family": "gaussian"}, "family is 'gaussian'"),
        ({"theta_dtype": "bfloat16"}, "theta_dtype"),
        ({"theta0": "a"}, "theta0"),
        ({"client": 4}, "clients 0 to 3"),
        ({"client": -1}, "clients 0 to 3"),
        ({"examples": 0}, "states 0 examples"),
        ({"examples": 2**32}, "examples"),
        ({"quantisation": "nf4\n"}, "quantisation is 'nf4.*wanted a name"),
        ({"compute_dtype": 32}, "compute_dtype is 32, wanted one of type str"),
    ],
)
def test_the_handshake_names_the_field_that_differs(tmp_path: Path, change: dict[str, object], message: str) -> None:
    run = start(tmp_path, make_spec(), clients=[])
    hello = dataclasses.replace(make_worker(run.coordinator.spec, 2).hello(), **change)
    with pytest.raises(ProtocolError, match=message):
        run.coordinator.admit(hello)
    assert not run.coordinator.members
    run.join(0)
    run.round()
    assert list(run.ledger.members()) == [0]


def test_what_may_differ_is_recorded_for_each_client(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(), clients=[])
    for client, quantisation in enumerate(("nf4", "none", "int8")):
        hello = make_worker(run.coordinator.spec, client).hello()
        run.workers[client] = make_worker(run.coordinator.spec, client)
        run.coordinator.admit(dataclasses.replace(hello, quantisation=quantisation, compute_dtype="bfloat16"))
    assert run.ledger.members() == {}
    head = run.finish()
    members = run.ledger.members()
    assert members[2] == {"quantisation": "int8", "compute_dtype": "bfloat16", "examples": 10}
    assert [members[client]["quantisation"] for client in members] == ["nf4", "none", "int8"]
    run.ledger.close()
    again = start(tmp_path, make_spec(), clients=[0])  # a client may come back on another base
    again.ledger.record_members({1: {"quantisation": "fp4", "compute_dtype": "float32", "examples": 9}})
    assert again.ledger.members()[1]["quantisation"] == "fp4" and len(again.ledger.members()) == 3
    assert again.ledger.head == head == start(tmp_path / "plain", make_spec(), clients=range(3)).finish()


def test_artifacts_are_counted_in_the_next_round(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    run.coordinator.sent_artifact(1000)
    run.coordinator.sent_artifact(24)
    first, second = run.round(), run.round()
    plans = [sum(len(run.plans[round_, client][0].to_bytes()) for client in range(4)) for round_ in range(2)]
    assert (first.artifact_bytes, first.bytes_down) == (1024, plans[0] + 1024)
    assert (second.artifact_bytes, second.bytes_down) == (0, plans[1])


# -- wrong contributions


def _plan(data: Contribution) -> bytes:
    seeds = data.seeds
    return Plan(data.run_id, data.round, data.client, seeds[:0], 0.1, 1, NO_DIGEST, CatchUp("none", 0, 0)).to_bytes()


def _but(data: Contribution, **changes: object) -> bytes:
    return dataclasses.replace(data, **changes).to_bytes()


def _scalar(data: Contribution, value: float) -> bytes:
    scalars = data.scalars.copy()
    scalars[-1, -1] = value
    return _but(data, scalars=scalars)


WRONG = {
    "wrong run": ("wrong-run", lambda d: [_but(d, run_id=b"another!")]),
    "earlier round": ("late", lambda d: [_but(d, round=d.round - 1)]),
    "later round": ("late", lambda d: [_but(d, round=d.round + 1)]),
    "another client's number": ("not-asked", lambda d: [_but(d, client=0)]),
    "unknown client's number": ("not-asked", lambda d: [_but(d, client=2**32 - 1)]),
    "more queries": ("malformed", lambda d: [_but(d, seeds=d.seeds.repeat(2, 1), scalars=d.scalars.repeat(2, 1))]),
    "a step missing": ("shape", lambda d: [_but(d, seeds=d.seeds[:-1], scalars=d.scalars[:-1])]),
    "no steps": ("shape", lambda d: [_but(d, seeds=d.seeds[:0], scalars=d.scalars[:0])]),
    "a seed missing": ("shape", lambda d: [_but(d, seeds=d.seeds[:, 1:], scalars=d.scalars[:, 1:])]),
    "transposed": ("shape", lambda d: [_but(d, seeds=d.seeds.T, scalars=d.scalars.T)]),
    "a seed changed": ("seeds", lambda d: [_but(d, seeds=d.seeds ^ np.uint64(1))]),
    "seeds in another order": ("seeds", lambda d: [_but(d, seeds=d.seeds[:, ::-1])]),
    "another example count": ("examples", lambda d: [_but(d, examples=d.examples + 1)]),
    "not a number": ("not-finite", lambda d: [_scalar(d, float("nan"))]),
    "infinite": ("not-finite", lambda d: [_scalar(d, float("-inf"))]),
    "loss not a number": ("not-finite", lambda d: [_but(d, loss=float("nan"))]),
    "loss infinite": ("not-finite", lambda d: [_but(d, loss=float("inf"))]),
    "beyond the bound": ("bound", lambda d: [_scalar(d, -1.001e4)]),
    "random bytes": ("malformed", lambda d: [b"\x93NUMPY and so on, longer than a head"]),
    "nothing": ("malformed", lambda d: [b""]),
    "cut": ("malformed", lambda d: [d.to_bytes()[:-1]]),
    "one byte more": ("malformed", lambda d: [d.to_bytes() + b"\0"]),
    "huge": ("malformed", lambda d: [d.to_bytes() + bytes(100_000)]),
    "another version": ("malformed", lambda d: [d.to_bytes()[:2] + b"\1" + d.to_bytes()[3:]]),
    "a plan": ("malformed", lambda d: [_plan(d)]),
    "behind without reason": ("behind", lambda d: [Behind(d.run_id, d.round, d.client, d.round).to_bytes()]),
    "behind the future": ("behind", lambda d: [Behind(d.run_id, d.round, d.client, 2**32 - 1).to_bytes()]),
    "failure": ("digest", lambda d: [Failure(d.run_id, d.round, d.client, "digest").to_bytes()]),
    "no reply": ("no-reply", lambda d: []),
}  # fmt: skip


@pytest.fixture(scope="module")
def absent(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The hash of a run in which client 2 never answers in rounds 2 and 3."""
    run = start(tmp_path_factory.mktemp("absent"), make_spec(local_steps=2))
    return run.finish(lambda round_, client, data: [] if client == 2 and round_ in (2, 3) else [data])


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_answer_is_dropped_counted_and_harmless(tmp_path: Path, name: str, absent: bytes) -> None:
    reason, make = WRONG[name]
    run = start(tmp_path, make_spec(local_steps=2))

    def tamper(round_: int, client: int, data: bytes) -> Iterable[bytes]:
        return make(contribution(data)) if client == 2 and round_ in (2, 3) else [data]

    run.finish(tamper)
    dropped = [summary["dropped"] for summary in run.ledger.summaries()]
    # A late message is no answer to this round's plan.
    counted = {"late": 1, "no-reply": 1} if reason == "late" else {reason: 1}
    assert dropped == [{}, {}, counted, counted, {}, {}]
    assert run.ledger.head == absent
    replay(run.ledger, fresh(run.coordinator.spec))


def test_what_comes_twice_counts_once(tmp_path: Path) -> None:
    plain = start(tmp_path / "a", make_spec()).finish()
    run = start(tmp_path / "b", make_spec())

    def twice(round_: int, client: int, data: bytes) -> list[bytes]:
        return [data, _scalar(contribution(data), 99.0), data] if client == 1 else [data]

    assert run.finish(twice) == plain
    assert run.ledger.summaries()[3]["dropped"] == {"duplicate": 2}


def test_clients_that_were_not_asked_or_admitted(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(clients_per_round=2), clients=[0, 1, 2])
    plans = run.coordinator.open_round()
    asked = {plan.client for plan in plans}
    stranger = next(client for client in range(3) if client not in asked)
    data = answer(run.workers[plans[0].client], plans[0].to_bytes())
    for client in (stranger, 3, 77, -1):
        assert run.coordinator.receive(client, data) is None
        own = _but(contribution(data), client=max(client, 0))
        assert run.coordinator.receive(client, own) is None
        assert (
            run.coordinator.receive(client, Behind(run.coordinator.spec.run_id, 0, max(client, 0), 0).to_bytes())
            is None
        )
    summary = run.coordinator.close_round()
    assert summary.dropped == {"no-reply": 2, "not-asked": 12} and summary.accepted == 0


def test_answers_before_and_after_a_round_are_ignored(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    assert run.coordinator.receive(0, b"anything") is None
    run.coordinator.lost(0)
    with pytest.raises(ProtocolError, match="no round is open"):
        run.coordinator.close_round()
    run.finish()
    with pytest.raises(ProtocolError, match="all its 6 rounds"):
        run.coordinator.open_round()


@pytest.fixture(scope="module")
def open_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, bytes]:
    """A run with round 2 open, and a right answer of client 1."""
    run = start(tmp_path_factory.mktemp("fuzz"), make_spec(local_steps=2))
    run.round()
    run.round()
    plan = run.coordinator.open_round()[1]
    return run, answer(run.workers[1], plan.to_bytes())


def _edit(right: bytes) -> st.SearchStrategy[bytes]:
    """A right message with bytes replaced, cut or added."""

    def apply(edits: list[tuple[int, int]], cut: int, tail: bytes) -> bytes:
        data = bytearray(right)
        for at, value in edits:
            data[at % len(data)] = value
        return bytes(data[: len(data) - cut]) + tail

    edit = st.tuples(st.integers(0, 200), st.integers(0, 255))
    return st.builds(apply, st.lists(edit, min_size=1, max_size=4), st.integers(0, 60), st.binary(max_size=60))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_bytes_can_hurt_the_coordinator(open_run: tuple[Federation, bytes], data: st.DataObject) -> None:
    run, right = open_run
    head, digest, rounds = run.ledger.head, theta_digest(run.coordinator.replica.theta), run.ledger.rounds
    message = data.draw(st.one_of(st.binary(max_size=200), _edit(right)))
    client = data.draw(st.integers(-1, 5))
    run.coordinator.receive(client, message)
    current = run.coordinator._open
    assert current is not None
    for kept in current.contributions.values():  # it can only have been a right one
        assert np.isfinite(kept.scalars).all() and np.abs(kept.scalars).max() <= 1e4
        assert np.array_equal(kept.seeds, current.seeds[kept.client]) and kept.round == 2
    current.contributions.clear()
    assert (run.ledger.head, theta_digest(run.coordinator.replica.theta), run.ledger.rounds) == (head, digest, rounds)


# -- quorum and sampling


def test_below_the_quorum_a_round_changes_nothing(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(quorum=3))
    run.round()
    before = run.coordinator.replica.digest()
    summary = run.round(lambda round_, client, data: [data] if client < 2 else [])
    assert summary.dropped == {"no-reply": 2, "quorum": 2}
    assert (summary.accepted, summary.scalars, summary.loss) == (0, 0, None)
    entry = rounds_of(run.ledger)[1]
    assert entry.seeds.shape == (1, 0) and entry.clients == () and entry.digest == before
    assert theta_digest(run.coordinator.replica.theta) == before
    run.finish()  # goes on, the empty round replays
    replay(run.ledger, fresh(run.coordinator.spec))
    assert [len(entry.clients) for entry in rounds_of(run.ledger)] == [4, 0, 4, 4, 4, 4]


def test_clients_are_sampled_by_count(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(clients_per_round=2, rounds=40))
    run.finish()
    asked = [entry.clients for entry in rounds_of(run.ledger)]
    assert all(len(set(clients)) == 2 for clients in asked)
    assert {client for clients in asked for client in clients} == {0, 1, 2, 3} and len(set(asked)) > 3


def test_clients_are_sampled_by_rate(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(client_rate=0.3, rounds=60, clients_per_round=0))
    run.finish()
    sampled = [summary["sampled"] for summary in run.ledger.summaries()]
    assert 0 in sampled and max(sampled) >= 3  # a Poisson sample, not a fixed count
    assert 40 <= sum(sampled) <= 104  # 72 expected, standard deviation 7
    replay(run.ledger, fresh(run.coordinator.spec))


def test_digests_only_where_they_are_due(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(digest_every=4))
    run.finish()
    assert [any(entry.digest) for entry in rounds_of(run.ledger)] == [False, False, False, True, False, True]
    assert [any(run.plans[round_, 0][0].digest) for round_ in range(6)] == [True, False, False, False, True, False]


# -- the ledger of another model


def test_a_ledger_of_another_model_or_space_is_refused(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    run.finish()
    for load in (other_theta0, lambda: theta0(SIZE + 1)):
        with pytest.raises(LedgerError, match="belongs to another model or space"):
            replay(run.ledger, Replica(run.coordinator.spec, load))
    with pytest.raises(LedgerError, match="7 cannot be replayed"):
        replay(run.ledger, fresh(run.coordinator.spec), 7)
