"""What a federated run must give back, whatever its method: checks of tiny runs for the tests of methods."""

import dataclasses
from pathlib import Path

import torch
from tiny import Federation, make_replica, make_worker, mean_loss, start, theta0

from fedzo.federation.coordinator import replay
from fedzo.federation.ledger import NO_DIGEST
from fedzo.federation.messages import CatchUp, Plan, RoundRecords, decode
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import RunSpec
from fedzo.optimizers import State


def same(one: State, other: State) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def through_a_plan(spec: RunSpec, caught: CatchUp) -> CatchUp:
    """A catch-up as a client reads it from a plan's bytes."""
    seeds = torch.zeros(spec.local_steps, spec.queries, dtype=torch.uint64).numpy()
    plan = decode(Plan(spec.run_id, caught.stop, 3, seeds, spec.eps, 1, NO_DIGEST, caught).to_bytes())
    assert isinstance(plan, Plan) and plan.catch_up.stop == caught.stop
    return plan.catch_up


def at(run: Federation, rounds: int | None = None) -> Replica:
    """A new party's replica after the first rounds of a run's ledger (None: all)."""
    replica = make_replica(run.coordinator.spec)
    replay(run.ledger, replica, rounds)
    return replica


def check_replay(folder: Path, spec: RunSpec) -> Federation:
    """Plays a run that must learn, and give the same theta and state, bit for bit, to a replay of its ledger, to late
    clients that catch up by records or by a snapshot, and to itself killed in the middle and gone on with.
    """
    whole, middle = start(folder / "whole", spec), spec.rounds // 2
    head = whole.finish()
    entries, server = list(whole.ledger.read()), whole.coordinator.replica
    assert mean_loss(server.theta) < 0.9 * mean_loss(theta0(spec.size))
    assert len({entry.digest for entry in entries}) == spec.rounds
    end, between = at(whole), at(whole, middle)
    assert torch.equal(end.theta, server.theta) and entries[-1].digest == theta_digest(server.theta)
    assert same(end.state, server.state)
    if spec.local_steps == 1:
        assert all(theta_digest(w.replica.theta) == entries[-2].digest for w in whole.workers.values())

    tail = tuple(RoundRecords(entry.seeds, entry.scalars) for entry in entries)
    snapshot = between.rule.snapshot(between.theta, between.state)
    assert len(snapshot) == between.rule.snapshot_bytes(between.theta, between.state)
    for kind in (CatchUp("records", 0, middle, tail[:middle]), CatchUp("snapshot", 0, middle, snapshot=snapshot)):
        late = make_worker(spec, 3).replica
        late.catch_up(through_a_plan(spec, kind))
        assert late.digest() == entries[middle - 1].digest and same(late.state, between.state)
        late.catch_up(through_a_plan(spec, CatchUp("records", middle, spec.rounds, tail[middle:])))
        assert torch.equal(late.theta, server.theta) and same(late.state, server.state)

    halted = start(folder / "halted", spec)
    for _ in range(middle):
        halted.round()
    halted.coordinator.open_round()  # killed with a round in flight
    halted.ledger.close()
    resumed = start(folder / "halted", spec)
    assert same(resumed.coordinator.replica.state, between.state)
    assert resumed.finish() == head
    return whole


def check_late_client(folder: Path, spec: RunSpec, kind: str) -> None:
    """A client that joins a running run stands where the others do, by records or by a snapshot as is cheaper."""
    spec = dataclasses.replace(spec, rounds=6)
    run = start(folder, spec, clients=range(3))
    for _ in range(4):
        run.round()
    late = run.join(3)
    summary = run.round()
    caught = run.plans[4, 3][0].catch_up
    assert caught.kind == kind and summary.accepted == 4 and not summary.dropped
    assert torch.equal(late.replica.theta, at(run, 4).theta) and same(late.replica.state, at(run, 4).state)
