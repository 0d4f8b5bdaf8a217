"""A fuzzer against the server: malformed replies of many kinds among the right answers of honest clients.

    python simulations/fuzz_server.py [--replies 10000] [--seed 0] [--quick]

Six runs of the embedded model: plain, with local steps and seeds of each client's own, with gradients, with two
scalars a query, private, and with a secure sum. Each is recorded first, its odd clients silent. It is then played again
with the recorded answers while the fuzzer replies in the odd clients' names, in the names of clients that were not
asked and of clients that there are none of: at any moment, also between two rounds. Last comes Flower: the ServerApp
among nodes that answer its greetings and plans with records of other keys, types and sizes, or with errors.

Nothing may escape but a ProtocolError of a handshake, no reply may be taken, every kind must be dropped for a reason
that fits it, the ledgers must equal those of the recorded runs bit for bit, no line that is printed may hold what a
terminal would obey, and memory must stand where it stood at a tenth of the replies. Ends with one line of JSON; the
exit code is 1 if any of that does not hold.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from hostile import CLIENTS, KINDS, VALUES, Lab, Played, honest

from fedzo import engine
from fedzo.config import from_flat, load_config
from fedzo.errors import ProtocolError, shown
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Hello
from fedzo.federation.replica import Replica

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.toml"
PRIVATE = ("privacy.epsilon=1e4", "privacy.delta=1e-3", "privacy.clip=8.0", "federation.aggregation=uniform")
CASES: dict[str, tuple[str, ...]] = {
    "plain": ("federation.clients_per_round=8",),
    "local steps": ("federation.local_steps=3", "federation.seeds=independent", "federation.clients_per_round=8"),
    "gradients": ("method.first_order=*norm*", "federation.clients_per_round=8"),
    "two scalars": ("method.estimator=hizoo", "method.optimizer=hizoo", "method.directions=gaussian"),
    "private": ("privacy.mode=client-local", "privacy.clipping=adaptive", *PRIVATE),
    "secure sum": ("privacy.mode=client-secagg", "privacy.tolerance=6", *PRIVATE),
}
# Bytes that every process keeps in lists and caches; a reply that is kept takes some hundred.
FLAT, FLAT_RSS = 256 * 1024, 24 * 2**20


class Listening(Coordinator):
    """Keeps the hellos that it is given."""

    def __init__(self, ledger: Ledger, replica: Replica) -> None:
        self.hellos: list[Hello] = []
        super().__init__(ledger, replica)

    def admit(self, hello: Hello) -> None:
        self.hellos.append(hello)
        super().admit(hello)


@dataclass
class Recorded:
    """A run whose odd clients were silent."""

    name: str
    experiment: Experiment
    hellos: list[Hello]
    rounds: list[Played]
    ledger: Ledger

    @staticmethod
    def play(name: str, rounds: int, folder: Path) -> "Recorded":
        overrides = (f"federation.rounds={rounds}", f"data.clients={CLIENTS}", "data.partition=iid", *CASES[name])
        experiment = Experiment(load_config(CONFIG, overrides).resolved())
        folder.mkdir()
        spec = experiment.spec()
        ledger = Ledger.create(folder / "recorded.sqlite", spec, experiment.artifacts)
        coordinator = Listening(ledger, experiment.replica(spec))
        transport, played = engine.in_process(experiment, coordinator), []
        while not coordinator.finished:
            plans = {plan.client: plan.to_bytes() for plan in coordinator.open_round()}
            answers = dict(transport.exchange(list(plans.items())))
            for client in filter(honest, answers):
                coordinator.receive(client, answers[client])
            total = None
            if coordinator.holders and transport.add is not None:
                total = transport.add(coordinator.holders, coordinator.threshold)
                coordinator.receive_total(total)
            played.append(Played(plans, answers, total, coordinator.close_round().accepted))
        return Recorded(name, experiment, coordinator.hellos, played, ledger)


@dataclass
class Tally:
    """What became of the replies.

    Attributes:
        outcomes: kind -> outcome -> replies; an outcome is the reason of a drop, or "new plan", "ignored", "refused".
        escaped: exceptions, by kind and type.
        taken: replies that became part of a round.
        unexpected: kind and outcome, where they do not fit each other.
        unfit: texts that may not be shown.
        other_plans: plans of honest clients that were not as recorded.
        plan_bytes: of plans that replies were answered with.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    escaped: Counter[str] = field(default_factory=Counter)
    taken: int = 0
    unexpected: Counter[str] = field(default_factory=Counter)
    unfit: list[str] = field(default_factory=list)
    other_plans: int = 0
    plan_bytes: int = 0

    @property
    def replies(self) -> int:
        return sum(counter.total() for counter in self.outcomes.values())

    def add(self, kind: str, outcome: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1

    def look(self, text: str) -> None:
        """Looks at a text that a terminal or a log will show."""
        if not (text.isascii() and text.isprintable() and len(text) < 500):
            self.unfit.append(text[:200])


class Fuzzed(Lab):
    """A recorded run that is played again, among hostile replies."""

    def __init__(self, recorded: Recorded, rng: np.random.Generator, tally: Tally) -> None:
        spec, path = recorded.ledger.spec, recorded.ledger.path.with_name("fuzzed.sqlite")
        self.recorded, self.tally = recorded, tally
        self.ledger = Ledger.create(path, spec, recorded.experiment.artifacts)
        super().__init__(Coordinator(self.ledger, recorded.experiment.replica(spec)), recorded.rounds, rng, [], [])
        for hello in recorded.hellos:
            self.coordinator.admit(hello)

    def hello(self) -> None:
        """A handshake with a field of a wrong value or type, whose refusal must be fit to be shown."""
        hello = self.recorded.hellos[int(self.one_of(range(1, CLIENTS, 2)))]
        name = self.one_of([stated.name for stated in fields(Hello)])
        may = {"examples": int, "applied": int}.get(name)  # an integer may be right
        value = self.one_of([value for value in VALUES if may is None or type(value) is not may])
        if getattr(hello, name) == value and type(getattr(hello, name)) is type(value):
            return
        outcome = "admitted"
        try:
            self.coordinator.admit(replace(hello, **{name: value}))
        except ProtocolError as error:
            outcome = "refused"
            self.tally.look(str(error))
        except Exception as error:
            outcome = "escaped"
            self.tally.escaped[f"hello: {type(error).__name__}"] += 1
        self.tally.add("hello", outcome)
        if outcome != "refused":
            self.tally.unexpected[f"hello, {name}: {outcome}"] += 1

    def deliver(self, kind: str, client: int, data: bytes) -> None:
        """Hands a hostile reply to the coordinator."""
        current = self.coordinator._open
        before = Counter() if current is None else current.dropped.copy()
        try:
            plan = self.coordinator.receive(client, data)
        except Exception as error:
            self.tally.escaped[f"{kind}: {type(error).__name__}"] += 1
            outcome = "escaped"
        else:
            if current is None:
                outcome = "ignored"
            elif plan is not None:
                outcome = "new plan"
                self.tally.plan_bytes += plan.nbytes
            else:
                outcome = next(iter(current.dropped - before), "taken")
        self.tally.add(kind, outcome)
        self.tally.taken += outcome == "taken"
        fits = {"ignored"} if current is None else KINDS[kind][1] | ({"malformed"} if self.secure else set())
        if outcome not in fits:
            self.tally.unexpected[f"{self.recorded.name}, {kind}: {outcome}"] += 1

    def round(self, count: int) -> None:
        """Plays a round with at least so many hostile replies."""
        played = self.now
        for _ in range(max(1, count // 20)):
            self.hello()
        for _ in range(max(1, count // 20)):
            self.deliver("between rounds", self.anybody(), self.one_of(list(played.answers.values())))
        plans = {plan.client: plan.to_bytes() for plan in self.coordinator.open_round()}
        self.asked, self.delivered = list(plans), []
        self.tally.other_plans += sum(played.plans.get(c) != plan for c, plan in plans.items() if honest(c))
        todo: list[int | None] = [client for client in played.answers if honest(client)]
        todo += [None] * int(count * 0.75)
        for i in self.rng.permutation(len(todo)):
            if (client := todo[i]) is not None:
                self.coordinator.receive(client, played.answers[client])
                self.delivered.append(client)
                continue
            kind = self.one_of(list(KINDS))
            for sender, data in KINDS[kind][0](self):
                self.deliver(kind, sender, data)
        if self.coordinator.holders:
            self.coordinator.receive_total(played.total)
        summary = self.coordinator.close_round()
        if summary.accepted != played.accepted:
            self.tally.unexpected[f"{self.recorded.name}: {summary.accepted} accepted, not {played.accepted}"] += 1


def resident() -> int:
    """Bytes of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory() -> tuple[int, int]:
    """Bytes that Python and numpy hold, and that are in RAM."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], resident()


@contextlib.contextmanager
def shown_to(tally: Tally) -> Iterator[None]:
    """Takes standard output, which can show ASCII only, and looks at every line."""
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii", write_through=True) as out:
        with contextlib.redirect_stdout(out):
            yield
        for line in raw.getvalue().decode("ascii").split("\n"):
            tally.look(line)


def over_flower(folder: Path, rounds: int, strangers: int, rng: np.random.Generator, tally: Tally) -> bool:
    """The ServerApp among hostile nodes; whether its ledger is that of a run without them."""
    sys.path.insert(0, str(ROOT))  # clients/ and server/ are not part of the package
    from hostile_nodes import HostileGrid

    from server import app as server_side

    changes = {
        "data.clients": CLIENTS, "data.limit": 100, "data.partition": "iid", "data.test": "", "evaluation.limit": 16,
        "evaluation.every": 0, "federation.rounds": rounds, "method.batch_size": 4, "runtime.round_timeout": 20.0,
    }  # fmt: skip
    heads = []
    for name, count in (("silent", 0), ("hostile", strangers)):
        grid = HostileGrid(from_flat(changes), folder / name, count, rng, tally.add)
        try:
            with shown_to(tally):
                server_side.app(grid, grid.context(1))
        except Exception as error:
            tally.escaped[f"flower, {name} nodes: {type(error).__name__}: {shown(str(error))}"] += 1
            return False
        with Ledger(folder / name / "ledger.sqlite") as ledger:
            heads.append(ledger.head)
    return heads[0] == heads[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1,200 replies, in four rounds of each run")
    args = parser.parse_args()
    replies, rounds = (1200, 4) if args.quick else (args.replies, 20)
    rng, tally = np.random.default_rng(args.seed), Tally()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recorded = [Recorded.play(name, rounds, folder / name.replace(" ", "-")) for name in CASES]
        print(f"recorded {len(recorded)} runs of {rounds} rounds; {replies} replies to come", flush=True)
        marks: list[tuple[int, int]] = []
        tracemalloc.start()
        runs = [Fuzzed(one, rng, tally) for one in recorded]
        for number in range(rounds):
            for run in runs:
                left = replies * 9 // 10 - tally.replies
                run.round(max(20, left // ((rounds - number) * len(runs))))
            if number in (max(0, rounds // 10 - 1), rounds - 1):
                marks.append(memory())
        tracemalloc.stop()
        equal = {run.recorded.name: run.ledger.head == run.recorded.ledger.head for run in runs}
        for run in runs:
            run.ledger.close()
            run.recorded.ledger.close()
        equal["flower"] = over_flower(
            folder / "flower", rounds, max(20, replies - tally.replies - 5 * rounds), rng, tally
        )
    (traced, rss), (traced_end, rss_end) = marks
    print(f"{'kind':<36}{'replies':>8}  became")
    for kind, outcomes in tally.outcomes.items():
        print(f"{kind:<36}{outcomes.total():>8}  " + ", ".join(f"{name} {n}" for name, n in outcomes.most_common()))
    print(f"ledgers equal to those without the fuzzer: {equal}")
    print(f"bytes at a tenth and at the end: {traced:,} and {traced_end:,} of objects, {rss:,} and {rss_end:,} in RAM")
    for name in ("escaped", "unexpected"):
        for what, count in getattr(tally, name).items():
            print(f"{name}: {what} ({count})")
    for text in tally.unfit[:5]:
        print(f"not fit to be shown: {text!a}")
    reasons = sum(tally.outcomes.values(), Counter[str]())
    figures = {
        "replies": tally.replies,
        "kinds": len(tally.outcomes),
        "outcomes": dict(sorted(reasons.items())),
        "exceptions_escaped": tally.escaped.total(),
        "replies_in_ledger": tally.taken,
        "unexpected": tally.unexpected.total(),
        "texts_unfit": len(tally.unfit),
        "honest_plans_changed": tally.other_plans,
        "plan_bytes_sent_for_replies": tally.plan_bytes,
        "ledgers_equal": all(equal.values()),
        "object_bytes_grown": traced_end - traced,
        "rss_bytes_grown": rss_end - rss,
    }
    print(json.dumps(figures))
    flat = traced_end - traced < FLAT and rss_end - rss < FLAT_RSS
    faults = tally.escaped.total() + tally.taken + tally.unexpected.total() + len(tally.unfit) + tally.other_plans
    if faults or not (flat and figures["ledgers_equal"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
