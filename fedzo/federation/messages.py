"""What travels: hello, plan, contribution and their two refusals, as little-endian bytes.

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
_PLAN = struct.Struct("<HHdI32sBIII")
_CONTRIBUTION = struct.Struct("<HHIf")
_ROUND = struct.Struct("<HIB")
_KIND_PLAN, _KIND_CONTRIBUTION, _KIND_BEHIND, _KIND_FAILURE = 1, 2, 3, 4
FailureReason = Literal["digest", "not-finite"]
_REASONS: tuple[FailureReason, ...] = ("digest", "not-finite")
_CATCH_UP: tuple[Literal["none", "records", "snapshot"], ...] = ("none", "records", "snapshot")


@dataclass(frozen=True)
class Hello:
    """What a worker says of itself before a run.

    Attributes:
        client: number of the client, 0 <= client < clients.
        examples: examples that it trains on.
        protocol, fingerprint, mask, space_hash, theta0, family, theta_dtype: as in RunSpec, and must match it.
        quantisation, compute_dtype: of its base; may differ from others', and are recorded.
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


@dataclass(frozen=True)
class RoundRecords:
    """The records of one round on their way to a client: seeds uint64 [K, R], scalars float32 [K, C R]."""

    seeds: Seeds
    scalars: Scalars

    def to_bytes(self) -> bytes:
        steps, width = self.seeds.shape
        scalars = self.scalars.shape[1] // max(1, width)
        return _ROUND.pack(steps, width, scalars) + _pack(self.seeds, self.scalars)

    @property
    def nbytes(self) -> int:
        return _ROUND.size + 8 * self.seeds.size + 4 * self.scalars.size


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

    def to_bytes(self) -> bytes:
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        steps, queries = self.seeds.shape
        caught = self.catch_up
        body = b"".join(r.to_bytes() for r in caught.records) if caught.kind == "records" else caught.snapshot
        kind = _CATCH_UP.index(caught.kind)
        fixed = _PLAN.pack(
            steps, queries, self.eps, self.batch_size, self.digest, kind, caught.start, len(body), len(self.initial)
        )
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_PLAN, self.run_id, self.round, self.client)
        return head + fixed + self.seeds.astype("<u8").tobytes() + body + self.initial


@dataclass(frozen=True)
class Contribution:
    """What a client answers.

    Attributes:
        run_id, round, client: of the plan.
        seeds: uint64 [K, P], the plan's.
        scalars: float32 [K, C P], the mean projected gradient over the step's batch for each seed; behind them, for
            a method of C = 2 scalars a query, the second ones.
        examples: examples that the client trains on.
        loss: mean loss over its steps.
    """

    run_id: bytes
    round: int
    client: int
    seeds: Seeds
    scalars: Scalars
    examples: int
    loss: float

    def to_bytes(self) -> bytes:
        steps, queries = self.seeds.shape
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_CONTRIBUTION, self.run_id, self.round, self.client)
        return head + _CONTRIBUTION.pack(steps, queries, self.examples, self.loss) + _pack(self.seeds, self.scalars)


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
    """A worker could not do a plan; the reason is one of a fixed list of words, never free text (no data leaks).

    "digest": its theta was not the plan's, it starts over; "not-finite": its losses were not.
    """

    run_id: bytes
    round: int
    client: int
    reason: FailureReason

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(b"fz", PROTOCOL, _KIND_FAILURE, self.run_id, self.round, self.client)
        return head + struct.pack("<B", _REASONS.index(self.reason))


Message = Plan | Contribution | Behind | Failure


def _pack(seeds: Seeds, scalars: Scalars) -> bytes:
    return seeds.astype("<u8").tobytes() + scalars.astype("<f4").tobytes()


def _unpack(data: memoryview, steps: int, width: int) -> tuple[Seeds, Scalars]:
    """Seeds [steps, width] and all the scalars behind them, [steps, a multiple of width]."""
    at = 8 * steps * width
    unit = 4 * steps * width
    rest = len(data) - at
    if rest < unit or rest % unit if unit else rest:
        raise ProtocolError(f"seeds and scalars of {len(data)} bytes, wanted {at} and a multiple of {unit}")
    seeds = np.frombuffer(data[:at], dtype="<u8").astype(np.uint64).reshape(steps, width)
    scalars = np.frombuffer(data[at:], dtype="<f4").astype(np.float32)
    return seeds, scalars.reshape(steps, width * (rest // unit if unit else 0))


def max_contribution_bytes(local_steps: int, queries: int, scalars: int = 1) -> int:
    """The length of a right contribution, which no right message of a worker exceeds."""
    return _HEAD.size + _CONTRIBUTION.size + (8 + 4 * scalars) * local_steps * queries


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
        if kind == _KIND_CONTRIBUTION:
            steps, queries, examples, loss = _CONTRIBUTION.unpack_from(body)
            body = body[_CONTRIBUTION.size :]
            return Contribution(run_id, round_, client, *_unpack(body, steps, queries), examples, loss)
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


def _expect(length: int, wanted: int) -> None:
    if length != wanted:
        raise ProtocolError(f"message body of {length} bytes, wanted {wanted}")


def _decode_plan(body: memoryview, run_id: bytes, round_: int, client: int) -> Plan:
    steps, queries, eps, batch_size, digest, kind, start, length, initial = _PLAN.unpack_from(body)
    body = body[_PLAN.size :]
    if kind >= len(_CATCH_UP):
        raise ProtocolError(f"unknown kind of catch-up {kind}")
    _expect(len(body), 8 * steps * queries + length + initial)
    seeds = np.frombuffer(body[: 8 * steps * queries], dtype="<u8").astype(np.uint64).reshape(steps, queries)
    rest = body[8 * steps * queries :]
    caught, records = rest[:length], []
    if _CATCH_UP[kind] == "records":
        while caught:
            k, width, scalars = _ROUND.unpack_from(caught)
            caught, size = caught[_ROUND.size :], (8 + 4 * scalars) * k * width
            if len(caught) < size:
                raise ProtocolError(f"records of {len(caught)} bytes, wanted {size}")
            records.append(RoundRecords(*_unpack(caught[:size], k, width)))
            caught = caught[size:]
    snapshot = bytes(rest[:length]) if _CATCH_UP[kind] == "snapshot" else b""
    catch_up = CatchUp(_CATCH_UP[kind], start, round_, tuple(records), snapshot)
    return Plan(run_id, round_, client, seeds, eps, batch_size, digest, catch_up, bytes(rest[length:]))
