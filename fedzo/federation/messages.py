"""What travels: hello, plan, contribution (or word that one is held) and their two refusals, as little-endian bytes.

Every message starts with a fixed head: magic "fz", protocol version, kind, run id (8 bytes), round, client. A message
is checked for its length before anything in it is believed.
"""

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from fedzo.errors import ProtocolError
from fedzo.federation.spec import PROTOCOL
from fedzo.optimizers import Scalars, Seeds

_HEAD = struct.Struct("<2sBB8sII")
_PLAN = struct.Struct("<HHddI32sBIII")
_CONTRIBUTION = struct.Struct("<HHIf")
_PRIVATE = struct.Struct("<HHH")
_ROUND = struct.Struct("<HIB")
_ENTRIES = struct.Struct("<I")
_WITH_GRADIENTS = 1 << 31  # in a round's number of records
_KIND_PLAN, _KIND_CONTRIBUTION, _KIND_BEHIND, _KIND_FAILURE, _KIND_GRADIENTS = 1, 2, 3, 4, 5
_KIND_PRIVATE, _KIND_HELD = 6, 7
FailureReason = Literal["digest", "not-finite", "budget"]
_REASONS: tuple[FailureReason, ...] = ("digest", "not-finite", "budget")
_CATCH_UP: tuple[Literal["none", "records", "snapshot"], ...] = ("none", "records", "snapshot")


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself before a run.

    Attributes:
        client: number of the client, 0 <= client < clients.
        examples: examples that it trains on; 0 in a private run, where it does not say.
        protocol, fingerprint, mask, space_hash, theta0, family, theta_dtype: as in RunSpec, and must match it.
        quantisation, compute_dtype: of its base; may differ from others', and are recorded.
        applied: rounds that its theta has already gone through.
    """

    client: int
    examples: int
    protocol: int
    fingerprint: str
    mask: str
    space_hash: str
    theta0: str
    family: str
    theta_dtype: str
    quantisation: str
    compute_dtype: str
    applied: int = 0


@dataclass(frozen=True)
class RoundRecords:
    """The records of one round on their way to a client.

    Attributes:
        seeds, scalars: uint64 [K, R] and float32 [K, C R].
        gradients: float32 [K, F] as in `Records`, or None.
    """

    seeds: Seeds
    scalars: Scalars
    gradients: Scalars | None = None

    def to_bytes(self) -> bytes:
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:  # kept, for it is part of many clients' plans
        steps, width = self.seeds.shape
        mark, scalars = 0 if self.gradients is None else _WITH_GRADIENTS, self.scalars.shape[1] // max(1, width)
        return _ROUND.pack(steps, width | mark, scalars) + _pack(self.seeds, self.scalars, self.gradients)

    @property
    def nbytes(self) -> int:
        gradients = 0 if self.gradients is None else _ENTRIES.size + 4 * self.gradients.size
        return _ROUND.size + 8 * self.seeds.size + 4 * self.scalars.size + gradients


@dataclass(frozen=True)
class CatchUp:
    """What brings a worker from `start` rounds applied to `stop`.

    Attributes:
        kind: "records" (of the rounds start..stop-1), "snapshot" (state at stop) or "none".
        start, stop: numbers of rounds applied before and after.
        records: one entry a round, for kind "records".
        snapshot: bytes of the update rule, for kind "snapshot".
    """

    kind: Literal["none", "records", "snapshot"]
    start: int
    stop: int
    records: tuple[RoundRecords, ...] = ()
    snapshot: bytes = b""

    @cached_property
    def nbytes(self) -> int:
        return sum(r.nbytes for r in self.records) if self.kind == "records" else len(self.snapshot)


@dataclass(frozen=True)
class Plan:
    """What the server asks of one client in a round.

    Attributes:
        run_id: 8 bytes.
        round: number of the round, from 0.
        client: whom it is for.
        seeds: uint64 [K, P].
        eps: distance of the two points from theta.
        batch_size: examples of a local step.
        digest: SHA-256 of theta that the client must stand at, or 32 zero bytes when none was taken.
        catch_up: what the client missed.
        clip: of a private run, the bound on the norm of a unit's scalars; else 0.
        initial: initial values of parameters that the base model does not have, when the client's differ; else b"".
    """

    run_id: bytes
    round: int
    client: int
    seeds: Seeds
    eps: float
    batch_size: int
    digest: bytes
    catch_up: CatchUp
    initial: bytes = b""
    clip: float = 0.0

    def to_bytes(self) -> bytes:
        steps, queries = self.seeds.shape
        caught = self.catch_up
        body = [r.to_bytes() for r in caught.records] if caught.kind == "records" else [caught.snapshot]
        kind = _CATCH_UP.index(caught.kind)
        fixed = _PLAN.pack(
            steps, queries, self.eps, self.clip, self.batch_size, self.digest, kind, caught.start, caught.nbytes,
            len(self.initial),
        )  # fmt: skip
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_PLAN, self.run_id, self.round, self.client)
        return b"".join((head, fixed, self.seeds.astype("<u8").tobytes(), *body, self.initial))

    @property
    def nbytes(self) -> int:
        """Length of `to_bytes`, which it does not make: a round has a plan for each of many clients."""
        return _HEAD.size + _PLAN.size + 8 * self.seeds.size + self.catch_up.nbytes + len(self.initial)


@dataclass(frozen=True)
class Contribution:
    """What a client answers.

    Attributes:
        run_id, round, client: of the plan.
        seeds: uint64 [K, P], the plan's.
        scalars: float32 [K, C P], the mean projected gradient over the step's batch for each seed; behind them, for
            a method of C = 2 scalars a query, the second ones.
        examples: examples that the client trains on; None in a private run, where it does not say.
        loss: mean loss over its steps; None in a private run.
        gradients: float32 [K, F], the gradient of the mean loss over the step's batch with respect to the entries that
            the update rule moves by gradients (`Rule.ranges`); None: it has none.
        counts: float32 [n] of a private run, how many units were within the bound (`Sanitiser`); n is 0 where the bound
            is fixed. None: the run is not private.
    """

    run_id: bytes
    round: int
    client: int
    seeds: Seeds
    scalars: Scalars
    examples: int | None
    loss: float | None
    gradients: Scalars | None = None
    counts: Scalars | None = None

    def to_bytes(self) -> bytes:
        steps, queries = self.seeds.shape
        if self.counts is not None:
            head = _HEAD.pack(b"fz", PROTOCOL, _KIND_PRIVATE, self.run_id, self.round, self.client)
            fixed = _PRIVATE.pack(steps, queries, self.counts.size)
            return head + fixed + self.counts.astype("<f4").tobytes() + _pack(self.seeds, self.scalars, None)
        kind = _KIND_CONTRIBUTION if self.gradients is None else _KIND_GRADIENTS
        head = _HEAD.pack(b"fz", PROTOCOL, kind, self.run_id, self.round, self.client)
        fixed = _CONTRIBUTION.pack(steps, queries, self.examples, self.loss)
        return head + fixed + _pack(self.seeds, self.scalars, self.gradients)


@dataclass(frozen=True)
class Held:
    """A worker has done a plan, and keeps its contribution for the secure sum."""

    run_id: bytes
    round: int
    client: int

    def to_bytes(self) -> bytes:
        return _HEAD.pack(b"fz", PROTOCOL, _KIND_HELD, self.run_id, self.round, self.client)


@dataclass(frozen=True)
class Behind:
    """A worker's answer to a plan whose catch-up starts after where it stands: `applied` rounds."""

    run_id: bytes
    round: int
    client: int
    applied: int

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_BEHIND, self.run_id, self.round, self.client)
        return head + struct.pack("<I", self.applied)


@dataclass(frozen=True)
class Failure:
    """A worker could not do a plan; the reason is one of a fixed list of words, never free text, which may hold data.

    "digest": its theta was not the plan's, it starts over; "not-finite": its losses were not; "budget": it would
    release more than its privacy budget.
    """

    run_id: bytes
    round: int
    client: int
    reason: FailureReason

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_FAILURE, self.run_id, self.round, self.client)
        return head + struct.pack("<B", _REASONS.index(self.reason))


Answer = Contribution | Held | Behind | Failure
Message = Plan | Answer


def _pack(seeds: Seeds, scalars: Scalars, gradients: Scalars | None) -> bytes:
    """Seeds and scalars; around them, where there are gradients, the number of their entries and themselves."""
    body = seeds.astype("<u8").tobytes() + scalars.astype("<f4").tobytes()
    if gradients is None:
        return body
    return _ENTRIES.pack(gradients.shape[1]) + body + gradients.astype("<f4", copy=False).tobytes()


def _unpack(data: memoryview, steps: int, width: int, entries: int | None) -> tuple[Seeds, Scalars, Scalars | None]:
    """Seeds [steps, width], scalars [steps, a multiple of width] and gradients [steps, entries] (None: there are none).

    The data is as `_pack` makes it, without the number of entries.
    """
    at, unit, tail = 8 * steps * width, 4 * steps * width, 4 * steps * (entries or 0)
    rest = len(data) - at - tail
    if rest < unit or rest % unit if unit else rest:
        raise ProtocolError(f"seeds and scalars of {len(data) - tail} bytes, wanted {at} and a multiple of {unit}")
    seeds = np.frombuffer(data[:at], dtype="<u8").astype(np.uint64).reshape(steps, width)
    values = np.frombuffer(data[at:], dtype="<f4").astype(np.float32)
    scalars = values[: rest // 4].reshape(steps, width * (rest // unit if unit else 0))
    return seeds, scalars, None if entries is None else values[rest // 4 :].reshape(steps, entries)


def max_contribution_bytes(
    local_steps: int, queries: int, scalars: int = 1, entries: int = 0, counts: int | None = None
) -> int:
    """The length of a right contribution, which no right message of a worker exceeds.

    Args:
        scalars: C, of a query.
        entries: F, of a gradient; 0: the contribution has none.
        counts: of a private run's contribution; None: the run is not private.
    """
    body = (8 + 4 * scalars) * local_steps * queries
    if counts is not None:
        return _HEAD.size + _PRIVATE.size + 4 * counts + body
    gradients = _ENTRIES.size + 4 * local_steps * entries if entries else 0
    return _HEAD.size + _CONTRIBUTION.size + body + gradients


def decode(data: bytes) -> Message:
    """A message from its bytes.

    Raises:
        ProtocolError: wrong magic, version, kind or length.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size:
        raise ProtocolError(f"message of {len(view)} bytes, wanted at least {_HEAD.size}")
    magic, version, kind, run_id, round_, client = _HEAD.unpack_from(view)
    if magic != b"fz":
        raise ProtocolError("not a message of fedzo")
    if version != PROTOCOL:
        raise ProtocolError(f"protocol version {version}, wanted {PROTOCOL}")
    body = view[_HEAD.size :]
    try:
        if kind == _KIND_PLAN:
            return _decode_plan(body, run_id, round_, client)
        if kind in (_KIND_CONTRIBUTION, _KIND_GRADIENTS):
            steps, queries, examples, loss = _CONTRIBUTION.unpack_from(body)
            entries, body = _entries(body[_CONTRIBUTION.size :], kind == _KIND_GRADIENTS)
            seeds, scalars, gradients = _unpack(body, steps, queries, entries)
            return Contribution(run_id, round_, client, seeds, scalars, examples, loss, gradients)
        if kind == _KIND_PRIVATE:
            steps, queries, number = _PRIVATE.unpack_from(body)
            body = body[_PRIVATE.size :]
            if len(body) < 4 * number:
                raise ProtocolError(f"counts of {len(body)} bytes, wanted {4 * number}")
            counts = np.frombuffer(body[: 4 * number], dtype="<f4").astype(np.float32)
            seeds, scalars, _ = _unpack(body[4 * number :], steps, queries, None)
            return Contribution(run_id, round_, client, seeds, scalars, None, None, None, counts)
        if kind == _KIND_HELD:
            _expect(len(body), 0)
            return Held(run_id, round_, client)
        if kind == _KIND_BEHIND:
            _expect(len(body), 4)
            return Behind(run_id, round_, client, struct.unpack("<I", body)[0])
        if kind == _KIND_FAILURE:
            _expect(len(body), 1)
            if body[0] >= len(_REASONS):
                raise ProtocolError(f"unknown reason of failure {body[0]}")
            return Failure(run_id, round_, client, _REASONS[body[0]])
    except struct.error as error:
        raise ProtocolError(f"message of {len(view)} bytes ends too early") from error
    raise ProtocolError(f"unknown kind of message {kind}")


def decode_answer(data: bytes) -> Answer:
    """A worker's answer from its bytes.

    Raises:
        ProtocolError: as `decode`; and a plan, which is refused by its head: of few bytes it may make many records.
    """
    if data[:2] == b"fz" and data[3:4] == bytes([_KIND_PLAN]):
        raise ProtocolError("a plan, wanted an answer to one")
    message = decode(data)
    assert not isinstance(message, Plan)
    return message


def _entries(data: memoryview, stated: bool) -> tuple[int | None, memoryview]:
    """The number of a gradient's entries, where it is stated, and what follows it."""
    return (_ENTRIES.unpack_from(data)[0], data[_ENTRIES.size :]) if stated else (None, data)


def _expect(length: int, wanted: int) -> None:
    if length != wanted:
        raise ProtocolError(f"message body of {length} bytes, wanted {wanted}")


def _decode_plan(body: memoryview, run_id: bytes, round_: int, client: int) -> Plan:
    steps, queries, eps, clip, batch_size, digest, kind, start, length, initial = _PLAN.unpack_from(body)
    body = body[_PLAN.size :]
    if kind >= len(_CATCH_UP):
        raise ProtocolError(f"unknown kind of catch-up {kind}")
    _expect(len(body), 8 * steps * queries + length + initial)
    seeds = np.frombuffer(body[: 8 * steps * queries], dtype="<u8").astype(np.uint64).reshape(steps, queries)
    rest = body[8 * steps * queries :]
    caught, records = rest[:length], []
    if _CATCH_UP[kind] == "records":
        while caught:
            k, marked, scalars = _ROUND.unpack_from(caught)
            width = marked & ~_WITH_GRADIENTS
            entries, caught = _entries(caught[_ROUND.size :], marked != width)
            size = (8 + 4 * scalars) * k * width + 4 * k * (entries or 0)
            if len(caught) < size:
                raise ProtocolError(f"records of {len(caught)} bytes, wanted {size}")
            records.append(RoundRecords(*_unpack(caught[:size], k, width, entries)))
            caught = caught[size:]
    snapshot = bytes(rest[:length]) if _CATCH_UP[kind] == "snapshot" else b""
    catch_up = CatchUp(_CATCH_UP[kind], start, round_, tuple(records), snapshot)
    return Plan(run_id, round_, client, seeds, eps, batch_size, digest, catch_up, bytes(rest[length:]), clip)
