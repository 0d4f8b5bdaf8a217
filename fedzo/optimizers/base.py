"""What an update rule is: records in, theta out, the same bits for whoever applies them."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions import philox
from fedzo.directions.base import Directions
from fedzo.errors import ProtocolError
from fedzo.evaluation import Batch, Request
from fedzo.limits import FLOAT32_THETA, NO_CODES, NO_POOL, PRIVACY_MODES, Condition, Value
from fedzo.optimizers.schedule import Schedule
from fedzo.structures import Frame, IsotropicStructure, Layout, Structure

Seeds = npt.NDArray[np.uint64]
Scalars = npt.NDArray[np.float32]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Records:
    """The records of S consecutive steps.

    Attributes:
        step: index of the first of them in the run.
        seeds: uint64 [S, R].
        scalars: float32 [S, C R]: projected gradients, already weighted so that a step's gradient estimate is
            ``1/P sum_r scalars[s, r] z(seeds[s, r])``; behind them, for an estimator of C = 2 scalars a query, the R
            second ones, weighted alike.
        gradients: float32 [S, F], a step's gradient with respect to the entries that are moved by first-order steps
            (`Rule.ranges`); None: there are none, or the steps have no records.
    """

    step: int
    seeds: Seeds
    scalars: Scalars
    gradients: Scalars | None = None

    def __post_init__(self) -> None:
        shapes = self.seeds.shape, self.scalars.shape
        if self.seeds.ndim != 2 or self.scalars.ndim != 2 or shapes[0][0] != shapes[1][0] or not self._fits():
            raise ValueError(f"seeds {shapes[0]} and scalars {shapes[1]} must have the shapes [S, R] and [S, C R]")
        if self.gradients is not None and (self.gradients.ndim != 2 or len(self.gradients) != shapes[0][0]):
            raise ValueError(f"gradients {self.gradients.shape} must have the shape [S, F] with S = {shapes[0][0]}")

    def _fits(self) -> bool:
        width, found = self.seeds.shape[1], self.scalars.shape[1]
        return bool(found % width == 0 and found >= width if width else found == 0)

    @property
    def projected(self) -> Scalars:
        """float32 [S, R], the projected gradients."""
        return self.scalars[:, : self.seeds.shape[1]]

    @property
    def second(self) -> Scalars:
        """float32 [S, R], the second scalars; of a method that has none [S, 0]."""
        return self.scalars[:, self.seeds.shape[1] :]

    def steps(self) -> "list[Records]":
        """The S steps one by one."""

        def one(s: int) -> Records:
            gradients = None if self.gradients is None else self.gradients[s : s + 1]
            return Records(self.step + s, self.seeds[s : s + 1], self.scalars[s : s + 1], gradients)

        return [one(s) for s in range(len(self.seeds))]


@dataclass(frozen=True)
class Setup:
    """What an update rule is made from.

    Attributes:
        schedule: learning rate of a step.
        queries: P, the queries that a step's records average over.
        structure: the run's directions.
        rounding: seed of the streams that round; a rule that does not round does not depend on it.
        local_steps: K, steps of a round.
        values: the settings of the method by name.
    """

    schedule: Schedule
    queries: int = 1
    structure: Structure = field(default_factory=lambda: IsotropicStructure(Frame()))
    rounding: int = 0
    local_steps: int = 1
    values: Mapping[str, Value] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        return self.structure.frame.layout

    @property
    def decay(self) -> float:
        """Weight decay."""
        return float(self.values.get("weight_decay", 0.0))


class Rule:
    """Turns records into theta. State is part of theta's function: same records, same state, bit for bit.

    A rule of elementwise arithmetic defines `move` alone: IEEE additions, multiplications, divisions and square roots
    (`square_root`) in float32, one operation each (no addcmul, lerp or alpha=, which may fuse two roundings into one);
    what is not elementwise is computed in float64 by a fixed sequential algorithm and rounded once.

    Attributes:
        source: paper and equation.
        limits: conditions on the configuration under which it is valid.
        settings: names of the keys of ``method`` that it reads, in `Setup.values`.
        state_vectors: float32 vectors of theta's size that its state takes.
        private: privacy modes whose guarantee holds with it.
        forwards: forward passes of a step beside the estimator's.
        normalised: the length of a step does not depend on the gradient's.
        decoupled: weight decay shrinks theta by itself, else it is added to the gradient.
        ranges: (offset, length) in theta of the entries that it moves by gradients sent beside the scalars.
    """

    source: ClassVar[str]
    limits: ClassVar[tuple[Condition, ...]] = (NO_POOL, FLOAT32_THETA, NO_CODES)
    settings: ClassVar[tuple[str, ...]] = ("weight_decay",)
    state_vectors: ClassVar[int] = 0
    private: ClassVar[tuple[str, ...]] = PRIVACY_MODES
    forwards: ClassVar[int] = 0
    normalised: ClassVar[bool] = False
    decoupled: ClassVar[bool] = True
    ranges: tuple[tuple[int, int], ...] = ()

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    @property
    def gain(self) -> float:
        """How far estimates that stay the same move theta a step in the long run, in multiples of what SGD does."""
        return 1.0

    def init(self, theta0: Tensor) -> State:
        """The state before the first step, for theta0 [size]: tensors on theta0's device, all that is remembered."""
        return {}

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        """The directions that a step's seeds stand for, where theta and state are those before it."""
        return self.setup.structure.at(step)

    def anchor(self, step: int, state: State) -> Tensor | None:
        """An earlier theta [size] that the step's estimate needs; None: it needs none."""
        return None

    def settle(
        self, theta: Tensor, state: State, batch: Batch, records: Records
    ) -> Generator[Request, Tensor, Scalars]:
        """The scalars of a client's step once its estimate is known; may ask for more losses.

        Args:
            records: one step of the client's own, R = P.
        """
        yield from ()
        return records.scalars

    def apply(self, theta: Tensor, state: State, records: Sequence[Records]) -> State:
        """Moves theta in place along the records, in order, and returns the new state (the old one may be gone).

        A step without records (a round below its quorum) changes nothing.
        """
        for one in records:
            for step in one.steps():
                if step.seeds.size:
                    state = self.step(theta, state, step)
        return state

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        """One step, of at least one record."""
        return self.descend(theta, state, self.gradient(theta, state, records), records.step)

    def descend(self, theta: Tensor, state: State, gradient: Tensor, step: int) -> State:
        """As `move`, at a step's learning rate, with weight decay."""
        rate, decay = self.setup.schedule(step), self.setup.decay
        if decay and self.decoupled:
            theta.mul_(rounded(1.0 - rate * decay))
        elif decay:
            gradient.add_(theta * rounded(decay))
        return self.move(theta, state, gradient, rate)

    def move(self, theta: Tensor, state: State, gradient: Tensor, rate: float) -> State:
        """theta and state, in place, by a step's gradient estimate [size] float32 (which may be overwritten)."""
        theta.sub_(gradient.mul_(rounded(rate)))
        return state

    def gradient(self, theta: Tensor, state: State, records: Records) -> Tensor:
        """1/P sum_r g_r z_r of one step, float32 [size], the terms added in the order of the records."""
        shares = (records.projected[0].astype(np.float64) / self.setup.queries).astype(np.float32)
        found = torch.zeros_like(theta, dtype=torch.float32)
        return self.directions(records.step, theta, state).replay(found, records.seeds[0], shares)

    def coefficients(self, records: Records) -> npt.NDArray[np.float64]:
        """c [S, R] float64 with theta <- theta + sum c z: minus learning rate over P, times the projected gradient."""
        steps = range(records.step, records.step + records.seeds.shape[0])
        rates = np.array([-self.setup.schedule(step) / self.setup.queries for step in steps], dtype=np.float64)
        scaled: npt.NDArray[np.float64] = rates[:, None] * records.projected.astype(np.float64)
        return scaled

    def streams(self, step: int, count: int) -> Seeds:
        """Seeds [count] of the streams by which steps `step`, `step` + 1, ... round.

        They are words of block `step` of the Philox stream `Setup.rounding`, the first two, the low one first.
        """
        words = philox.words(self.setup.rounding, 4 * count, step).astype(np.uint64).reshape(count, 4)
        seeds: Seeds = words[:, 0] | (words[:, 1] << np.uint64(32))
        return seeds

    def fork(self, state: State) -> "tuple[Rule, State]":
        """Rule and state of a client's local steps between two rounds."""
        return self, {name: value.clone() for name, value in state.items()}

    def snapshot(self, theta: Tensor, state: State) -> bytes:
        """Everything that a holder of theta0 needs to stand at this (theta, state), as little-endian bytes."""
        return b"".join(_bytes(value) for value in (theta, *state.values()))

    def snapshot_bytes(self, theta: Tensor, state: State) -> int:
        """The length of a snapshot."""
        return sum(value.numel() * value.element_size() for value in (theta, *state.values()))

    def restore(self, theta: Tensor, state: State, data: bytes) -> State:
        """Inverse of `snapshot`: sets theta in place, returns the state.

        Raises:
            ProtocolError: the data has another length than `snapshot_bytes`; nothing has changed then.
        """
        expect_length(data, self.snapshot_bytes(theta, state))
        at = 0
        for value in (theta, *state.values()):
            size = value.numel() * value.element_size()
            value.copy_(_tensor(data[at : at + size], value.dtype).view(value.shape))
            at += size
        return state


def expect_length(data: bytes, length: int) -> None:
    """Raise ProtocolError unless a snapshot has this length."""
    if len(data) != length:
        raise ProtocolError(f"snapshot has {len(data)} bytes, wanted {length}")


def theta_array(theta: Tensor) -> npt.NDArray[np.generic]:
    """A tensor's values as a little-endian array on CPU; of bfloat16 their bits as uint16."""
    if theta.dtype == torch.bfloat16:
        return theta.detach().cpu().view(torch.uint16).numpy().astype("<u2", copy=False)
    values: npt.NDArray[np.generic] = theta.detach().cpu().numpy()
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def _bytes(value: Tensor) -> bytes:
    return theta_array(value).tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """Inverse of `_bytes`, flat."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(np.frombuffer(data, dtype="<u2").astype(np.uint16)).view(torch.bfloat16)
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.frombuffer(data, dtype=kind.newbyteorder("<")).astype(kind))


def rounded(value: float) -> float:
    """The float32 nearest to a float64."""
    return float(np.float32(value))


def square_root(values: Tensor) -> Tensor:
    """The square roots of float32 values, rounded as IEEE wants it, in place; returns them.

    On a CPU they are numpy's: torch.sqrt calls MKL there, whose last bit differs between processors.
    """
    if values.device.type != "cpu":
        return values.sqrt_()
    array = values.numpy()
    np.sqrt(array, out=array)
    return values
