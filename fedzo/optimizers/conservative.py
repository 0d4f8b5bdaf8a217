"""Conservative steps: a client takes its step back, or the opposite one, where the loss says so."""

from collections.abc import Generator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedzo.evaluation import Batch, LossRequest, Request
from fedzo.limits import CLIENT_MODES
from fedzo.optimizers.base import Records, Scalars, State
from fedzo.optimizers.sgd import SGD

# In order of preference where losses are equal.
_CHOICES = (1.0, 0.0, -1.0)


class Conservative(SGD):
    """theta <- the best by loss of theta - lr g, theta and theta + lr g, where g = 1/P sum_p g_p z_p.

    Each client judges its own step, by the mean loss over the step's batch, and sends choice times scalars with choice
    = +1, 0 or -1: what is replayed is plain SGD. Of equal losses the first in the order above wins; a loss that is not
    finite never does, and where none is finite theta stays. Weight decay is part of all three points.

    An example decides on the choice by its un-noised loss, and the choice multiplies what all others give: clipping
    examples does not bound that, so privacy of examples is not covered. Privacy of clients is: there a client's scalars
    are clipped and noised after the choice, whatever they are a function of.
    """

    source: ClassVar[str] = "ZO-SGD-Cons of ZO-Bench, arXiv 2402.11592"
    private: ClassVar[tuple[str, ...]] = CLIENT_MODES
    forwards: ClassVar[int] = 3

    def settle(
        self, theta: Tensor, state: State, batch: Batch, records: Records
    ) -> Generator[Request, Tensor, Scalars]:
        losses = yield from self._losses(theta, state, batch, records)
        means = losses.double().mean(dim=1).numpy()
        finite = np.isfinite(means)
        choice = _CHOICES[int(np.argmin(np.where(finite, means, np.inf)))] if finite.any() else 0.0
        return records.scalars * np.float32(choice)

    def _losses(
        self, theta: Tensor, state: State, batch: Batch, records: Records
    ) -> Generator[Request, Tensor, Tensor]:
        """float32 [3, B] of the choices; of a single direction in one request, without a copy of theta."""
        if records.seeds.size == 1 and theta.dtype == torch.float32 and not self.setup.decay:
            (seed,), (c,) = records.seeds[0].tolist(), self.coefficients(records)[0].tolist()
            offsets = tuple(choice * c for choice in _CHOICES)
            answer = yield LossRequest(theta, batch, offsets, (seed,), self.directions(records.step, theta, state))
            return answer[0]
        found = []
        for choice in _CHOICES:
            moved = theta.clone()
            self.apply(moved, state, [Records(records.step, records.seeds, records.scalars * np.float32(choice))])
            answer = yield LossRequest(moved, batch, (0.0,))
            found.append(answer[0, 0])
        return torch.stack(found)
