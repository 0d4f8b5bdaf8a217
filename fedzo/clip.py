"""A clipping bound from public data: the norms that a run's first scalars would have on it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedzo.errors import ConfigError, RunError
from fedzo.estimators import ESTIMATORS, Query
from fedzo.experiment import Experiment
from fedzo.federation.randomness import derive, shuffled, words64
from fedzo.privacy.mechanisms import MECHANISMS, Floats
from fedzo.structures import Layout

_EXAMPLES = 256  # of single examples, at most
_CLIENTS = 32  # that batches stand for, at most
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


@dataclass(frozen=True)
class Suggestion:
    """A bound on the norm of a unit's scalars.

    Attributes:
        clip: the wanted quantile of the norms, three digits.
        clipped: share of the units whose norm is above it.
        quantiles: quantile -> norm.
        units: whose norms were looked at: examples, clients, or (client-local) local steps of clients.
        examples: that these were made of.
        forwards: passes over a batch that it took.
    """

    clip: float
    clipped: float
    quantiles: Mapping[float, float]
    units: int
    examples: int
    forwards: int


def suggest(experiment: Experiment, quantile: float = 0.5) -> Suggestion:
    """The bound that a quantile of the units would be within at theta0, by the validation data.

    That must be public, or the server's own to tell of: a split or file apart from what clients train on, of whose data
    nothing but its size is looked at. A unit is an example; in the modes that protect clients K batches of
    `method.batch_size` examples, all at theta0, as if a client's local steps led nowhere. The norm is L2, for Laplace
    L1. In mode "client-local", which clips each step to C / K^(1/p), it is K^(1/p) times a step's own.

    Raises:
        ConfigError: the run is not private, validation data is a part of the training data or too little for one unit,
            or the quantile is none.
        RunError: scalars are not finite, or the quantile is 0.
    """
    config = experiment.config
    if not 0.0 < quantile < 1.0:
        raise ConfigError(f"a quantile is {quantile:g}, wanted above 0 and below 1")
    if config.privacy.mode == "none":
        raise ConfigError(
            'privacy.mode is "none", which clips nothing: set the mode that the bound is for, such as '
            "-o privacy.mode=example-local"
        )
    if not config.data.validation and config.data.source != "embedded":  # which has its own
        raise ConfigError(
            "data.validation is empty, so validation data would be a part of the training data, and a bound made from "
            "it would tell of that: name a split or file of public examples of the same kind"
        )
    norms, examples, forwards = _norms(experiment)
    if not np.isfinite(norms).all():
        raise RunError(
            "scalars at the base model are not finite, so there is no bound to suggest: check model.compute_dtype and "
            "method.eps"
        )
    clip = float(f"{np.quantile(norms, quantile):.3g}")
    if clip == 0.0:
        raise RunError(
            f"the loss of {(norms == 0.0).mean():.0%} of the units is flat around the base model, so the quantile "
            f"{quantile:g} of the norms is 0, which is no bound: take a higher one, or check method.eps and "
            "model.compute_dtype"
        )
    found = {q: float(np.quantile(norms, q)) for q in _QUANTILES}
    return Suggestion(clip, float((norms > clip).mean()), found, len(norms), examples, forwards)


def _norms(experiment: Experiment) -> tuple[Floats, int, int]:
    """The norm of each unit, the examples that they are made of, and the forwards that it took."""
    config, method, mode = experiment.config, experiment.config.method, experiment.config.privacy.mode
    of_examples = mode == "example-local"
    size, total = method.batch_size, len(experiment.validation)
    steps = 1 if of_examples else config.federation.local_steps
    count = min(_EXAMPLES, total) if of_examples else min(_CLIENTS, total // (size * steps)) * size * steps
    if not count:
        raise ConfigError(
            f"validation data has {total} examples, fewer than the {size * steps} of one client "
            f"(federation.local_steps {steps} times method.batch_size {size}): name a larger split as data.validation, "
            "or set a smaller method.batch_size"
        )
    # Not in the data's order, which may be by label: a batch is to be mixed as a client's is.
    chosen = shuffled(derive(config.seed, "clip"), total)[:count]
    order, forwards = MECHANISMS[config.privacy.mechanism].order, 0
    estimator = ESTIMATORS[method.estimator](config.settings())
    rule, theta = experiment.spec(1.0).build_rule(Layout.of(experiment.space)), experiment.theta0()
    state, parts = rule.init(theta), []
    drawn = words64(derive(config.seed, "clip", "directions"), steps * method.queries).reshape(steps, -1)
    seeds = [rule.setup.structure.assign(row).tolist() for row in drawn]
    for at, start in enumerate(range(0, count, size)):
        step = at % steps
        batch = experiment.validation.batch(chosen[start : start + size])
        directions, anchor = rule.directions(step, theta, state), rule.anchor(step, state)
        query = Query(theta, batch, tuple(seeds[step]), method.eps, step, directions, anchor)
        found = experiment.evaluator.run(estimator.estimate(query))
        parts.append(found.scalars if of_examples else found.scalars.mean(axis=1, keepdims=True))
        forwards += round(estimator.forwards(method.queries))
    whole = np.concatenate(parts, axis=1)  # [C P, examples or steps of clients]
    if mode == "client-local":
        whole = whole * steps ** (1.0 / order)
    elif not of_examples:  # a client's steps below each other
        whole = whole.T.reshape(-1, steps * len(whole)).T
    return np.linalg.norm(whole, ord=order, axis=0), count, forwards
