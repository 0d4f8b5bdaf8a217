"""A learning rate to start from, by a few queries at theta0. docs/step-size.md derives the rule."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.directions.base import Directions, Filled
from fedzo.errors import RunError
from fedzo.estimators import Estimator
from fedzo.evaluation import Batch, LossRequest
from fedzo.federation.randomness import derive, words64
from fedzo.optimizers import Rule

# Directions of a step up to which its curvature is measured; more of them count as so many.
MOST = 8
# Steps that are measured at least, and queries of all steps at least.
_STEPS, _QUERIES = 4, 8
# Examples of a probe, at least and at most.
LEAST_EXAMPLES, MOST_EXAMPLES = 32, 128
# Distances that are tried at most.
_TRIES = 8
# Of |gradient|^2 in E[g^2]: what so few queries cannot tell from 0.
_LEAST_SIGNAL = 0.1
# What a run takes of the best rate of its first step.
SHARE = 0.4
# Where a step's length does not depend on the gradient's: the share of the loss at theta0 that the steps of the whole
# run would cost if they led nowhere.
COST = 0.1


@dataclass(frozen=True)
class Probe:
    """The loss around theta0, seen along the directions of a run's first steps.

    Attributes:
        loss: at theta0.
        gradient: norm of its gradient.
        noise: variance over the examples of their projected gradients along one direction.
        directions: D, those that a measured step was made of.
        curvature: u'Hu, mean over such steps along u = sum_d g_d z_d / sqrt(sum_d g_d^2), at the points theta +- t u
            where the loss is about a tenth (`COST`) above its start; at least the variance of the examples' slopes.
        distance: t.
        forwards, examples: passes over a batch that it took, and examples of all batches together.
    """

    loss: float
    gradient: float
    noise: float
    directions: int
    curvature: float
    distance: float
    forwards: int
    examples: int

    def square(self, examples: int) -> float:
        """E[g^2] of a projected gradient g that is a mean over so many examples."""
        return self.gradient**2 + self.noise / examples

    def best(self, examples: int, privacy: float = 0.0) -> float:
        """The rate at which one step of SGD lowers the loss most: E[gradient . step] over E[step' H step].

        Args:
            privacy: variance of the noise that is added to a projected gradient.
        """
        return self.directions * self.gradient**2 / ((self.square(examples) + privacy) * self.curvature)


@dataclass(frozen=True)
class Steps:
    """What the steps of a run are.

    Attributes:
        directions: that an estimate averages over.
        examples: behind a direction's projected gradient.
        batch_size: of them from one client.
        length: number of steps, each counted by the square of its share of the peak learning rate.
        privacy: variance of the noise that is added to a direction's projected gradient.
    """

    directions: int
    examples: int
    batch_size: int
    length: float
    privacy: float = 0.0


@dataclass(frozen=True)
class StepSize:
    """A learning rate, and the probe that it came from."""

    learning_rate: float
    probe: Probe

    def __str__(self) -> str:
        found = self.probe
        return (
            f'learning rate {self.learning_rate:.2g}: method.learning_rate = "auto", {found.forwards} forward passes '
            f"over {found.examples} validation examples"
        )


def pick(probe: Probe, steps: Steps, estimator: type[Estimator], rule: Rule, normalised: bool) -> StepSize:
    """The rate to start a run with, two digits of it.

    Of plain SGD a share of the best rate of the first step: later ones become shorter as the gradient does. Steps of
    normalised length do not, and their rate is theirs that cost a share of the loss, lr^2 u'Hu / 2 each: the step size
    of signSGD (Bernstein et al., arXiv 1802.04434, theorem 1).

    Args:
        normalised: the rule's steps have entries of about 1 (`Rule.normalised`). Those of an estimator's normalised
            scalars, about 1 at each client, have entries of about 1 / sqrt(directions).
    """
    cost = math.sqrt(2.0 * COST * probe.loss / (probe.curvature * steps.length))
    if normalised:
        rate = cost
    elif estimator.normalised:
        entry = probe.square(steps.examples) / probe.square(steps.batch_size) / steps.directions
        rate = cost / math.sqrt(entry)
    else:
        rate = SHARE * probe.best(steps.examples, steps.privacy)
    return StepSize(float(f"{rate / rule.gain:.2g}"), probe)


@dataclass(frozen=True)
class Sum(Filled):
    """One direction for every seed: a sum of others with given coefficients."""

    inner: Directions
    seeds: Sequence[int]
    coefficients: Sequence[float]

    def fill(self, out: Tensor, seed: int, *, offset: int = 0) -> Tensor:
        return self.axpy(out.zero_(), seed, 1.0, offset=offset)

    @torch.no_grad()
    def axpy(
        self, theta: Tensor, seed: int, coefficient: float, *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        moved = theta if out is None else out.copy_(theta)
        for own, c in zip(self.seeds, self.coefficients, strict=True):
            self.inner.axpy(moved, own, coefficient * c, offset=offset)
        return moved


def probe(
    answer: Callable[[LossRequest], Tensor],
    theta: Tensor,
    batches: Sequence[Batch],
    directions: Callable[[int], Directions],
    *,
    eps: float,
    count: int,
    seed: int,
) -> Probe:
    """Measures slopes and curvatures at theta by two-point queries.

    Args:
        answer: gives the losses of a request (`fedzo.evaluation.Evaluator.answer`).
        theta: [size].
        batches: the examples; all of them are used at every point.
        directions: step -> its directions.
        eps: distance of a query's points.
        count: directions that a step's estimate is made of.
        seed: decides the directions.

    Raises:
        RunError: the loss is not finite around theta, or flat.
    """
    count = min(count, MOST)
    steps = max(_STEPS, -(-_QUERIES // count))
    seeds = words64(derive(seed, "probe", "directions"), steps * count).reshape(steps, count).tolist()
    forwards = 0

    def losses(offsets: tuple[float, ...], along: Sequence[int], among: Directions) -> npt.NDArray[np.float64]:
        """[len(along), len(offsets), examples]."""
        nonlocal forwards
        forwards += len(offsets) * len(along) * len(batches)
        requests = [LossRequest(theta, batch, offsets, tuple(along), among) for batch in batches]
        found: npt.NDArray[np.float64] = torch.cat([answer(r) for r in requests], dim=2).double().numpy()
        return found

    loss = float(losses((0.0,), (0,), directions(0)).mean())
    points = np.stack([losses((eps, -eps), seeds[k], directions(k)) for k in range(steps)])
    if not (math.isfinite(loss) and np.isfinite(points).all()):
        raise RunError(
            "the loss is not finite at the base model or beside it, so there is no learning rate to start from: check "
            'model.compute_dtype and method.eps, or set method.learning_rate to a number instead of "auto"'
        )
    slopes = (points[:, :, 0] - points[:, :, 1]) / (2.0 * eps)  # [steps, count, examples]
    squares = (slopes.mean(axis=2) ** 2).mean(axis=1)  # [steps]
    noise, square, examples = float(_variance(slopes).mean()), float(squares.mean()), slopes.shape[2]
    if square == 0.0:
        raise _flat()
    sloping = np.flatnonzero(squares)[:_STEPS]
    weights = slopes[sloping].mean(axis=2) / np.sqrt(count * squares[sloping, None])  # [steps, count]
    fisher = _variance(np.einsum("kq,kqi->ki", weights, slopes[sloping]))
    moves = [Sum(directions(k), seeds[k], w.tolist()) for k, w in zip(sloping.tolist(), weights, strict=True)]
    wanted = COST * loss
    following = math.sqrt(2.0 * wanted / noise) if noise else eps  # right where the noise is the curvature
    for _ in range(_TRIES):
        distance = following
        rises = np.array([losses((distance, -distance), (0,), move).mean() - loss for move in moves])
        factor = math.sqrt(wanted / rise) if (rise := float(rises.mean())) > 0.0 else 4.0 if rise <= 0.0 else 0.25
        if 0.7 < factor < 1.4:
            break
        following = distance * min(max(factor, 0.25), 4.0)
    curvatures = np.maximum(2.0 * rises / distance**2, fisher)
    curvature = float(np.average(curvatures, weights=squares[sloping]))
    if not 0.0 < curvature < math.inf:
        raise _flat()
    return Probe(
        loss=loss,
        gradient=math.sqrt(max(square - noise / examples, _LEAST_SIGNAL * square)),
        noise=noise,
        directions=count,
        curvature=curvature,
        distance=distance,
        forwards=forwards,
        examples=examples,
    )


def _flat() -> RunError:
    return RunError(
        "the loss does not change along the run's directions, or has no curvature there, so there is no learning rate "
        'to start from: check space and task, or set method.learning_rate to a number instead of "auto"'
    )


def _variance(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis; of a single value 0."""
    found: npt.NDArray[np.float64] = values.var(axis=-1, ddof=min(1, values.shape[-1] - 1))
    return found
