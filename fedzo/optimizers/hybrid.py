"""Hybrid fine-tuning: a named part of theta moves by back-propagated gradients, the rest by zeroth-order scalars."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions.base import Directions
from fedzo.errors import ProtocolError, SpaceError
from fedzo.limits import FLOAT32_THETA, NO_POOL, Condition, Limit
from fedzo.optimizers.base import Records, Rule, Setup, State, expect_length
from fedzo.structures import Frame, IsotropicStructure, Layout

Ranges = tuple[tuple[int, int], ...]
_PLAIN = ("sgd", "sign", "momentum", "adam", "adamw")  # move theta by a gradient, entry by entry


def first_order_ranges(layout: Layout, patterns: Sequence[str]) -> Ranges:
    """(offset, length) in theta of the parameters whose names match a pattern (fnmatch), neighbours joined.

    Raises:
        SpaceError: no parameter matches, all do, or one is held as scales or codes.
    """
    found: list[tuple[int, int]] = []
    for segment in layout.segments:
        if not any(fnmatchcase(segment.name, pattern) for pattern in patterns):
            continue
        if segment.holds != "values":
            raise SpaceError(
                f"method.first_order names {segment.name}, of which theta holds the {segment.holds}: first-order steps "
                "are for values; name other parameters"
            )
        start = found.pop()[0] if found and sum(found[-1]) == segment.offset else segment.offset
        found.append((start, segment.offset + segment.size - start))
    moved = sum(length for _, length in found)
    if 0 < moved < layout.size:
        return tuple(found)
    example = layout.segments[0].name if layout.segments else "none"
    what = "every trainable parameter, which leaves none to" if moved else "no trainable parameter, which leaves all to"
    raise SpaceError(
        f"method.first_order = {', '.join(patterns)} matches {what} the zeroth-order method; a name in this space: "
        f"{example}"
    )


@dataclass(frozen=True)
class Outside:
    """Other directions, but 0 within ranges (offset, length) of theta."""

    inner: Directions
    ranges: Ranges

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        self.inner.fill(out, seed, offset=offset)
        for part in self._within(out, offset):
            part.zero_()
        return out

    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        kept = [part.clone() for part in self._within(theta, offset)]
        moved = self.inner.axpy(theta, seed, coefficient, offset=offset, out=out)
        for part, values in zip(self._within(moved, offset), kept, strict=True):
            part.copy_(values)
        return moved

    def replay(self, theta: Tensor, seeds: npt.NDArray[np.uint64], coefficients: npt.NDArray[np.float32]) -> Tensor:
        kept = [part.clone() for part in self._within(theta, 0)]
        self.inner.replay(theta, seeds, coefficients)
        for part, values in zip(self._within(theta, 0), kept, strict=True):
            part.copy_(values)
        return theta

    def _within(self, vector: Tensor, offset: int) -> list[Tensor]:
        """Views of those entries of theta[offset : offset + n] that the ranges hold."""
        end = offset + len(vector)
        bounds = [(max(at, offset) - offset, min(at + length, end) - offset) for at, length in self.ranges]
        return [vector[start:stop] for start, stop in bounds if start < stop]


class Hybrid(Rule):
    """theta[ranges] moves by a first-order rule along (sum_i n_i grad loss_i) / (sum_i n_i), the rest by another rule.

    A client i of n_i examples sends, beside its scalars, the gradient of its batch's mean loss with respect to the
    ranges, at the same theta. Directions are 0 there. Each of the two rules has a state and a learning rate of its own,
    and decays its own entries. Arrays are covered by no privacy mode: clipping and noise are for scalars.

    Not in the registry: ``method.first_order`` makes it of two others.

    Args:
        zeroth: moves every entry of theta by itself; what it does within the ranges is undone.
        first: moves theta[ranges] [F] by a gradient [F].
        ranges: (offset, length) in theta, ascending.
    """

    source: ClassVar[str] = (
        "ElasticZO, arXiv 2501.04287, algorithm 1; ZO-Bench, arXiv 2402.11592, section 5; cf. Addax, arXiv 2410.06441"
    )
    limits: ClassVar[tuple[Condition, ...]] = (
        NO_POOL,
        FLOAT32_THETA,
        Limit("method.optimizer", (*_PLAIN, "hizoo", "hiso", "qzo"), "other rules look at theta as a whole"),
        Limit("method.first_order_optimizer", _PLAIN, "others need more than a gradient"),
    )
    settings: ClassVar[tuple[str, ...]] = ("first_order", "first_order_optimizer", "first_order_rate")
    private: ClassVar[tuple[str, ...]] = ()
    forwards: ClassVar[int] = 1  # and the way back through what lies above the ranges

    def __init__(self, zeroth: Rule, first: Rule, ranges: Ranges) -> None:
        super().__init__(zeroth.setup)
        self.zeroth, self.first, self.ranges = zeroth, first, ranges

    @staticmethod
    def of(zeroth: type[Rule], first: type[Rule], setup: Setup) -> "Hybrid":
        """From the settings: ``first_order`` are the patterns, joined by ", ".

        Raises:
            SpaceError: as `first_order_ranges`.
        """
        ranges = first_order_ranges(setup.layout, str(setup.values["first_order"]).split(", "))
        schedule = replace(setup.schedule, learning_rate=float(setup.values["first_order_rate"]))
        structure = IsotropicStructure(Frame(layout=Layout.flat(sum(length for _, length in ranges))))
        return Hybrid(zeroth(setup), first(replace(setup, schedule=schedule, structure=structure)), ranges)

    @property
    def gain(self) -> float:
        return self.zeroth.gain

    def init(self, theta0: Tensor) -> State:
        return _joined(self.zeroth.init(theta0), self.first.init(self._part(theta0)))

    def directions(self, step: int, theta: Tensor, state: State) -> Directions:
        return Outside(self.zeroth.directions(step, theta, _of("zeroth", state)), self.ranges)

    def step(self, theta: Tensor, state: State, records: Records) -> State:
        """As `Rule.step`.

        Raises:
            ProtocolError: the step's gradient is missing or has another length; theta is then unchanged.
        """
        part = self._part(theta)
        if records.gradients is None or records.gradients.shape[1] != len(part):
            found = 0 if records.gradients is None else records.gradients.shape[1]
            raise ProtocolError(f"the gradient of step {records.step} has {found} entries, wanted {len(part)}")
        gradient = torch.from_numpy(records.gradients[0].copy()).to(theta.device)
        zeroth = self.zeroth.apply(theta, _of("zeroth", state), [replace(records, gradients=None)])
        first = self.first.descend(part, _of("first", state), gradient, records.step)
        at = 0
        for offset, length in self.ranges:
            theta[offset : offset + length].copy_(part[at : at + length])
            at += length
        return _joined(zeroth, first)

    def _part(self, theta: Tensor) -> Tensor:
        """A copy of theta[ranges], [F]."""
        return torch.cat([theta[offset : offset + length] for offset, length in self.ranges])

    def fork(self, state: State) -> tuple[Rule, State]:
        zeroth, of_zeroth = self.zeroth.fork(_of("zeroth", state))
        first, of_first = self.first.fork(_of("first", state))
        return Hybrid(zeroth, first, self.ranges), _joined(of_zeroth, of_first)

    def snapshot(self, theta: Tensor, state: State) -> bytes:
        rest = self.first.snapshot(theta[:0], _of("first", state))  # its part of theta is in the other's
        return self.zeroth.snapshot(theta, _of("zeroth", state)) + rest

    def snapshot_bytes(self, theta: Tensor, state: State) -> int:
        rest = self.first.snapshot_bytes(theta[:0], _of("first", state))
        return self.zeroth.snapshot_bytes(theta, _of("zeroth", state)) + rest

    def restore(self, theta: Tensor, state: State, data: bytes) -> State:
        expect_length(data, self.snapshot_bytes(theta, state))
        zeroth, first = _of("zeroth", state), _of("first", state)
        cut = self.zeroth.snapshot_bytes(theta, zeroth)
        zeroth = self.zeroth.restore(theta, zeroth, data[:cut])
        return _joined(zeroth, self.first.restore(theta[:0], first, data[cut:]))


def _joined(zeroth: State, first: State) -> State:
    parts = {"zeroth": zeroth, "first": first}
    return {f"{whose}.{name}": value for whose, state in parts.items() for name, value in state.items()}


def _of(whose: str, state: State) -> State:
    """Inverse of `_joined`."""
    start = f"{whose}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
