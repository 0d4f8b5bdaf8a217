"""A clipping bound from public data: the norms that a run's first scalars would have on it."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedzo.errors import ConfigError, RunError
from fedzo.estimators import ESTIMATORS, Estimate, Query
from fedzo.evaluation import Request
from fedzo.experiment import Experiment
from fedzo.federation.randomness import choose, derive, words64
from fedzo.privacy.mechanisms import MECHANISMS, Floats
from fedzo.structures import Layout

_EXAMPLES = 256  # of single examples, at most
_CLIENTS = 32  # batches that stand for clients, at most
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Suggestion:
    """A bound on the norm of a unit's scalars.

    Attributes:
        clip: the wanted quantile of the norms, three digits.
        clipped: share of the units whose norm is above it.
        quantiles: quantile -> norm.
        units: whose norms were looked at.
        forwards: passes over a batch that it took.
    """

    clip: float
    clipped: float
    quantiles: Mapping[float, float]
    units: int
    forwards: int


def suggest(experiment: Experiment, quantile: float = 0.5) -> Suggestion:
    """The bound that a quantile of the units would be within at theta0, by the validation data.

    That must be public, or the server's own to tell of: a split or file apart from what clients train on. A unit is an
    example; in the modes that protect clients a batch of `method.batch_size` examples for each local step, all at
    theta0.

    Raises:
        ConfigError: validation data is a part of the training data, or the quantile is none.
        RunError: the scalars are not finite, or all of them 0.
    """
    if not 0.0 < quantile < 1.0:
        raise ConfigError(f"a quantile is {quantile:g}, wanted above 0 and below 1")
    if not experiment.config.data.validation:
        raise ConfigError(
            "data.validation is empty, so that validation data would be a part of the training data, and a bound "
            "made from "
            "it would tell of that: name a split or file of public examples of the same kind"
        )
    norms, forwards = _norms(experiment)
    if not np.isfinite(norms).all() or not norms.any():
        raise RunError(
            "the scalars at the base model are not finite, or all 0, so there is no bound to suggest: check "
            "model.compute_dtype and method.eps"
        )
    clip = float(f"{np.quantile(norms, quantile):.3g}")
    found = {q: float(np.quantile(norms, q)) for q in _QUANTILES}
    return Suggestion(clip, float((norms > clip).mean()), found, len(norms), forwards)


def _norms(experiment: Experiment) -> tuple[Floats, int]:
    config, method = experiment.config, experiment.config.method
    of_examples = config.privacy.mode in ("none", "example-local")
    size, total = method.batch_size, len(experiment.validation)
    steps = 1 if of_examples else config.federation.local_steps
    wanted = min(_EXAMPLES, total) if of_examples else min(_CLIENTS, total // (size * steps)) * size * steps
    chosen = choose(derive(config.seed, "clip"), total, max(wanted, min(total, size * steps)))
    order, forwards = MECHANISMS[config.privacy.mechanism].order, 0
    estimator = ESTIMATORS[method.estimator](config.settings())
    rule, theta = experiment.spec(1.0).build_rule(Layout.of(experiment.space)), experiment.theta0()
    state, parts = rule.init(theta), []
    drawn = words64(derive(config.seed, "clip", "directions"), steps * method.queries).reshape(steps, -1)
    seeds = [rule.setup.structure.assign(row).tolist() for row in drawn]
    for at, start in enumerate(range(0, len(chosen), size)):
        step = at % steps
        batch = experiment.validation.batch(chosen[start : start + size])
        directions, anchor = rule.directions(step, theta, state), rule.anchor(step, state)
        query = Query(theta, batch, tuple(seeds[step]), method.eps, step, directions, anchor)
        found = _answered(experiment, estimator.estimate(query))
        values = np.concatenate([found.projected, *([] if found.second is None else [found.second])])
        parts.append(values if of_examples else values.mean(axis=1, keepdims=True))
        forwards += round(estimator.forwards(method.queries))
    whole = np.concatenate(parts, axis=1)
    if not of_examples:  # the steps of a client below each other
        clients = whole.shape[1] // steps
        whole = whole[:, : clients * steps].T.reshape(clients, -1).T
    return np.linalg.norm(whole, ord=order, axis=0), forwards


def _answered(experiment: Experiment, asking: Generator[Request, Tensor, Estimate]) -> Estimate:
    try:
        request = next(asking)
        while True:
            request = asking.send(experiment.evaluator.answer(request))
    except StopIteration as stop:
        found: Estimate = stop.value
        return found
