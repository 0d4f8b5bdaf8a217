"""What a run will cost before it starts: bytes, forward passes and seconds."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedzo.evaluation import Batch, LossRequest, Request
from fedzo.evaluation.gradients import DerivativeRequest
from fedzo.experiment import Experiment
from fedzo.federation.ledger import NO_DIGEST
from fedzo.federation.messages import CatchUp, Contribution, Held, Plan, RoundRecords
from fedzo.federation.randomness import choose, derive, round_seeds, sample_clients
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec
from fedzo.federation.worker import Worker
from fedzo.optimizers import Records

# Of Flower 1.41 in deployment with resident workers and TLS, measured by simulations/bench_rounds.py on 2 CPU cores in
# November 2026: a round whose clients have nothing to do, in seconds;
FLOWER_SECONDS = 4.9
# and what polls and object trees add a round and node, in bytes.
FLOWER_BYTES = 19_000
# The share of a round that the transport should be less than.
SHARE = 0.1


@dataclass(frozen=True)
class Payload:
    """What fedzo sends in each round of a run in which every client that is asked answers; as in `RoundSummary`.

    Attributes:
        asked: clients.
        down, up: bytes to and from all of them.
        artifacts: the part of `down` that is masks and gradients.
        caught: records that their catch-ups hold, together.
        records: that a round writes.
        late: bytes that bring a new client to the last round, without its plan's own.
        snapshot: bytes of a snapshot, which is sent where records would be more.
    """

    asked: tuple[int, ...]
    down: tuple[int, ...]
    up: tuple[int, ...]
    artifacts: tuple[int, ...]
    caught: tuple[int, ...]
    records: tuple[int, ...]
    late: int
    snapshot: int


def payload(spec: RunSpec, replica: Replica, mask_bytes: int = 0) -> Payload:
    """The bytes of a run. Their sizes are those of messages that are made here as the parties make them.

    Where nobody may know who is asked, a draw by the run's seed stands for the true one.

    Args:
        replica: at theta0; says how large a snapshot is.
        mask_bytes: of the artifact that every client is handed before the first round.
    """
    steps, queries, terms = spec.local_steps, spec.queries, spec.terms
    entries = sum(length for _, length in replica.rule.ranges)
    snapshot = replica.rule.snapshot_bytes(replica.theta, replica.state)
    clip = 0.0 if terms is None else terms.clip
    seeds = _zeros(steps, queries, np.uint64)
    plan = Plan(spec.run_id, 0, 0, seeds, spec.eps, spec.batch_size, NO_DIGEST, CatchUp("none", 0, 0), clip=clip)
    answered = _answered(spec, entries)
    poisson = terms is not None and terms.secret and terms.sampling == "poisson"
    rate = terms.rate if terms is not None and poisson else spec.client_rate
    applied = np.zeros(spec.clients, dtype=np.int64)
    # Bytes, records, and bytes of gradients, of the first 0, 1, ... rounds.
    sizes, counts, gradients = np.zeros((3, spec.rounds + 1), dtype=np.int64)
    asked, down, artifacts, caught = [], [], [], []
    for round_ in range(spec.rounds):
        drawn = sample_clients(derive(spec.seed, "sampling", round_), spec.clients, rate)
        drawn = drawn[: spec.clients_per_round] if spec.clients_per_round else drawn
        since = applied[drawn]
        missed = sizes[round_] - sizes[since]
        whole = missed > snapshot
        handed = mask_bytes * spec.clients if round_ == 0 else 0
        asked.append(len(drawn))
        down.append(handed + len(drawn) * plan.nbytes + int(np.where(whole, snapshot, missed).sum()))
        artifacts.append(handed + int((gradients[round_] - gradients[since])[~whole].sum()))
        caught.append(int((counts[round_] - counts[since])[~whole].sum()))
        applied[drawn] = round_
        made = _records(spec, len(drawn), entries)
        sizes[round_ + 1] = sizes[round_] + made.nbytes
        counts[round_ + 1] = counts[round_] + made.seeds.size
        gradients[round_ + 1] = gradients[round_] + (0 if made.gradients is None else 4 * made.gradients.size)
    return Payload(
        tuple(asked), tuple(down), tuple(answered * number for number in asked), tuple(artifacts), tuple(caught),
        tuple(np.diff(counts).tolist()), min(snapshot, int(sizes[spec.rounds - 1])), snapshot,
    )  # fmt: skip


def _zeros(steps: int, width: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """[steps, width] that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype=dtype), (steps, width))


def _answered(spec: RunSpec, entries: int) -> int:
    """The bytes of a client's answer; with a secure sum, of its masked vector too."""
    steps, queries, sanitiser = spec.local_steps, spec.queries, spec.sanitiser
    if spec.terms is not None and spec.terms.mode == "client-secagg":
        assert sanitiser is not None
        return len(Held(spec.run_id, 0, 0).to_bytes()) + np.zeros(sanitiser.coordinates, dtype=np.int64).nbytes
    private = sanitiser is not None
    answer = Contribution(
        spec.run_id, 0, 0, _zeros(steps, queries, np.uint64), _zeros(steps, spec.scalars * queries, np.float32),
        None if private else 1, None if private else 0.0,
        _zeros(steps, entries, np.float32) if entries else None,
        None if sanitiser is None else np.zeros(sanitiser.counts, dtype=np.float32),
    )  # fmt: skip
    return len(answer.to_bytes())


def _records(spec: RunSpec, asked: int, entries: int) -> RoundRecords:
    """What a round in which so many clients answered writes."""
    summed = spec.terms is not None and not spec.terms.local
    width = spec.queries if summed or spec.seeds == "shared" else spec.queries * asked
    if not summed and asked < max(1, spec.quorum):
        width = 0
    if spec.terms is not None and spec.terms.mode == "client-secagg" and asked < spec.terms.survivors:
        width = 0
    steps = spec.local_steps
    return RoundRecords(
        _zeros(steps, width, np.uint64), _zeros(steps, spec.scalars * width, np.float32),
        _zeros(steps, entries, np.float32) if entries and width else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Seconds that parts of a run take.

    Attributes:
        step: a local step of a client, on average over a run's steps.
        record: applying one record to theta.
        digest: hashing theta.
        example: evaluating one example.
    """

    step: float
    record: float = 0.0
    digest: float = 0.0
    example: float = 0.0


class _First:
    """The first examples of a data set."""

    def __init__(self, data: Any, count: int) -> None:
        self._data, self._count = data, min(count, len(data))

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        batch: Batch = self._data.batch(indices)
        return batch


def measure(experiment: Experiment, spec: RunSpec) -> Speed:
    """How fast this machine is, by warmed local steps on validation data, one update and a batch evaluated."""
    own = replace(spec, local_steps=1, privacy={})
    replica, data = experiment.replica(own), experiment.validation
    part = _First(data, spec.batch_size)
    worker = Worker(0, replica, part, fingerprint="", space_hash="", theta0="")
    assign = replica.rule.setup.structure.assign
    seeds = np.stack([assign(row) for row in round_seeds(spec.seed, "independent", 0, 0, (1, spec.queries))])
    plan = Plan(own.run_id, 0, 0, seeds, spec.eps, spec.batch_size, NO_DIGEST, CatchUp("none", 0, 0))
    passed = 0

    def step() -> None:
        nonlocal passed
        passed, asking = 0, worker.round(plan)
        with suppress(StopIteration):
            request = next(asking)
            while True:
                passed += _passes(request)
                request = asking.send(experiment.evaluator.answer(request))

    step()
    taken = _seconds(step, again=True)
    # Clients have other numbers of examples than are here, and a method's first step may be larger than its others.
    total = max(1, len(experiment.splits.train) // spec.clients or len(part))
    estimator, queries = own.build_estimator(), spec.queries
    wanted = estimator.evaluated(queries, spec.batch_size, total)
    wanted += (experiment.config.step_forwards - estimator.forwards(queries)) * min(spec.batch_size, total)
    chosen = choose(derive(spec.seed, "cost"), len(data), experiment.config.evaluation.batch_size)
    batch = data.batch(chosen)
    experiment.evaluator.scores(replica.theta, batch)
    example = _seconds(lambda: experiment.evaluator.scores(replica.theta, batch), again=True) / len(chosen)
    entries = sum(length for _, length in replica.rule.ranges)
    zeros = np.zeros((1, spec.scalars * queries), dtype=np.float32)
    moved = Records(0, seeds, zeros, np.zeros((1, entries), dtype=np.float32) if entries else None)
    record = _seconds(lambda: replica.apply([moved])) / queries
    return Speed(taken * wanted / passed, record, _seconds(replica.digest), example)


def _passes(request: Request) -> int:
    """Examples that pass forward for a request, as `Estimator.forwards` counts them."""
    if isinstance(request, LossRequest):
        return (request.origin + len(request.offsets) * len(request.seeds)) * len(request.batch)
    return len(request.batch) * (2 * len(request.seeds) if isinstance(request, DerivativeRequest) else 1)


def _seconds(function: Callable[[], object], again: bool = False) -> float:
    """Seconds that a call takes; `again`: the median of up to 9 calls, while they take half a second together."""
    taken: list[float] = []
    while not taken or (again and len(taken) < 9 and sum(taken) < 0.5):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return median(taken)


def plan_rounds(experiment: Experiment, *, speed: Callable[[RunSpec], Speed | None]) -> dict[str, Any]:
    """The figures of a run by name, before there is one.

    Args:
        speed: gives how fast clients and server are, from the run's header; None: no seconds are told but Flower's.
    """
    config = experiment.config
    # A rate changes nothing here, and "auto" would take forward passes.
    spec = experiment.spec(1.0 if config.method.learning_rate == "auto" else None)
    mask = len(experiment.artifacts[spec.mask]) if spec.mask else 0
    sent = payload(spec, experiment.replica(spec), mask)
    plans, rounds, steps = sum(sent.asked), spec.rounds, spec.local_steps
    down, up, masks = sum(sent.down), sum(sent.up), mask * spec.clients
    figures: dict[str, Any] = {
        "rounds": rounds,
        "clients": spec.clients,
        "clients_asked_a_round": plans / rounds,
        "local_steps": steps,
        "trainable": spec.size,
        "plan_bytes": round((down - masks) / max(1, plans)),
        "answer_bytes": up // max(1, plans),
        "bytes_down_per_client": round(down / spec.clients),
        "bytes_up_per_client": round(up / spec.clients),
        "artifact_bytes": sum(sent.artifacts),
        "initial_bytes": len(experiment.initial),
        "late_client_bytes": sent.late,
        "snapshot_bytes": sent.snapshot,
        "payload_bytes": down + up,
        "flower_bytes": FLOWER_BYTES * rounds * spec.clients,
        "forwards_a_step": config.step_forwards,
        "forwards": round(plans * steps * config.step_forwards),
        "transport_seconds": round(FLOWER_SECONDS * rounds, 1),
    }
    found = speed(spec)
    if found is not None:
        figures |= _times(experiment, spec, sent, found)
    return figures


def _times(experiment: Experiment, spec: RunSpec, sent: Payload, speed: Speed) -> dict[str, float | int]:
    """The seconds of a run in one process, where clients work one after the other, and in deployment."""
    plans, rounds, steps = sum(sent.asked), spec.rounds, spec.local_steps
    validations = 1 + math.ceil(rounds / (experiment.config.evaluation.every or rounds))
    examples = validations * len(experiment.validation)
    examples += 0 if experiment.test is None else 2 * len(experiment.test)
    evaluations = speed.example * examples
    digests = speed.digest * sum(map(spec.has_digest, range(rounds)))
    server = speed.record * sum(sent.records) + digests + evaluations
    work = steps * speed.step + (steps - 1) * spec.queries * speed.record  # of a client in a round
    # In one process clients share a replica, which goes through each round once.
    local = server + plans * work + speed.record * sum(sent.records) + digests
    caught = sum(records / max(1, asked) for records, asked in zip(sent.caught, sent.asked, strict=True))
    deployment = server + digests + rounds * (FLOWER_SECONDS + work) + speed.record * caught
    return {
        "step_seconds": speed.step,
        **({"evaluation_seconds": evaluations} if speed.example else {}),
        "local_seconds": local,
        "deployment_seconds": deployment,
        "transport_share": FLOWER_SECONDS * rounds / deployment,
        "local_steps_for_a_tenth": math.floor((1.0 / SHARE - 1.0) * FLOWER_SECONDS / speed.step) + 1,
    }
