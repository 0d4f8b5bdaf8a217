"""The server's side of the protocol: samples clients, checks what they answer, commits rounds. Knows no transport."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.errors import LedgerError, ProtocolError, shown
from fedzo.events import Events
from fedzo.federation.aggregation import AGGREGATORS, WEIGHINGS, Settings
from fedzo.federation.amplitudes import Amplitudes
from fedzo.federation.ledger import NO_DIGEST, Ledger, LedgerRound
from fedzo.federation.messages import (
    Behind,
    CatchUp,
    Contribution,
    Failure,
    Held,
    Hello,
    Plan,
    RoundRecords,
    decode_answer,
    max_contribution_bytes,
)
from fedzo.federation.randomness import derive, pool_seeds, round_seeds, sample_clients
from fedzo.federation.replica import Replica
from fedzo.federation.spec import POOLS, PROTOCOL
from fedzo.optimizers import Records, Scalars, Seeds
from fedzo.privacy import sampling
from fedzo.privacy.account import Budget
from fedzo.privacy.mechanisms import Ints
from fedzo.privacy.sanitiser import Sanitiser
from fedzo.registry import lookup


@dataclass
class Member:
    """What the coordinator knows of a registered client.

    Attributes:
        examples: its example count at the handshake, which every contribution must repeat; 0 in a private run.
        applied: rounds that it is known to have applied.
        needs_initial: its theta0 differs in the values that the base model does not have.
    """

    examples: int
    applied: int = 0
    needs_initial: bool = False


@dataclass(frozen=True)
class RoundSummary:
    """What happened in a round; kept beside the ledger, not hashed.

    Attributes:
        round: from 0.
        sampled, accepted: clients asked, and contributions that became records.
        dropped: reason -> contributions dropped.
        loss: mean of the accepted clients' losses, None when the round missed its quorum, or is private.
        bytes_down, bytes_up: payload to and from all clients.
        artifact_bytes: the part of bytes_down that was artifacts: masks sent since the round before, and gradients.
        scalars: records written.
        max_scalar: largest magnitude among them.
        clip: of a private run, the bound on a unit's norm in the round after; else None.
    """

    round: int
    sampled: int
    accepted: int
    dropped: dict[str, int]
    loss: float | None
    bytes_down: int
    bytes_up: int
    artifact_bytes: int
    scalars: int
    max_scalar: float
    clip: float | None = None

    @property
    def told(self) -> str:
        """What a round says of its clients' losses; in a private run nothing."""
        if self.loss is not None:
            return f"loss {self.loss:.4f}"
        return "private" if self.scalars else "no quorum"

    def kept(self, secret: bool) -> dict[str, Any]:
        """As the ledger keeps it.

        Args:
            secret: who took part, and how many did, is nobody's to know: privacy rests on it.
        """
        hidden = ("sampled", "accepted", "dropped", "bytes_down", "bytes_up", "artifact_bytes") if secret else ()
        return {name: None if name in hidden else value for name, value in vars(self).items()}


@dataclass
class _Open:
    """The round in flight.

    Attributes:
        starts: where the catch-up of a client's last plan starts.
        tails: catch-ups by where they start.
        records, snapshot: what they are made of: of each round that somebody missed, and of theta and the rule's state.
    """

    round: int
    seeds: dict[int, Seeds]
    shared: Seeds
    held: set[int] = field(default_factory=set)
    total: tuple[tuple[int, ...], Ints] | None = None
    contributions: dict[int, Contribution] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    tails: dict[int, CatchUp] = field(default_factory=dict)
    records: dict[int, RoundRecords] = field(default_factory=dict)
    snapshot: bytes = b""
    answered: set[int] = field(default_factory=set)
    rewound: Counter[int] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    bytes_down: int = 0
    bytes_up: int = 0
    artifact_bytes: int = 0


@dataclass
class _Vain:
    """What a client was asked since an answer of its was taken.

    Attributes:
        rounds: in which it was.
        granted: of them, those in which it was sent a catch-up that it had asked for.
        due: the round from which on it may ask for one again.
    """

    rounds: int = 0
    granted: int = 0
    due: int = 0

    def add(self, round_: int, granted: bool) -> None:
        self.rounds += 1
        if granted:
            self.granted += 1
            self.due = round_ + 2**self.granted


class Coordinator:
    """Runs the rounds of a ledger.

    Args:
        ledger: opened for writing; the rounds it holds are replayed at once.
        replica: the server's own theta, before the first round.

    Raises:
        LedgerError: theta0 is not the ledger's, or a recorded digest differs from the replay's.
    """

    def __init__(self, ledger: Ledger, replica: Replica) -> None:
        self.ledger, self.replica, self.spec = ledger, replica, ledger.spec
        self.events = Events(ledger)
        self._aggregate = lookup(AGGREGATORS, self.spec.aggregation, "aggregation")
        self._settings = Settings(self.spec.trim, self.spec.norm_bound)
        self._pool = pool_seeds(self.spec.seed, self.spec.pool_size) if self.spec.seeds in POOLS else None
        weighted = self._pool if self.spec.seeds == "weighted-pool" else None
        self._amplitudes = None if weighted is None else Amplitudes(weighted)
        self._entries = sum(length for _, length in replica.rule.ranges)  # F, of a gradient
        self.members: dict[int, Member] = {}
        self._open: _Open | None = None
        self._vain: dict[int, _Vain] = {}  # of clients whose last answer was not taken
        self._greeted: dict[int, dict[str, Any]] = {}  # not yet recorded in the ledger
        self._artifact_bytes = 0
        self._terms, self._sanitiser = self.spec.terms, self.spec.sanitiser
        self._spent: set[int] = set()  # clients that say that their budget is spent
        self._clip, self._charges = 0.0, ledger.charges()
        self._budget: Budget | None = None  # of a unit, where the server keeps it
        if self._terms is not None and self._sanitiser is not None:
            self._clip = self._terms.clip
            if not self._terms.local:
                release = self._terms.release(self._sanitiser.coordinates, units=self.spec.clients)
                self._budget = Budget(self._terms, release)
        replay(ledger, replica)
        self._sizes = [0]  # bytes of the records of the first 0, 1, ... rounds
        for entry in ledger.read():
            self._note(entry)
        for summary in ledger.summaries()[-1:]:
            self._clip = summary.get("clip") or self._clip

    def _note(self, entry: LedgerRound) -> None:
        """Keeps what later rounds need of one that is in the ledger."""
        self._sizes.append(self._sizes[-1] + _sent(entry).nbytes)
        if self._amplitudes is not None:
            self._amplitudes.add(entry)

    @property
    def finished(self) -> bool:
        return self.ledger.rounds >= self.spec.rounds or bool(self.ended)

    @property
    def ended(self) -> str:
        """Why a private run ends before its last round; "": it does not."""
        if self._terms is None or self.ledger.rounds >= self.spec.rounds:
            return ""
        left = sum(map(self._affords, range(self.spec.clients)))
        if left >= (self._terms.survivors if self._terms.mode == "client-secagg" else self.spec.quorum):
            return ""
        if self._terms.secret:
            return "the run has no privacy budget left for another round"
        return f"{left} of {self.spec.clients} clients have privacy budget left for another round"

    def _affords(self, client: int) -> bool:
        """Whether a client's budget allows another round, for all that the server knows."""
        if self._budget is None:  # it is the client's own
            return client not in self._spent
        spent = self._charges[None] + self._charges[client]
        return self._budget.affords(spent + 1)

    def admit(self, hello: Hello) -> None:
        """Registers a client. What may differ (its base's quantisation and compute dtype) is recorded in the ledger.

        Raises:
            ProtocolError: a field differs that must be equal, or is of another type; the message names it.
        """
        for stated in fields(hello):
            if type(getattr(hello, stated.name)) is not stated.type:
                raise ProtocolError(
                    f"a hello refused: its {stated.name} is {shown(getattr(hello, stated.name))}, wanted one of type "
                    f"{getattr(stated.type, '__name__', stated.type)}"
                )
        for name, wanted in (
            ("protocol", PROTOCOL),
            ("fingerprint", self.spec.fingerprint),
            ("mask", self.spec.mask),
            ("space_hash", self.spec.space_hash),
            ("family", self.spec.family),
            ("theta_dtype", self.spec.theta_dtype),
        ):
            found = getattr(hello, name)
            if found != wanted:
                raise ProtocolError(
                    f"client {hello.client} refused: its {name} is {shown(found)}, the run's is {wanted!r}"
                    + self._hint(hello)
                )
        if not 0 <= hello.client < self.spec.clients:
            raise ProtocolError(f"client {hello.client} refused: the run has the clients 0 to {self.spec.clients - 1}")
        if self._terms is not None and hello.examples != 0:
            raise ProtocolError(
                f"client {hello.client} refused: it states {hello.examples} examples, in a private run it must not say"
            )
        if self._terms is None and not 1 <= hello.examples < 2**32:
            raise ProtocolError(
                f"client {hello.client} refused: it states {hello.examples} examples, wanted 1 to {2**32 - 1}"
            )
        for name in ("quantisation", "compute_dtype"):
            found = getattr(hello, name)
            if not re.fullmatch(r"[a-z0-9-]{1,16}", found):
                raise ProtocolError(f"client {hello.client} refused: its {name} is {shown(found)}, wanted a name")
        differs = hello.theta0 != self.spec.theta0
        if differs and not self.spec.initial:
            raise ProtocolError(
                f"client {hello.client} refused: its theta0 is {shown(hello.theta0)}, the run's is {self.spec.theta0!r}"
            )
        known = isinstance(hello.applied, int) and 0 <= hello.applied <= self.ledger.rounds
        self.members[hello.client] = Member(hello.examples, hello.applied if known else 0, needs_initial=differs)
        self._greeted[hello.client] = {
            name: getattr(hello, name) for name in ("quantisation", "compute_dtype", "examples")
        }
        self.events.tell("client-admitted", logging.DEBUG, client=hello.client, quantisation=hello.quantisation)

    def dismiss(self, client: int) -> None:
        """Forgets a client that is gone, between two rounds: it is asked no more until it is admitted again."""
        self.members.pop(client, None)

    def _hint(self, hello: Hello) -> str:
        if self.spec.space not in ("scales", "codes") or hello.space_hash == self.spec.space_hash:
            return ""
        return (
            f"; {self.spec.space} are of one quantised base, and this client's is {shown(hello.quantisation)}: "
            "load the run's"
        )

    def sent_artifact(self, size: int) -> None:
        """Counts bytes of an artifact that the transport brought to a client."""
        self._artifact_bytes += size

    def open_round(self) -> list[Plan]:
        """Samples clients among the registered ones and makes their plans; an earlier unfinished round is forgotten."""
        spec, round_ = self.spec, self.ledger.rounds
        if self.finished:
            raise ProtocolError(f"the run has all its {spec.rounds} rounds")
        if self._greeted:
            self.ledger.record_members(self._greeted)
            self.events.tell("clients-admitted", new=len(self._greeted), registered=len(self.members))
            self._greeted = {}
        picked = self._sample(round_)
        if self._terms is not None and self._sanitiser is not None:
            everyone = self._terms.secret
            for client in [None] if everyone else sorted(picked):
                self._charges[client] += self._sanitiser.releases
            self.ledger.charge(round_, None if everyone else picked, self._sanitiser.releases)
        shape = (spec.local_steps, spec.queries)
        assign = self.replica.rule.setup.structure.assign

        def assign_all(drawn: Seeds) -> Seeds:
            return np.stack([assign(row) for row in drawn])

        weights = None if self._amplitudes is None else self._amplitudes.weights()
        shared = assign_all(round_seeds(spec.seed, "shared", round_, 0, shape))
        seeds = dict.fromkeys(sorted(picked), shared)
        if spec.seeds != "shared":
            for client in seeds:
                drawn = round_seeds(spec.seed, spec.seeds, round_, client, shape, self._pool, weights)
                seeds[client] = assign_all(drawn)
        sent, self._artifact_bytes = self._artifact_bytes, 0
        if sent:
            self.events.tell("artifact-sent", bytes=sent)
        self._open = _Open(round_, seeds, shared, bytes_down=sent, artifact_bytes=sent)
        # Who gave nothing in two rounds may be gone, and is sent what it missed when it asks (`Behind`).
        gone = {client for client, vain in self._vain.items() if vain.rounds > 1}
        return [self._plan(c, round_ if c in gone else self.members[c].applied) for c in seeds]

    def _sample(self, round_: int) -> list[int]:
        """The clients of a round."""
        spec, terms = self.spec, self._terms
        place = derive(spec.seed, "sampling", round_)
        # Drawn over all numbers, registered or not, so that an absent client changes nothing for the others.
        if terms is not None and terms.secret:
            # Privacy may rest on the draw, so no seed tells it, and none who is absent is replaced.
            if terms.sampling == "fixed":
                drawn = sampling.fixed(spec.clients, spec.clients_per_round)
            else:
                drawn = sampling.poisson(spec.clients, terms.rate)
        else:
            drawn = sample_clients(place, spec.clients, spec.client_rate)
        picked = [client for client in drawn.tolist() if client in self.members and self._affords(client)]
        return picked[: spec.clients_per_round] if spec.clients_per_round else picked

    def _plan(self, client: int, start: int) -> Plan:
        """A client's plan, with what it missed from `start` rounds on."""
        assert self._open is not None
        spec, member, round_ = self.spec, self.members[client], self._open.round
        digest = self.replica.digest() if round_ == 0 or spec.has_digest(round_ - 1) else NO_DIGEST
        catch_up = self._catch_up(start)
        if catch_up.kind == "snapshot":
            self.events.tell("snapshot-sent", client=client, bytes=len(catch_up.snapshot))
        initial = self.ledger.artifact(spec.initial) if member.needs_initial and start == 0 else b""
        plan = Plan(
            spec.run_id, round_, client, self._open.seeds[client], spec.eps, spec.batch_size, digest, catch_up, initial,
            self._clip,
        )  # fmt: skip
        self._open.starts[client] = start
        self._open.bytes_down += plan.nbytes
        self._open.artifact_bytes += sum(4 * r.gradients.size for r in catch_up.records if r.gradients is not None)
        return plan

    def _catch_up(self, applied: int) -> CatchUp:
        """The cheaper of the missed records and a snapshot."""
        current, rule = self._open, self.replica.rule
        assert current is not None
        if applied not in current.tails:
            now, theta, state = current.round, self.replica.theta, self.replica.state
            if applied == now:
                caught = CatchUp("none", applied, now)
            elif self._sizes[now] - self._sizes[applied] > rule.snapshot_bytes(theta, state):
                current.snapshot = current.snapshot or rule.snapshot(theta, state)
                caught = CatchUp("snapshot", applied, now, snapshot=current.snapshot)
            else:
                first = min(current.records, default=now)
                missing = self.ledger.read(applied, None if first == now else first) if applied < first else ()
                current.records |= {entry.round: _sent(entry) for entry in missing}
                caught = CatchUp("records", applied, now, tuple(current.records[r] for r in range(applied, now)))
            current.tails[applied] = caught
        return current.tails[applied]

    def receive(self, client: int, data: bytes) -> Plan | None:
        """Takes a client's answer; what is wrong is dropped and counted.

        Args:
            client: whom the transport says it comes from.
            data: the message.

        Returns:
            A new plan for the client when it turned out to stand further behind than the catch-up reached, else None.
        """
        current = self._open
        if current is None:
            return None
        current.bytes_up += len(data)
        reason: str | None
        try:
            spec = self.spec
            counts = None if self._sanitiser is None else self._sanitiser.counts
            if len(data) > max_contribution_bytes(spec.local_steps, spec.queries, spec.scalars, self._entries, counts):
                raise ProtocolError("longer than any right message")
            message = decode_answer(data)
        except ProtocolError:
            reason = "malformed"
        else:
            if isinstance(message, Behind) and self._fault(client, message) is None:
                # The second new plan of a round starts at theta0, so that any process of the client can use it, and is
                # the last: a client that asks again and again would have the whole history sent each time. One that
                # gives nothing for it waits for the next twice as long each time.
                due = client not in self._vain or self._vain[client].due <= current.round
                if due and message.applied < current.starts[client] and current.rewound[client] < 2:
                    start = self.members[client].applied = 0 if current.rewound[client] else message.applied
                    current.rewound[client] += 1
                    return self._plan(client, start)
                reason = "behind"
            else:
                reason = self._fault(client, message)
                if reason is None and isinstance(message, Failure):
                    reason = message.reason
                    if reason == "digest":
                        self.members[client].applied = 0
                    elif reason == "budget":
                        self._spent.add(client)
        if reason is None:
            if isinstance(message, Contribution):
                current.contributions[client] = message
            else:
                current.held.add(client)
            self.members[client].applied = current.round
        else:
            current.dropped[reason] += 1
            self.events.tell("drop", logging.DEBUG, client=client, reason=reason)
        if client in current.seeds and reason != "late":
            current.answered.add(client)
        return None

    def renew(self, client: int) -> Plan | None:
        """The plan anew of a client that was admitted again while its round lasts; None: it has had its chances."""
        current = self._open
        asked = current is not None and client in current.seeds and client not in current.answered
        if current is None or not asked or current.rewound[client] > 1:
            return None
        current.rewound[client] += 1
        return self._plan(client, self.members[client].applied)

    def lost(self, client: int) -> None:
        """Counts a client whose answer did not come: the transport gave up on it."""
        if self._open is not None and client in self._open.seeds and client not in self._open.answered:
            self._open.dropped["no-reply"] += 1
            self.events.tell("drop", logging.DEBUG, client=client, reason="no-reply")
            self._open.answered.add(client)

    @property
    def holders(self) -> tuple[int, ...]:
        """The clients that hold a contribution for the secure sum, ascending; () where there is none to make."""
        return tuple(sorted(self._open.held)) if self._open is not None else ()

    @property
    def threshold(self) -> int:
        """Clients that must be in the secure sum, below which it may not be revealed."""
        assert self._terms is not None
        return self._terms.survivors

    def receive_total(self, total: tuple[tuple[int, ...], Ints] | None) -> None:
        """Takes the secure sum of a round: the clients in it, and int64 [K C P + counts]; None: it was not revealed.

        Raises:
            ProtocolError: it is no sum of what the clients hold.
        """
        current = self._open
        if current is None or total is None:
            return
        clients, sums = total
        assert self._sanitiser is not None
        size = self._sanitiser.coordinates
        if sums.shape != (size,) or not set(clients) <= current.held or len(clients) < self.threshold:
            raise ProtocolError(
                f"a secure sum of {len(clients)} clients and {sums.shape} entries, wanted at least {self.threshold} of "
                f"the {len(current.held)} that hold one, and {size} entries"
            )
        current.total = tuple(sorted(clients)), sums
        current.bytes_up += len(current.held) * sums.nbytes  # masked, each has the sum's size

    def _fault(self, client: int, message: Contribution | Held | Behind | Failure) -> str | None:
        """Why a message must be dropped, or None."""
        current = self._open
        assert current is not None
        if message.run_id != self.spec.run_id:
            return "wrong-run"
        if client not in current.seeds or client not in self.members or message.client != client:
            return "not-asked"
        if message.round != current.round:
            return "late"
        if client in current.contributions or client in current.held:
            return "duplicate"
        secure = self._terms is not None and self._terms.mode == "client-secagg"
        if isinstance(message, Held | Contribution) and isinstance(message, Held) != secure:
            return "malformed"
        if isinstance(message, Failure) and message.reason == "budget" and (self._terms is None or self._terms.secret):
            return "malformed"  # only a client with a budget of its own can have spent it
        return self._content_fault(client, message) if isinstance(message, Contribution) else None

    def _content_fault(self, client: int, message: Contribution) -> str | None:
        assert self._open is not None
        wanted = self._open.seeds[client]
        steps, queries = wanted.shape
        arrays = [array for array in (message.scalars, message.gradients) if array is not None]
        shapes = [(steps, self.spec.scalars * queries), *([(steps, self._entries)] if self._entries else [])]
        if message.seeds.shape != wanted.shape or [array.shape for array in arrays] != shapes:
            return "shape"
        if not np.array_equal(message.seeds, wanted):
            return "seeds"
        if (message.counts is None) != (self._sanitiser is None):
            return "malformed"
        if message.counts is not None and self._sanitiser is not None:
            if message.counts.size != self._sanitiser.counts:
                return "shape"
            arrays.append(message.counts)
        elif message.examples != self.members[client].examples:
            return "examples"
        if message.loss is not None and not np.isfinite(message.loss):
            return "not-finite"
        if not all(np.isfinite(array).all() for array in arrays):
            return "not-finite"
        return "bound" if any(np.abs(array).max(initial=0.0) > self.spec.scalar_bound for array in arrays) else None

    def close_round(self) -> RoundSummary:
        """Aggregates, applies, commits. Below its quorum a round is committed without records and moves nothing.

        Raises:
            LedgerError: the commit failed; the replica is then one round ahead of the ledger and must not be used.
        """
        current, spec = self._open, self.spec
        if current is None:
            raise ProtocolError("no round is open")
        for client in current.seeds:
            self.lost(client)
            if client in current.contributions or client in current.held:
                self._vain.pop(client, None)
            else:
                self._vain.setdefault(client, _Vain()).add(current.round, current.rewound[client] > 0)
        entry = self._entry(current)
        self.replica.apply([entry.records()])
        if spec.has_digest(current.round):
            entry = replace(entry, digest=self.replica.digest())
        losses = [c.loss for c in map(current.contributions.get, entry.clients) if c is not None and c.loss is not None]
        secret = self._terms is not None and self._terms.secret
        summary = RoundSummary(
            round=current.round,
            sampled=len(current.seeds),
            accepted=len(current.contributions) if secret else len(entry.clients),
            dropped=dict(sorted(current.dropped.items())),
            loss=float(np.mean(losses)) if losses else None,
            bytes_down=current.bytes_down,
            bytes_up=current.bytes_up,
            artifact_bytes=current.artifact_bytes,
            scalars=int(entry.scalars.size),
            max_scalar=float(np.abs(entry.scalars).max()) if entry.scalars.size else 0.0,
            clip=self._clip if self._terms is not None else None,
        )
        self.ledger.append(entry, summary.kept(secret))
        self._note(entry)
        self._open = None
        return summary

    def _entry(self, current: _Open) -> LedgerRound:
        """The round as the ledger will hold it, without theta's digest; moves the clipping bound."""
        if self._sanitiser is not None and not self._sanitiser.terms.local:
            return self._summed(current, self._sanitiser)
        clients = sorted(current.contributions)
        if len(clients) < self.spec.quorum:
            if clients:
                current.dropped["quorum"] += len(clients)
            clients = []
        contributions = [current.contributions[client] for client in clients]
        seeds, scalars = self._combine(contributions)
        counts = [c.counts for c in contributions if c.counts is not None and c.counts.size]
        if counts and self._sanitiser is not None:
            self._clip = self._sanitiser.next_bound(self._clip, float(np.mean(counts, dtype=np.float64)))
        return LedgerRound(current.round, seeds, scalars, tuple(clients), NO_DIGEST, self._gradients(contributions))

    def _summed(self, current: _Open, sanitiser: Sanitiser) -> LedgerRound:
        """A round of which only a noised sum is released; without records, when a secure sum was not revealed."""
        clients: tuple[int, ...] = ()
        if sanitiser.terms.mode == "client-secagg":
            released = None
            if current.total is not None:
                clients, sums = current.total
                released = sanitiser.unpack(sums, self._clip)
            elif current.held:
                current.dropped["quorum"] += len(current.held)
        else:
            answers = [current.contributions[client] for client in sorted(current.contributions)]
            parts = [(answer.scalars, answer.counts) for answer in answers if answer.counts is not None]
            released = sanitiser.total(parts, self._clip)  # of nobody too: that nobody answered is nobody's to know
        if released is None:
            return LedgerRound(current.round, *self._nothing(), clients, NO_DIGEST)
        scalars, counts = released
        if counts.size:
            self._clip = sanitiser.next_bound(self._clip, float(counts[0]))
        return LedgerRound(current.round, current.shared, scalars.astype(np.float32), clients, NO_DIGEST)

    def _nothing(self) -> tuple[Seeds, Scalars]:
        shape = (self.spec.local_steps, 0)
        return np.empty(shape, dtype=np.uint64), np.empty(shape, dtype=np.float32)

    def _combine(self, contributions: Sequence[Contribution]) -> tuple[Seeds, Any]:
        """The records [K, R] of a round: mean scalars of a seed, or every client's own seeds with weighted scalars."""
        spec = self.spec
        if not contributions:
            return self._nothing()
        weights = _weights(contributions)
        stacked = np.stack([c.scalars.astype(np.float64) for c in contributions])
        # [clients, K, P] each: the first scalars of all clients, then their second ones, of another scale.
        parts = np.split(stacked, spec.scalars, axis=2)
        if spec.seeds == "shared":
            combined = [self._aggregate(part, weights, self._settings) for part in parts]
            return contributions[0].seeds, np.concatenate(combined, axis=1).astype(np.float32)
        weighing = lookup(WEIGHINGS, spec.aggregation, "aggregation of seeds of one's own")
        scaled = [part * weighing(part, weights, self._settings)[:, None, None] for part in parts]
        own = np.concatenate([c.seeds for c in contributions], axis=1)
        return own, np.concatenate([row for part in scaled for row in part], axis=1).astype(np.float32)

    def _gradients(self, contributions: Sequence[Contribution]) -> Scalars | None:
        """The aggregate [K, F] float32 of the contributions' gradients, entry by entry; None: there are none."""
        found = [c.gradients.astype(np.float64) for c in contributions if c.gradients is not None]
        if not found:
            return None
        return self._aggregate(np.stack(found), _weights(contributions), self._settings).astype(np.float32)


def _weights(contributions: Sequence[Contribution]) -> npt.NDArray[np.float64]:
    """The share of each client's examples; where they are not said, all clients count the same."""
    counts = np.array([1 if c.examples is None else c.examples for c in contributions], dtype=np.float64)
    shares: npt.NDArray[np.float64] = counts / counts.sum()
    return shares


def _sent(entry: LedgerRound) -> RoundRecords:
    return RoundRecords(entry.seeds, entry.scalars, entry.gradients)


def replay(ledger: Ledger, replica: Replica, rounds: int | None = None) -> None:
    """Applies the first `rounds` rounds of a ledger (None: all) to a fresh replica, checking chain and last digest.

    Raises:
        LedgerError: theta0 is not the ledger's, the ledger is damaged, or theta's digest is not the recorded one.
    """
    spec = ledger.spec
    stop = ledger.rounds if rounds is None else rounds
    if not 0 <= stop <= ledger.rounds:
        raise LedgerError(f"{ledger.path} has {ledger.rounds} rounds; {stop} cannot be replayed")
    if replica.theta.numel() != spec.size:
        raise LedgerError(
            f"theta of this base model and space has {replica.theta.numel()} entries, the ledger's {spec.size}: "
            "the ledger belongs to another model or space"
        )
    if replica.digest().hex() != spec.theta0 and spec.initial:
        replica.reset(ledger.artifact(spec.initial))
    if replica.digest().hex() != spec.theta0:
        raise LedgerError(
            f"theta0 of this base model has the digest {replica.digest().hex()[:12]}, the ledger's is "
            f"{spec.theta0[:12]}: the ledger belongs to another model or space"
        )
    recorded = NO_DIGEST

    def records() -> Iterator[Records]:
        nonlocal recorded
        for entry in ledger.read(0, stop if stop < ledger.rounds else None):
            recorded = entry.digest
            yield entry.records()

    replica.apply(records())
    if any(recorded) and replica.digest() != recorded:
        raise LedgerError(f"{ledger.path}: replaying {stop} rounds gives another theta than the digest recorded there")
