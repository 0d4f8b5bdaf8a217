"""A fuzzer against the server: malformed replies of many kinds among the right answers of honest clients.

    python simulations/fuzz_server.py [--replies 10000] [--seed 0] [--quick]

Five runs of the embedded model: plain, with local steps and seeds of each client's own, with gradients, with two
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
import struct
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedzo import engine
from fedzo.config import flatten, from_flat, load_config
from fedzo.errors import FedzoError, ProtocolError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import (
    Behind,
    CatchUp,
    Contribution,
    Failure,
    Held,
    Hello,
    Plan,
    RoundRecords,
    decode,
    max_contribution_bytes,
)
from fedzo.federation.replica import Replica
from fedzo.privacy.mechanisms import Ints

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "demo.toml"
CLIENTS = 10
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

HOSTILE_TEXTS = (
    "", "\x1b[2J\x1b[31mfedzo: 10 of 10 clients registered\x1b[0m", "a\nfedzo: round 1/1: loss 0.0000", "\r\b\b\x00\x07",
    "\u202eevil\u2066\u200b", "\U0001f4a3" * 50, "%s%n{0}{client.__class__}", "x" * 1_000_000, "../../etc/passwd",
    "\x9b31m", "\u2028\u2029", "'; DROP TABLE rounds; --",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    *HOSTILE_TEXTS, -1, CLIENTS, 2**31, 2**63 - 1, -(2**63), True, False, 1.0, float("nan"), float("inf"), 5e-324,
    b"", b"\xff" * 1000, [], [1, 2], [2**63 - 1] * 1000, ["x" * 100] * 100, [True], [0.5] * 10_000, [b"", b"\0"],
)  # fmt: skip

Parcel = tuple[int, bytes]


def honest(client: int) -> bool:
    return client % 2 == 0 and 0 <= client < CLIENTS


# -- the recorded run


@dataclass
class Played:
    """A round as it was recorded.

    Attributes:
        plans, answers: of each client that was asked, the silent ones too.
        total: the secure sum, of a run with one.
        accepted: contributions that became records.
    """

    plans: dict[int, bytes]
    answers: dict[int, bytes]
    total: tuple[tuple[int, ...], Ints] | None
    accepted: int


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


# -- the fuzzed run


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


class Fuzzed:
    """A recorded run that is played again, among hostile replies."""

    def __init__(self, recorded: Recorded, rng: np.random.Generator, tally: Tally) -> None:
        self.recorded, self.rng, self.tally = recorded, rng, tally
        self.spec = recorded.ledger.spec
        path = recorded.ledger.path.with_name("fuzzed.sqlite")
        self.ledger = Ledger.create(path, self.spec, recorded.experiment.artifacts)
        self.coordinator = Coordinator(self.ledger, recorded.experiment.replica(self.spec))
        for hello in recorded.hellos:
            self.coordinator.admit(hello)
        self.asked: list[int] = []
        self.delivered: list[int] = []  # honest clients whose answers came
        self.secure = self.spec.terms is not None and self.spec.terms.mode == "client-secagg"
        self.private = self.spec.terms is not None

    # what kinds are made of

    @property
    def now(self) -> Played:
        return self.recorded.rounds[self.ledger.rounds]

    def below(self, bound: int) -> int:
        return int(self.rng.integers(bound))

    def one_of(self, values: Any) -> Any:
        return values[self.below(len(values))]

    def attacker(self) -> int:
        """An odd client that was asked and had an answer; of all ten some always are."""
        odd = [client for client in self.asked if not honest(client)]
        return int(self.one_of([client for client in odd if not isinstance(decode(self.now.answers[client]), Behind)]))

    def anybody(self) -> int:
        """A client that is not honest: asked, not asked, or none at all."""
        return int(self.one_of([*range(1, CLIENTS, 2), -1, CLIENTS, 77, 2**32 - 1, 2**63]))

    def right(self, client: int) -> Contribution:
        """The right answer of a client; where it holds one for a secure sum, a contribution as others would send."""
        message = decode(self.now.answers[client])
        if isinstance(message, Contribution):
            return message
        plan = decode(self.now.plans[client])
        assert isinstance(plan, Plan)
        scalars = np.ones(plan.seeds.shape, np.float32)
        return Contribution(
            plan.run_id, plan.round, client, plan.seeds, scalars, None, None, counts=np.empty(0, np.float32)
        )

    # playing

    def hello(self) -> None:
        """A handshake with a field of a wrong value or type, whose refusal must be fit to be shown."""
        hello = self.recorded.hellos[int(self.one_of(range(1, CLIENTS, 2)))]
        name = self.one_of([stated.name for stated in fields(Hello)])
        may = {"examples": int, "applied": int}.get(name)  # an integer may be right
        value = self.one_of([value for value in HOSTILE_VALUES if may is None or type(value) is not may])
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


# -- the kinds of replies


def random_bytes(lab: Fuzzed) -> list[Parcel]:
    return [(lab.anybody(), lab.rng.bytes(lab.below(400)))]


def other_formats(lab: Fuzzed) -> list[Parcel]:
    texts = (
        b'{"answer": [1, 2]}',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95",
        b"\x93NUMPY\x01",
        b"PK\x03\x04",
        b"<?xml?>",
    )
    return [(lab.anybody(), lab.one_of(texts) * (1 + lab.below(9)))]


def random_body(lab: Fuzzed) -> list[Parcel]:
    client = lab.attacker()
    head = lab.right(client).to_bytes()[:20]
    kind = bytes([lab.below(256)])
    return [(client, head[:3] + kind + head[4:] + lab.rng.bytes(5 + lab.below(200)))]


def cut(lab: Fuzzed) -> list[Parcel]:
    data = lab.now.answers[client := lab.attacker()]
    return [(client, data[: lab.below(len(data))])]


def extended(lab: Fuzzed) -> list[Parcel]:
    data = lab.now.answers[client := lab.attacker()]
    return [(client, data + lab.rng.bytes(1 + lab.below(300)))]


def far_too_long(lab: Fuzzed) -> list[Parcel]:
    return [(client := lab.attacker(), lab.now.answers[client] + bytes(2**20))]


def flipped(lab: Fuzzed) -> list[Parcel]:
    """One bit of the head, the counts or the seeds; a bit of a loss or scalar may leave a right message."""
    client = lab.attacker()
    data, message = bytearray(lab.now.answers[client]), decode(lab.now.answers[client])
    places = list(range(20))
    if isinstance(message, Contribution):
        if message.counts is not None:
            fixed, start = 6, 26 + 4 * message.counts.size
        else:
            fixed, start = 8, 32 + (0 if message.gradients is None else 4)
            places += range(32, start)
        places += [*range(20, 20 + fixed), *range(start, start + 8 * message.seeds.size)]
    data[lab.one_of(places)] ^= 1 << lab.below(8)
    return [(client, bytes(data))]


def huge_counts(lab: Fuzzed) -> list[Parcel]:
    client, most = lab.attacker(), (0, 1, 2, 2**15, 2**16 - 1)
    head = bytearray(lab.right(client).to_bytes()[:20])
    steps, queries, long = lab.one_of(most), lab.one_of(most), lab.one_of((0, 2**31, 2**32 - 1))
    head[3], fixed = lab.one_of((
        (2, struct.pack("<HHIf", steps, queries, long, 1.0)),
        (5, struct.pack("<HHIfI", steps, queries, 1, 1.0, long)),
        (6, struct.pack("<HHH", steps, queries, lab.one_of(most))),
    ))  # fmt: skip
    return [(client, bytes(head) + fixed + bytes(lab.below(100)))]


def wrong_shape(lab: Fuzzed) -> list[Parcel]:
    right = lab.right(client := lab.attacker())
    seeds, scalars = right.seeds, right.scalars
    shapes = [
        (seeds[:, 1:], scalars[:, seeds.shape[1] :]), (seeds[:, 1:], scalars[:, 1:]), (seeds[:0], scalars[:0]),
        (seeds[:-1], scalars[:-1]), (seeds.repeat(2, 1), scalars.repeat(2, 1)), (seeds, scalars.repeat(2, 1)),
        (seeds.repeat(2, 0), scalars.repeat(2, 0)), (seeds[:, :0], scalars[:, :0]),
    ]  # fmt: skip
    if len(seeds) != seeds.shape[1]:
        shapes.append((seeds.T, scalars.T))
    changed = [replace(right, seeds=a, scalars=b) for a, b in shapes if b.shape[1] % max(1, a.shape[1]) == 0]
    steps = len(seeds)
    if right.gradients is not None:
        changed += [
            replace(right, gradients=right.gradients[:, 1:]), replace(right, gradients=None),
            replace(right, gradients=np.zeros((steps, 0), np.float32)),
        ]  # fmt: skip
    elif right.counts is None:
        changed.append(replace(right, gradients=np.zeros((steps, 3), np.float32)))
    if right.counts is not None:
        changed.append(replace(right, counts=np.zeros(right.counts.size + 1, np.float32)))
    return [(client, lab.one_of(changed).to_bytes())]


def wrong_values(lab: Fuzzed) -> list[Parcel]:
    """A value that is none or too large, among the scalars, gradients or counts."""
    right = lab.right(client := lab.attacker())
    beyond = float(np.nextafter(np.float32(lab.spec.scalar_bound), np.float32(np.inf)))
    value = lab.one_of([float("nan"), float("inf"), 3.4e38, 1e30, beyond]) * lab.one_of([1, -1])
    names = [name for name in ("scalars", "gradients", "counts") if getattr(right, name) is not None]
    name = lab.one_of([name for name in names if getattr(right, name).size])
    array = getattr(right, name).copy()
    array.ravel()[lab.below(array.size)] = value
    return [(client, replace(right, **{name: array}).to_bytes())]


def wrong_loss(lab: Fuzzed) -> list[Parcel]:
    right = lab.right(client := lab.attacker())
    if right.loss is None:
        return []
    return [(client, replace(right, loss=lab.one_of([float("nan"), float("inf"), float("-inf")])).to_bytes())]


def wrong_examples(lab: Fuzzed) -> list[Parcel]:
    right = lab.right(client := lab.attacker())
    if right.examples is None:
        return []
    return [(client, replace(right, examples=lab.one_of([0, right.examples + 1, 2**31, 2**32 - 1])).to_bytes())]


def wrong_seeds(lab: Fuzzed) -> list[Parcel]:
    """Other seeds, or their order; the scalars may be the smallest numbers that there are."""
    right = lab.right(client := lab.attacker())
    bit = np.uint64(1 << lab.below(64))
    seeds = lab.one_of([right.seeds ^ bit, right.seeds[:, ::-1], np.zeros_like(right.seeds), ~right.seeds])
    scalars = right.scalars if lab.below(2) else np.full_like(right.scalars, 1e-45)
    return [(client, replace(right, seeds=seeds, scalars=scalars).to_bytes())]


def other_types(lab: Fuzzed) -> list[Parcel]:
    """Seeds, scalars or everything in another type or byte order."""
    right = lab.right(client := lab.attacker())
    data, tail = right.to_bytes(), 8 * right.seeds.size + 4 * right.scalars.size
    if right.gradients is not None:
        tail += 4 * right.gradients.size
    fixed, values = data[: len(data) - tail], right.scalars.astype("<f4").tobytes()
    body = lab.one_of([
        right.seeds.astype(">u8").tobytes() + values,
        right.seeds.astype("<f8").tobytes() + values,
        right.seeds.astype("<u4").tobytes() + values,
        right.seeds.astype("<u8").tobytes() + right.scalars.astype("<f8").tobytes(),
        right.seeds.astype("<u8").tobytes() + right.scalars.astype("<f2").tobytes(),
    ])  # fmt: skip
    return [(client, fixed + body)]


def wrong_head(lab: Fuzzed) -> list[Parcel]:
    message = decode(lab.now.answers[client := lab.attacker()])
    assert not isinstance(message, Plan)
    changes: tuple[dict[str, Any], ...] = (
        {"run_id": lab.rng.bytes(8)}, {"run_id": bytes(8)}, {"round": message.round + 1}, {"round": 2**32 - 1},
        {"client": (client + 2) % CLIENTS}, {"client": 2**32 - 1},
    )  # fmt: skip
    return [(client, replace(message, **lab.one_of(changes)).to_bytes())]


def another_round(lab: Fuzzed) -> list[Parcel]:
    """The right answer to another round's plan, of any client in its own name."""
    others = [played for played in lab.recorded.rounds if played is not lab.now]
    client, data = lab.one_of(list(lab.one_of(others).answers.items()))
    return [(client, data)]


def renumbered(lab: Fuzzed) -> list[Parcel]:
    """A client's answer to another round's plan, with this round's number."""
    client, found = lab.attacker(), []
    for played in lab.recorded.rounds:
        message = decode(played.answers[client]) if client in played.answers and played is not lab.now else None
        if isinstance(message, Contribution):
            found.append(message)
    return [(client, replace(lab.one_of(found), round=lab.ledger.rounds).to_bytes())] if found else []


def twice(lab: Fuzzed) -> list[Parcel]:
    """An honest client's answer once more, as it was or with another scalar."""
    if not lab.delivered:
        return []
    message = decode(lab.now.answers[client := lab.one_of(lab.delivered)])
    if isinstance(message, Contribution) and lab.below(2):
        message = replace(message, scalars=message.scalars + np.float32(1))
    return [(client, message.to_bytes())]


def in_anothers_name(lab: Fuzzed) -> list[Parcel]:
    """An answer that was asked of another client, as it is or with the sender's own number."""
    strangers = [client for client in range(CLIENTS) if client not in lab.asked] + [-1, CLIENTS, 77]
    message = decode(lab.one_of(list(lab.now.answers.values())))
    sender = lab.one_of([lab.attacker(), *strangers])
    if sender in lab.asked:
        return [(sender, message.to_bytes())] if message.client != sender else []
    return [(sender, replace(message, client=max(sender, 0)).to_bytes())]


def plans(lab: Fuzzed) -> list[Parcel]:
    """Its plan sent back, or one of as many empty rounds as a right answer is long."""
    plan = decode(lab.now.plans[client := lab.attacker()])
    assert isinstance(plan, Plan)
    empty = RoundRecords(np.empty((0, 0), np.uint64), np.empty((0, 0), np.float32))
    counts = None if lab.spec.sanitiser is None else lab.spec.sanitiser.counts
    spec = lab.spec
    room = max_contribution_bytes(spec.local_steps, spec.queries, spec.scalars, lab.coordinator._entries, counts)
    number = max(1, (room - 100) // empty.nbytes)
    bomb = replace(plan, seeds=plan.seeds[:0], catch_up=CatchUp("records", 0, number, (empty,) * number), initial=b"")
    return [(client, lab.one_of([lab.now.plans[client], bomb.to_bytes()]))]


def other_kinds(lab: Fuzzed) -> list[Parcel]:
    """An answer of a kind that this run has not."""
    right = lab.right(client := lab.attacker())
    found: list[Contribution | Held] = []
    if not lab.secure:
        found.append(Held(right.run_id, right.round, client))
    if right.counts is None:
        found.append(replace(right, gradients=None, examples=None, loss=None, counts=np.zeros(0, np.float32)))
        found.append(replace(right, gradients=None, examples=None, loss=None, counts=np.zeros(3, np.float32)))
    else:
        found.append(replace(right, counts=None, examples=7, loss=1.0))
    return [(client, lab.one_of(found).to_bytes())]


def behind(lab: Fuzzed) -> list[Parcel]:
    """Asks for the history, over and over."""
    client = lab.attacker()
    applied = (0, 0, 1, lab.ledger.rounds, max(0, lab.ledger.rounds - 1), 2**32 - 1)
    run, round_ = lab.spec.run_id, lab.ledger.rounds
    return [(client, Behind(run, round_, client, lab.one_of(applied)).to_bytes()) for _ in range(6)]


def failures(lab: Fuzzed) -> list[Parcel]:
    """A failure of a known reason, or of none. Few say that their budget is spent: they are asked no more."""
    client = lab.attacker()
    reasons = ("digest", "not-finite") if lab.private and client != CLIENTS - 1 else ("digest", "not-finite", "budget")
    data = Failure(lab.spec.run_id, lab.ledger.rounds, client, lab.one_of(reasons)).to_bytes()
    return [(client, data if lab.below(2) else data[:-1] + bytes([3 + lab.below(253)]))]


# Kind -> how such replies are made, and what may become of them.
KINDS: dict[str, tuple[Callable[[Fuzzed], list[Parcel]], set[str]]] = {
    "random bytes": (random_bytes, {"malformed"}),
    "other formats": (other_formats, {"malformed"}),
    "random body": (random_body, {"malformed", "shape"}),
    "cut": (cut, {"malformed"}),
    "extended": (extended, {"malformed"}),
    "far too long": (far_too_long, {"malformed"}),
    "a bit flipped": (flipped, {"malformed", "wrong-run", "not-asked", "late", "seeds", "examples", "shape"}),
    "huge counts": (huge_counts, {"malformed", "shape"}),
    "wrong shape": (wrong_shape, {"malformed", "shape"}),
    "NaN, infinite, beyond": (wrong_values, {"not-finite", "bound"}),
    "wrong loss": (wrong_loss, {"not-finite"}),
    "wrong examples": (wrong_examples, {"examples"}),
    "wrong seeds": (wrong_seeds, {"seeds"}),
    "other types": (other_types, {"malformed", "seeds", "shape"}),
    "wrong head": (wrong_head, {"wrong-run", "late", "not-asked"}),
    "another round's answer": (another_round, {"late", "not-asked"}),
    "renumbered": (renumbered, {"seeds", "shape"}),
    "twice": (twice, {"duplicate"}),
    "in another's name": (in_anothers_name, {"not-asked"}),
    "plans": (plans, {"malformed"}),
    "other kinds": (other_kinds, {"malformed", "shape"}),
    "behind, again and again": (behind, {"behind", "new plan"}),
    "failures": (failures, {"digest", "not-finite", "budget", "malformed"}),
}


# -- memory


def resident() -> int:
    """Bytes of this process that are in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory() -> tuple[int, int]:
    """Bytes that Python and numpy hold, and that are in RAM."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], resident()


# -- Flower


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
    """The ServerApp among hostile nodes; whether its ledger is that of a run without them.

    Args:
        strangers: nodes that answer nothing rightly.
    """
    sys.path.insert(0, str(ROOT))  # clients/ and server/ are not part of the installed package
    from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.supercore.task_identity import TaskIdentity

    from clients import app as client_side
    from server import app as server_side

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # private; Message() needs them
    config = from_flat({
        "data.clients": CLIENTS, "data.limit": 100, "data.partition": "iid", "data.test": "", "evaluation.limit": 16,
        "evaluation.every": 0, "federation.rounds": rounds, "method.batch_size": 4, "runtime.round_timeout": 20.0,
    })  # fmt: skip

    hello: dict[str, Any] = {}  # a right one

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def config_record(values: dict[str, Any]) -> Any:
        return RecordDict({"fedzo": ConfigRecord(values)})

    def garbage(right: Any) -> tuple[str, Any]:
        """The kind and the content of a hostile answer; `right` is the record of a right one."""
        kind = pick([
            "flower: an error", "flower: no record", "flower: another record", "flower: other keys", "flower: one value wrong",
            "flower: refused", "flower: wants", "flower: answer", "flower: another kind of record", "flower: a field more",
            "flower: greet me",
        ])  # fmt: skip
        match kind:
            case "flower: an error":
                return kind, Error(code=int(rng.integers(0, 2**31)), reason=pick(HOSTILE_TEXTS))
            case "flower: no record":
                return kind, RecordDict()
            case "flower: another record":
                return kind, RecordDict({pick(HOSTILE_TEXTS) or "x": ConfigRecord(right)})
            case "flower: another kind of record":
                return kind, RecordDict({"fedzo": pick([MetricRecord({"answer": 1.5}), ArrayRecord()])})
            case "flower: other keys":
                return kind, config_record({pick(HOSTILE_TEXTS)[:1000]: pick(HOSTILE_VALUES) for _ in range(4)})
            case "flower: refused":
                return kind, config_record({"refused": pick(HOSTILE_VALUES)})
            case "flower: wants":
                return kind, config_record({"wants": pick(HOSTILE_VALUES), "offset": pick(HOSTILE_VALUES)})
            case "flower: answer":
                return kind, config_record({"answer": pick([*HOSTILE_VALUES, rng.bytes(80)])})
            case "flower: greet me":
                return kind, config_record({"greet": True})
            case "flower: a field more":
                return kind, config_record({**right, pick(["extra", "self", "__class__"]): pick(HOSTILE_VALUES)})
        name = pick(sorted(set(right) - {"resident", "applied"}) or ["answer"])
        wrong = [
            value for value in HOSTILE_VALUES if type(value) is not type(right.get(name)) or value in HOSTILE_TEXTS
        ]
        return kind, config_record({**right, name: pick(wrong)})

    class HostileGrid(Grid):
        """Hands every message to its node at once: the ClientApp's, or one that answers as it likes."""

        def __init__(self, out: Path, hostile: bool) -> None:
            self.out, self.hostile, self.count = out, hostile, 0
            self.replies: dict[str, Message] = {}
            self.contexts = {number + 1: self.context(number + 1, number) for number in range(CLIENTS)}
            self.strangers = range(10_000, 10_000 + strangers) if hostile else range(0)

        def context(self, node: int, number: int = 0) -> Context:
            run_config = flatten(config) | {"out": str(self.out)}
            return Context(1, node, {"partition-id": number}, RecordDict(), run_config)

        def answer(self, message: Message) -> Message:
            node, asked = message.metadata.dst_node_id, message.metadata.message_type
            if node in self.strangers:
                kind, content = garbage({**hello, "client": int(rng.integers(CLIENTS))})
                tally.add(kind, "to a greeting")
                return Message(content, reply_to=message)
            if asked == "train.plan" and node % 2 == 0:  # nodes of odd clients
                if not self.hostile:
                    return Message(Error(code=0, reason="silent"), reply_to=message)
                kind, content = garbage({"answer": b""})
                tally.add(kind, "to a plan")
                return Message(content, reply_to=message)
            reply = client_side.app(message, self.contexts[node])
            if asked == "query":
                hello.update(reply.content.config_records["fedzo"])
            return reply

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            names = []
            for message in messages:
                self.count += 1
                names.append(str(self.count))
                message.metadata.__dict__["_message_id"] = names[-1]
                self.replies[names[-1]] = self.answer(message)
            return names

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return [self.replies.pop(name) for name in message_ids if name in self.replies]

        def get_node_ids(self) -> list[int]:
            return [*self.contexts, *self.strangers]

        def set_run(self, run: Any) -> None: ...

        @property
        def run(self) -> Any:
            raise NotImplementedError

        def create_message(self, *args: Any, **kwargs: Any) -> Message:
            raise NotImplementedError

        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            raise NotImplementedError

    heads = []
    for name, hostile in (("silent", False), ("hostile", True)):
        grid = HostileGrid(folder / name, hostile)
        try:
            with shown_to(tally):
                server_side.app(grid, grid.context(1))
        except FedzoError as error:
            tally.unexpected[f"flower: {type(error).__name__}"] += 1
            tally.look(str(error))
            print(f"flower, {name} nodes: {error}"[:400])
            return False
        except Exception as error:
            tally.escaped[f"flower: {type(error).__name__}"] += 1
            print(f"flower, {name} nodes: {type(error).__name__}: {ascii(error)[:300]}")
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
    print(
        f"memory at a tenth and at the end: {traced:,} and {traced_end:,} bytes of objects, {rss:,} and {rss_end:,} in RAM"
    )
    for name in ("escaped", "unexpected"):
        for what, count in getattr(tally, name).items():
            print(f"{name}: {what} ({count})")
    for text in tally.unfit[:5]:
        print(f"not fit to be shown: {ascii(text)}")
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
