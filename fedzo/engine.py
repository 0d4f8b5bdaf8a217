"""Runs a run: the round loop over any transport, and the transport within one process."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from fedzo import __version__
from fedzo.config import Config
from fedzo.divergence import Watch, diverged
from fedzo.errors import DivergedError, LedgerError, RunError
from fedzo.evaluation import Evaluator
from fedzo.events import Events, recorded
from fedzo.experiment import Experiment, check_terms
from fedzo.federation.coordinator import Coordinator, RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Plan, decode
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec
from fedzo.federation.worker import Worker
from fedzo.privacy.mechanisms import Ints
from fedzo.privacy.secure_sum import LEAST_CLIENTS
from fedzo.run_folder import BUDGETS, MetricsLog, RunFolder
from fedzo.tasks.metrics import quality

Parcel = tuple[int, bytes]
# Takes (client, plan) parcels, gives (client, answer) parcels back in any order; a lost client gives none.
Exchange = Callable[[Iterable[Parcel]], Iterable[Parcel]]
# Takes clients that hold contributions, and how many of them a sum needs, gives the clients that are in it and the sum
# int64 [entries] of their vectors; None: too few remained, and nothing was revealed.
Add = Callable[[Sequence[int], int], tuple[tuple[int, ...], Ints] | None]


@dataclass(frozen=True)
class Transport:
    """How plans reach clients and answers come back.

    Attributes:
        exchange: plans for answers.
        add: the secure sum of what clients hold; None: the transport has none.
        ready: called before every round; admits and dismisses clients, and returns when there are enough.
        farewell: called once, when no more rounds will come, however that happened.
    """

    exchange: Exchange
    add: Add | None = None
    ready: Callable[[], None] = lambda: None
    farewell: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class TimedRound(RoundSummary):
    """A round as it was just played; the ledger does not keep what is added here.

    Attributes:
        replies: messages that came back.
        seconds: from the first plan made to the commit.
        latency_median, latency_max: seconds between the plans' leaving and a reply's coming, None when none came. In
            one process, where clients work one after the other, that is the time until their turn has passed.
    """

    replies: int = 0
    seconds: float = 0.0
    latency_median: float | None = None
    latency_max: float | None = None

    def kept(self, secret: bool) -> dict[str, Any]:
        hidden = ("replies", "seconds", "latency_median", "latency_max") if secret else ()
        return {name: None if name in hidden else value for name, value in super().kept(secret).items()}


class Observer(Protocol):
    """Is told what happened, after it is committed."""

    def round(self, summary: TimedRound) -> None: ...

    def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None: ...


def answer(worker: Worker, evaluator: Evaluator, plan: bytes) -> bytes:
    """What a resident worker answers to a plan: its requests are answered one by one."""
    message = decode(plan)
    if not isinstance(message, Plan):
        raise RunError("a worker was sent something else than a plan")
    return evaluator.run(worker.round(message)).to_bytes()


class Bases:
    """What a process keeps of a run for its clients: for each distinct base a model, and a replica of theta.

    Args:
        config: the run's; says which client is on which base.
        make: an experiment from a client's configuration; called once for each base.
    """

    def __init__(self, config: Config, spec: RunSpec, make: Callable[[Config], Experiment]) -> None:
        self._config, self._spec, self._make = config, spec, make
        self.kept: dict[str, tuple[Experiment, Replica]] = {}

    def of(self, client: int) -> tuple[Experiment, Replica]:
        """Those of a client; made when first asked for."""
        config = self._config.for_client(client)
        base = config.model.quantisation
        if base not in self.kept:
            experiment = self._make(config)
            self.kept[base] = experiment, experiment.replica(self._spec)
        return self.kept[base]


def in_process(experiment: Experiment, coordinator: Coordinator, bases: Bases | None = None) -> Transport:
    """The transport of one process: workers on the same base share its model and a replica, apart from the server's.

    A bfloat16 theta is the model's weights, so the server's replica is the workers' too: it stands where a plan wants
    it, and a plan's records are skipped. A worker with several local steps takes them on a copy. A client's examples
    are tokenised when it is first asked: of many clients few are in a round.

    Every plan and answer crosses as bytes, as it would on a wire. Workers are handed the mask, and its bytes counted.
    Clients keep their privacy budgets in the run's folder. A secure sum is plain addition here, where one process is
    all parties: it is as exact, and hides nothing.
    """
    spec, budgets = coordinator.spec, coordinator.ledger.path.parent / BUDGETS
    bases = bases or Bases(experiment.config, spec, lambda config: experiment.on_base(config.model.quantisation))
    if spec.theta_dtype == "bfloat16":
        bases.kept[experiment.config.model.quantisation] = experiment, coordinator.replica
    workers: dict[int, tuple[Worker, Evaluator]] = {}
    for number in range(spec.clients):
        party, replica = bases.of(number)
        workers[number] = party.worker(number, replica, budgets, later=True), party.evaluator
        coordinator.admit(workers[number][0].hello())
        if party.mask is not None and coordinator.ledger.rounds == 0:
            coordinator.sent_artifact(len(experiment.artifacts[spec.mask]))

    def exchange(parcels: Iterable[Parcel]) -> Iterable[Parcel]:
        for number, plan in parcels:
            yield number, answer(*workers[number], plan)

    def add(clients: Sequence[int], least: int) -> tuple[tuple[int, ...], Ints] | None:
        vectors = [held for number in clients if (held := workers[number][0].held) is not None]
        return (tuple(clients), np.sum(vectors, axis=0)) if len(vectors) >= least else None

    return Transport(exchange, add)


def play_round(coordinator: Coordinator, transport: Transport) -> TimedRound:
    """One round: plans out, answers in, their secure sum where it is one, commit.

    Raises:
        RunError: the run needs a secure sum and the transport has none.
    """
    began, latencies = time.perf_counter(), list[float]()
    plans = coordinator.open_round()
    while plans:
        # Bytes when they leave, one by one: with snapshots of theta in them they may be more than the memory holds.
        parcels, plans = ((plan.client, plan.to_bytes()) for plan in plans), []
        left = time.perf_counter()
        for client, data in transport.exchange(parcels):
            latencies.append(time.perf_counter() - left)
            if (again := coordinator.receive(client, data)) is not None:
                plans.append(again)
    if holders := coordinator.holders:
        if transport.add is None:
            raise RunError('privacy.mode = "client-secagg" needs a transport with secure sums, which this one has not')
        if len(holders) >= max(coordinator.threshold, LEAST_CLIENTS):
            coordinator.receive_total(transport.add(holders, coordinator.threshold))
    summary = coordinator.close_round()
    return TimedRound(
        **vars(summary), replies=len(latencies), seconds=round(time.perf_counter() - began, 6),
        latency_median=round(median(latencies), 6) if latencies else None,
        latency_max=round(max(latencies), 6) if latencies else None,
    )  # fmt: skip


class _Told:
    """Tells rounds and evaluations as events."""

    def __init__(self, ledger: Ledger, events: Events) -> None:
        self._events, self._secret = events, ledger.spec.terms is not None and ledger.spec.terms.secret

    def round(self, summary: TimedRound) -> None:
        fields = summary.kept(self._secret)
        self._events.tell("round-committed", round_=fields.pop("round"), **fields)

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        self._events.tell("evaluation", rounds=rounds, split=split, metrics=dict(metrics))


@contextmanager
def _told(ledger: Ledger, begun: bool) -> Iterator[_Told]:
    """Tells begin and end of a run, or of its going on, as events."""
    events, spec = Events(ledger), ledger.spec
    events.tell("run-resumed" if begun else "run-started", rounds=spec.rounds, clients=spec.clients, fedzo=__version__)
    try:
        yield _Told(ledger, events)
    except BaseException as error:
        with suppress(RunError):  # a full disk: the first error is the one to tell
            events.failed(error)
        raise
    if ledger.ended:
        events.tell("run-ended", reason=ledger.ended)
    else:
        events.tell("run-finished", ledger_hash=ledger.head.hex())


def run_rounds(
    experiment: Experiment, coordinator: Coordinator, connect: Callable[[], Transport], observers: Sequence[Observer]
) -> None:
    """Plays the rounds that are left, evaluates when due or in doubt, and tells the observers.

    Args:
        connect: makes the transport and registers the clients; called once, when rounds are left.

    Raises:
        DivergedError: the run has diverged (`fedzo.divergence`).
        RunError: the base model's loss is not finite.
    """
    ledger, every = coordinator.ledger, experiment.config.evaluation.every
    watch = Watch(ledger, experiment.config.evaluation.divergence)

    def evaluate(split: str) -> None:
        data = experiment.validation if split == "validation" else experiment.test
        if data is None or ledger.rounds in ledger.evaluations(split):
            return
        metrics = experiment.evaluate(coordinator.replica.theta, data)
        ledger.record_evaluation(ledger.rounds, split, metrics)
        for observer in observers:
            observer.evaluation(ledger.rounds, split, metrics)
        if split == "validation":
            watch.evaluation(ledger.rounds, metrics["loss"])

    def look() -> None:
        if watch.doubtful:
            evaluate("validation")
        watch.check()

    if ledger.rounds == 0:
        evaluate("test")
    if ledger.rounds == 0 or (every and ledger.rounds % every == 0):
        evaluate("validation")
    look()
    with ExitStack() as stack:
        if not coordinator.finished:
            transport = connect()
            stack.callback(transport.farewell)
        while not coordinator.finished:
            transport.ready()
            try:
                summary = play_round(coordinator, transport)
            except DivergedError as error:
                raise diverged(ledger, str(error)) from None
            for observer in observers:
                observer.round(summary)
            watch.round(summary.kept(ledger.spec.terms is not None and ledger.spec.terms.secret))
            if every and ledger.rounds % every == 0:
                evaluate("validation")
            look()
    if coordinator.ended:
        ledger.record_end(coordinator.ended)
    evaluate("validation")
    watch.check()
    evaluate("test")


def start(folder: RunFolder, experiment: Experiment) -> Ledger:
    """A new ledger for an experiment. A learning rate "auto" becomes a number, in the folder's config.toml too."""
    spec = experiment.spec()
    if experiment.config.method.learning_rate == "auto":
        folder.settle(experiment.config.with_learning_rate(spec.learning_rate), experiment.step_size)
    return Ledger.create(folder.ledger, spec, experiment.artifacts)


# What the hashes in a ledger's header stand for.
_MEANING = {
    "fingerprint": "fingerprint (of the base model)",
    "mask": "mask (SHA-256 of its artifact)",
    "space_hash": "space_hash (of the trainable parameters)",
    "experiment": "experiment (hash of seed, model, space, task and data in config.toml)",
}


def check_same(ledger: Ledger, experiment: Experiment) -> None:
    """Checks that a ledger is this experiment's.

    Raises:
        LedgerError: a field of the header differs; the message names it.
    """
    check_terms(experiment.config, ledger)
    wanted, found = vars(experiment.spec()), vars(ledger.spec)
    # theta0 may differ in what the ledger itself holds; the replay checks it.
    skip = {"privacy"} | ({"theta0", "initial"} if ledger.spec.initial else set())
    for name, value in wanted.items():
        if name not in skip and found[name] != value:
            what = _MEANING.get(name, name)
            raise LedgerError(
                f"{ledger.path} belongs to another run: its {what} is {found[name]!r}, model and config.toml give "
                f"{value!r}"
            )


def run(
    experiment: Experiment,
    folder: RunFolder,
    observers: Sequence[Observer] = (),
    connect: Callable[[Experiment, Coordinator], Transport] = in_process,
) -> Ledger:
    """Starts or goes on with the run of a folder until its last round; returns its ledger, open."""
    with folder.locked():
        begun = folder.ledger.exists()
        ledger = Ledger(folder.ledger, write=True) if begun else start(folder, experiment)
        try:
            with recorded(folder.event_log), _told(ledger, begun) as told:
                check_same(ledger, experiment)
                coordinator = Coordinator(ledger, experiment.replica(ledger.spec))
                with closing(MetricsLog(folder, ledger)) as log:
                    observed: list[Observer] = [log, told, *observers]
                    run_rounds(experiment, coordinator, lambda: connect(experiment, coordinator), observed)
        except BaseException:
            ledger.close()
            raise
        return ledger


def best_round(ledger: Ledger) -> int:
    """The number of rounds after which validation was best: highest accuracy or F1, else lowest loss.

    Of equals the earliest.

    Raises:
        RunError: the run has not been evaluated yet.
    """
    evaluations = ledger.evaluations("validation")
    if not evaluations:
        raise RunError(f"{ledger.path} has no evaluation on validation data yet")
    return max(sorted(evaluations), key=lambda rounds: quality(evaluations[rounds]))


def choose_round(ledger: Ledger, text: str) -> int:
    """Rounds to replay from "last", "best" or a number."""
    if text == "last":
        return ledger.rounds
    if text == "best":
        return best_round(ledger)
    if not text.isdecimal() or int(text) > ledger.rounds:
        raise RunError(f'round {text!r}: wanted "last", "best" or a number up to {ledger.rounds}')
    return int(text)
