"""Hostile replies to the server, of many kinds: how each is made of right ones, and what may become of it."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedzo.federation.coordinator import Coordinator
from fedzo.federation.messages import (
    Behind,
    CatchUp,
    Contribution,
    Failure,
    Held,
    Plan,
    RoundRecords,
    decode,
    max_contribution_bytes,
)
from fedzo.privacy.mechanisms import Ints

Parcel = tuple[int, bytes]
CLIENTS = 10
# What a node may say of itself: what terminals and formatting obey, what is long, what has other types.
TEXTS = (
    "", "\x1b[2J\x1b[31mfedzo: 10 of 10 clients registered\x1b[0m", "a\nfedzo: round 1/1: loss 0.0000", "\r\b\0\x07",
    "\u202eevil\u2066\u200b", "\U0001f4a3" * 50, "%s%n{0}{client.__class__}", "x" * 1_000_000, "../../etc/passwd",
    "\x9b31m", "\u2028\u2029", "'; DROP TABLE rounds; --",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *TEXTS, -1, CLIENTS, 2**31, 2**63 - 1, -(2**63), True, False, 1.0, float("nan"), float("inf"), 5e-324,
    b"", b"\xff" * 1000, [], [1, 2], [2**63 - 1] * 1000, ["x" * 100] * 100, [True], [0.5] * 10_000, [b"", b"\0"],
)  # fmt: skip


def honest(client: int) -> bool:
    return client % 2 == 0 and 0 <= client < CLIENTS


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


@dataclass
class Lab:
    """What hostile replies are made of: a run that is played again, and what was recorded of it.

    Attributes:
        coordinator: of the run.
        rounds: as they were recorded.
        rng: draws everything.
        asked: clients of the round in flight.
        delivered: honest ones of them whose answers came.
    """

    coordinator: Coordinator
    rounds: list[Played]
    rng: np.random.Generator
    asked: list[int]
    delivered: list[int]

    @property
    def now(self) -> Played:
        return self.rounds[self.coordinator.ledger.rounds]

    @property
    def secure(self) -> bool:
        """Whether the run has a secure sum."""
        terms = self.coordinator.spec.terms
        return terms is not None and terms.mode == "client-secagg"

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


def random_bytes(lab: Lab) -> list[Parcel]:
    return [(lab.anybody(), lab.rng.bytes(lab.below(400)))]


def other_formats(lab: Lab) -> list[Parcel]:
    texts = (
        b'{"answer": [1, 2]}',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x80\x04\x95",
        b"\x93NUMPY\x01",
        b"PK\x03\x04",
        b"<?xml?>",
    )
    return [(lab.anybody(), lab.one_of(texts) * (1 + lab.below(9)))]


def random_body(lab: Lab) -> list[Parcel]:
    client = lab.attacker()
    head = lab.right(client).to_bytes()[:20]
    kind = bytes([lab.below(256)])
    return [(client, head[:3] + kind + head[4:] + lab.rng.bytes(5 + lab.below(200)))]


def cut(lab: Lab) -> list[Parcel]:
    data = lab.now.answers[client := lab.attacker()]
    return [(client, data[: lab.below(len(data))])]


def extended(lab: Lab) -> list[Parcel]:
    data = lab.now.answers[client := lab.attacker()]
    return [(client, data + lab.rng.bytes(1 + lab.below(300)))]


def far_too_long(lab: Lab) -> list[Parcel]:
    return [(client := lab.attacker(), lab.now.answers[client] + bytes(2**20))]


def flipped(lab: Lab) -> list[Parcel]:
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


def huge_counts(lab: Lab) -> list[Parcel]:
    client, most = lab.attacker(), (0, 1, 2, 2**15, 2**16 - 1)
    head = bytearray(lab.right(client).to_bytes()[:20])
    steps, queries, long = lab.one_of(most), lab.one_of(most), lab.one_of((0, 2**31, 2**32 - 1))
    head[3], fixed = lab.one_of((
        (2, struct.pack("<HHIf", steps, queries, long, 1.0)),
        (5, struct.pack("<HHIfI", steps, queries, 1, 1.0, long)),
        (6, struct.pack("<HHH", steps, queries, lab.one_of(most))),
    ))  # fmt: skip
    return [(client, bytes(head) + fixed + bytes(lab.below(100)))]


def wrong_shape(lab: Lab) -> list[Parcel]:
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


def wrong_values(lab: Lab) -> list[Parcel]:
    """A value that is none or too large, among the scalars, gradients or counts."""
    right = lab.right(client := lab.attacker())
    beyond = float(np.nextafter(np.float32(lab.coordinator.spec.scalar_bound), np.float32(np.inf)))
    value = lab.one_of([float("nan"), float("inf"), 3.4e38, 1e30, beyond]) * lab.one_of([1, -1])
    names = [name for name in ("scalars", "gradients", "counts") if getattr(right, name) is not None]
    name = lab.one_of([name for name in names if getattr(right, name).size])
    array = getattr(right, name).copy()
    array.ravel()[lab.below(array.size)] = value
    return [(client, replace(right, **{name: array}).to_bytes())]


def wrong_loss(lab: Lab) -> list[Parcel]:
    right = lab.right(client := lab.attacker())
    if right.loss is None:
        return []
    return [(client, replace(right, loss=lab.one_of([float("nan"), float("inf"), float("-inf")])).to_bytes())]


def wrong_examples(lab: Lab) -> list[Parcel]:
    right = lab.right(client := lab.attacker())
    if right.examples is None:
        return []
    return [(client, replace(right, examples=lab.one_of([0, right.examples + 1, 2**31, 2**32 - 1])).to_bytes())]


def wrong_seeds(lab: Lab) -> list[Parcel]:
    """Other seeds, or their order; the scalars may be the smallest numbers that there are."""
    right = lab.right(client := lab.attacker())
    bit = np.uint64(1 << lab.below(64))
    seeds = lab.one_of([right.seeds ^ bit, right.seeds[:, ::-1], np.zeros_like(right.seeds), ~right.seeds])
    scalars = right.scalars if lab.below(2) else np.full_like(right.scalars, 1e-45)
    return [(client, replace(right, seeds=seeds, scalars=scalars).to_bytes())]


def other_types(lab: Lab) -> list[Parcel]:
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


def wrong_head(lab: Lab) -> list[Parcel]:
    message = decode(lab.now.answers[client := lab.attacker()])
    assert not isinstance(message, Plan)
    changes: tuple[dict[str, Any], ...] = (
        {"run_id": lab.rng.bytes(8)}, {"run_id": bytes(8)}, {"round": message.round + 1}, {"round": 2**32 - 1},
        {"client": (client + 2) % CLIENTS}, {"client": 2**32 - 1},
    )  # fmt: skip
    return [(client, replace(message, **lab.one_of(changes)).to_bytes())]


def another_round(lab: Lab) -> list[Parcel]:
    """The right answer to another round's plan, of any client in its own name."""
    others = [played for played in lab.rounds if played is not lab.now]
    client, data = lab.one_of(list(lab.one_of(others).answers.items()))
    return [(client, data)]


def renumbered(lab: Lab) -> list[Parcel]:
    """A client's answer to another round's plan, with this round's number."""
    client, found = lab.attacker(), []
    for played in lab.rounds:
        message = decode(played.answers[client]) if client in played.answers and played is not lab.now else None
        if isinstance(message, Contribution):
            found.append(message)
    return [(client, replace(lab.one_of(found), round=lab.coordinator.ledger.rounds).to_bytes())] if found else []


def twice(lab: Lab) -> list[Parcel]:
    """An honest client's answer once more, as it was or with another scalar."""
    if not lab.delivered:
        return []
    message = decode(lab.now.answers[client := lab.one_of(lab.delivered)])
    if isinstance(message, Contribution) and lab.below(2):
        message = replace(message, scalars=message.scalars + np.float32(1))
    return [(client, message.to_bytes())]


def in_anothers_name(lab: Lab) -> list[Parcel]:
    """An answer that was asked of another client, as it is or with the sender's own number."""
    strangers = [client for client in range(CLIENTS) if client not in lab.asked] + [-1, CLIENTS, 77]
    message = decode(lab.one_of(list(lab.now.answers.values())))
    sender = lab.one_of([lab.attacker(), *strangers])
    if sender in lab.asked:
        return [(sender, message.to_bytes())] if message.client != sender else []
    return [(sender, replace(message, client=max(sender, 0)).to_bytes())]


def plans(lab: Lab) -> list[Parcel]:
    """Its plan sent back, or one of as many empty rounds as a right answer is long."""
    plan = decode(lab.now.plans[client := lab.attacker()])
    assert isinstance(plan, Plan)
    empty = RoundRecords(np.empty((0, 0), np.uint64), np.empty((0, 0), np.float32))
    counts = None if lab.coordinator.spec.sanitiser is None else lab.coordinator.spec.sanitiser.counts
    spec = lab.coordinator.spec
    room = max_contribution_bytes(spec.local_steps, spec.queries, spec.scalars, lab.coordinator._entries, counts)
    number = max(1, (room - 100) // empty.nbytes)
    bomb = replace(plan, seeds=plan.seeds[:0], catch_up=CatchUp("records", 0, number, (empty,) * number), initial=b"")
    return [(client, lab.one_of([lab.now.plans[client], bomb.to_bytes()]))]


def other_kinds(lab: Lab) -> list[Parcel]:
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


def behind(lab: Lab) -> list[Parcel]:
    """Asks for the history, over and over."""
    client = lab.attacker()
    applied = (0, 0, 1, lab.coordinator.ledger.rounds, max(0, lab.coordinator.ledger.rounds - 1), 2**32 - 1)
    run, round_ = lab.coordinator.spec.run_id, lab.coordinator.ledger.rounds
    return [(client, Behind(run, round_, client, lab.one_of(applied)).to_bytes()) for _ in range(6)]


def failures(lab: Lab) -> list[Parcel]:
    """A failure of a known reason, or of none. Few say that their budget is spent: they are asked no more."""
    client = lab.attacker()
    reasons = (
        ("digest", "not-finite")
        if lab.coordinator.spec.terms is not None and client != CLIENTS - 1
        else ("digest", "not-finite", "budget")
    )
    data = Failure(lab.coordinator.spec.run_id, lab.coordinator.ledger.rounds, client, lab.one_of(reasons)).to_bytes()
    return [(client, data if lab.below(2) else data[:-1] + bytes([3 + lab.below(253)]))]


# Kind -> how such replies are made, and what may become of them.
KINDS: dict[str, tuple[Callable[[Lab], list[Parcel]], set[str]]] = {
    "random bytes": (random_bytes, {"malformed"}),
    "other formats": (other_formats, {"malformed"}),
    "random body": (random_body, {"malformed", "shape"}),
    "cut": (cut, {"malformed", "shape"}),
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
