"""Replay: base model + space + ledger -> theta."""

import hashlib
from collections.abc import Callable, Iterable

from torch import Tensor

from fedzo.errors import ProtocolError
from fedzo.federation.artifact import unpack_values
from fedzo.federation.messages import CatchUp
from fedzo.federation.spec import RunSpec
from fedzo.optimizers import Records, theta_array
from fedzo.structures import Layout

# Records fused into one pass (and entries of gradients); a bound on memory, not a choice that theta depends on.
_FUSED = 4096


def theta_digest(theta: Tensor) -> bytes:
    """SHA-256 over theta's values as little-endian bytes: 4 each, of a bfloat16 theta 2."""
    return hashlib.sha256(theta_array(theta).data).digest()


class Replica:
    """One party's theta: moves along records only, and knows how many rounds it has applied.

    Args:
        spec: the run.
        load: gives theta0 [size], float32 or bfloat16, for the replica to move. It is called again at every reset, and
            may each time fill and return the same memory: theta of a bfloat16 run is the model's own weights.
        layout: of theta; None: one vector without structure.
    """

    def __init__(self, spec: RunSpec, load: Callable[[], Tensor], layout: Layout | None = None) -> None:
        self.spec = spec
        self.rule = spec.build_rule(layout or Layout.flat(spec.size))
        self._load = load
        self.reset()

    def reset(self, initial: bytes = b"") -> None:
        """Back to theta0, with the run's own initial values (`pack_values`) where the base model has none."""
        self.theta, self.initial = self._load(), initial
        if initial:
            unpack_values(initial, self.theta)
        self.state = self.rule.init(self.theta)
        self.rounds = 0
        self._digest: tuple[int, bytes] | None = None

    def apply(self, rounds: Iterable[Records]) -> None:
        """Applies the records of the next rounds, in order, fused."""
        pending: list[Records] = []
        held = 0
        for records in rounds:
            if records.step != (self.rounds + len(pending)) * self.spec.local_steps:
                raise ProtocolError(f"records of step {records.step} cannot follow {self.rounds + len(pending)} rounds")
            pending.append(records)
            held += records.seeds.size + (0 if records.gradients is None else records.gradients.size)
            if held >= _FUSED:
                self._flush(pending)
                held = 0
        if pending:
            self._flush(pending)

    def _flush(self, pending: list[Records]) -> None:
        self.state = self.rule.apply(self.theta, self.state, pending)
        self.rounds += len(pending)
        pending.clear()

    def catch_up(self, missed: CatchUp) -> None:
        """Brings the replica to the plan's round; the part that it already stands at is skipped.

        Raises:
            ProtocolError: the catch-up starts after where the replica stands, or does not reach where it says.
        """
        if missed.kind == "snapshot" and self.rounds != missed.stop:
            self.state = self.rule.restore(self.theta, self.state, missed.snapshot)
            self.rounds = missed.stop
        elif missed.kind == "records":
            if self.rounds < missed.start:
                raise ProtocolError(f"records start at round {missed.start}, the replica stands at {self.rounds}")
            new = missed.records[self.rounds - missed.start :]
            steps, first = self.spec.local_steps, self.rounds
            self.apply([Records((first + i) * steps, r.seeds, r.scalars, r.gradients) for i, r in enumerate(new)])
        if self.rounds != missed.stop:
            raise ProtocolError(f"after catching up the replica stands at round {self.rounds}, not {missed.stop}")

    def snapshot(self) -> bytes:
        """Everything that a replica with the same theta0 (and `initial`) needs to stand where this one does."""
        return self.rule.snapshot(self.theta, self.state)

    def restore(self, rounds: int, initial: bytes, snapshot: bytes) -> None:
        """Stands where the replica of a snapshot stood.

        Raises:
            ProtocolError: the snapshot is not of this theta and rule; the replica is then of no use until its reset.
        """
        self.reset(initial)
        self.state = self.rule.restore(self.theta, self.state, snapshot)
        self.rounds = rounds

    def digest(self) -> bytes:
        """SHA-256 of theta, computed once a round."""
        if self._digest is None or self._digest[0] != self.rounds:
            self._digest = (self.rounds, theta_digest(self.theta))
        return self._digest[1]
