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
# A curvature is taken where the loss rises by this, about the distance of one good step and far above rounding.
_RISE, _RUNGS = 3e-3, 8
# Of |gradient|^2 in E[g^2]: what so few queries cannot tell from 0.
_LEAST_SIGNAL = 0.1
# What a run takes of the best rate of its first step, and again where steps do not become shorter as the gradient does.
SHARE, NORMALISED_SHARE = 0.3, 0.5


@dataclass(frozen=True)
class Probe:
    """The loss around theta0, seen along the directions of a run's first steps.

    Attributes:
        loss: at theta0.
        gradient: norm of its gradient.
        noise: variance over the examples of their projected gradients along one direction.
        directions: D, those that a measured step was made of.
        curvature: u'Hu, mean over such steps along u = sum_d g_d z_d / sqrt(sum_d g_d^2).
        distance: the t of the points theta +- t u that it was measured at.
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

    def best(self, examples: int) -> float:
        """The rate at which one step of SGD lowers the loss most: E[gradient . step] over E[step' H step]."""
        return self.directions * self.gradient**2 / (self.square(examples) * self.curvature)


@dataclass(frozen=True)
class Averages:
    """What a step of a run averages over.

    Attributes:
        directions: of an estimate.
        examples: behind a direction's projected gradient.
        batch_size: of them from one client.
    """

    directions: int
    examples: int
    batch_size: int


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


def pick(probe: Probe, step: Averages, estimator: type[Estimator], rule: Rule, normalised: bool) -> StepSize:
    """The rate to start a run with, two digits of it.

    A step of a rule of normalised steps (``normalised``) has entries of about 1, where the estimate's are about
    sqrt(E[g^2] / directions); an estimator's normalised scalars are about 1 where a client's are sqrt(E[g^2]).
    """
    rate = SHARE * probe.best(step.examples) / rule.gain
    if normalised:
        rate *= NORMALISED_SHARE * math.sqrt(probe.square(step.examples) / step.directions)
    elif estimator.normalised:
        rate *= NORMALISED_SHARE * math.sqrt(probe.square(step.batch_size))
    return StepSize(float(f"{rate:.2g}"), probe)


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
        if not np.isfinite(found).all():
            raise RunError(
                "the loss is not finite at the base model or beside it, so there is no learning rate to start from: "
                'check model.compute_dtype and method.eps, and set method.learning_rate to a number instead of "auto"'
            )
        return found

    loss = float(losses((0.0,), (0,), directions(0)).mean())
    points = [losses((eps, -eps), seeds[k], directions(k)) for k in range(steps)]
    slopes = [(p[:, 0] - p[:, 1]) / (2.0 * eps) for p in points]  # [steps][count, examples]
    squares = np.array([float((s.mean(axis=1) ** 2).mean()) for s in slopes])
    noise = float(np.mean([_variance(s) for s in slopes]))
    examples, square = slopes[0].shape[1], float(squares.mean())
    if square == 0.0:
        raise RunError(
            "the loss does not change along the run's directions, so there is no learning rate to start from: check "
            'space and task, and set method.learning_rate to a number instead of "auto"'
        )
    sloping = [k for k in range(steps) if squares[k] > 0.0][:_STEPS]
    weights = [slopes[k].mean(axis=1) / math.sqrt(count * squares[k]) for k in sloping]
    moves = [Sum(directions(k), seeds[k], w.tolist()) for k, w in zip(sloping, weights, strict=True)]
    least = max(eps, math.sqrt(2.0 * _RISE / noise)) if noise else eps  # a curvature is not taken below the noise
    distance, rises = least, np.zeros(len(moves))
    for rung in range(_RUNGS):
        distance = least * 4.0**rung
        rises = np.array([losses((distance, -distance), (0,), move).mean() - loss for move in moves])
        if rises.mean() > _RISE:
            break
    fisher = np.array([_variance(w @ slopes[k]) for k, w in zip(sloping, weights, strict=True)])
    curvatures = np.maximum(2.0 * rises / distance**2, fisher)
    return Probe(
        loss=loss,
        gradient=math.sqrt(max(square - noise / examples, _LEAST_SIGNAL * square)),
        noise=noise,
        directions=count,
        curvature=float(np.average(curvatures, weights=squares[sloping])),
        distance=distance,
        forwards=forwards,
        examples=examples,
    )


def _variance(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis; of a single value 0."""
    found: npt.NDArray[np.float64] = values.var(axis=-1, ddof=min(1, values.shape[-1] - 1))
    return found
