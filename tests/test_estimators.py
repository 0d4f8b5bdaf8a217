"""The two-point estimator."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import Rows, losses, theta0
from torch import Tensor

from fedzo import directions
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError
from fedzo.estimators import ESTIMATORS, Estimate, Estimator, Query, TwoPoint
from fedzo.evaluation import Batch, LossRequest
from fedzo.registry import lookup

SEEDS = [11, 2**64 - 1, 0]


def run(
    estimator: Estimator,
    theta: Tensor,
    batch: Batch,
    eps: float,
    family: str,
    evaluate: Callable[[LossRequest], Tensor],
) -> Estimate:
    steps = estimator.estimate(Query(theta, batch, tuple(SEEDS), eps, 0, Isotropic(family)))
    try:
        request = next(steps)
        while True:
            request = steps.send(evaluate(request))
    except StopIteration as stop:
        assert isinstance(stop.value, Estimate)
        return stop.value


@pytest.mark.parametrize("family", ["rademacher", "gaussian"])
@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_on_a_quadratic_it_is_the_directional_derivative(eps: float, family: str) -> None:
    """The central difference of a quadratic has no error of its own, for each example and direction."""
    theta, batch = theta0(), Rows(2).batch(np.arange(9))
    x, y = batch.inputs["x"].double(), batch.inputs["y"].double()
    estimate = run(TwoPoint(), theta, batch, eps, family, losses)
    gradients = (x @ theta.double() - y)[:, None] * x  # [B, size]
    for p, seed in enumerate(SEEDS):
        z = directions.fill(torch.empty_like(theta), seed, family)
        exact = gradients @ z.double()
        # float32 losses of size L are off by a few ulps: 2^-23 L / eps on the quotient
        tolerance = (
            8 * 2.0**-23 * float(losses(LossRequest(theta, batch, (eps, -eps), (seed,), Isotropic(family))).max()) / eps
        )
        np.testing.assert_allclose(estimate.projected[p], exact.numpy(), atol=tolerance + 1e-5)
    assert estimate.projected.shape == (3, 9) and estimate.projected.dtype == np.float64


def test_requests_and_loss() -> None:
    theta, batch = theta0(), Rows(0).batch(np.arange(4))
    seen: list[LossRequest] = []

    def evaluate(request: LossRequest) -> Tensor:
        seen.append(request)
        return torch.tensor([[3.0] * 4, [1.0] * 4]).expand(len(request.seeds), 2, 4)

    estimate = run(TwoPoint(), theta, batch, 0.5, "rademacher", evaluate)
    assert [request.seeds for request in seen] == [tuple(SEEDS)]
    assert seen[0].offsets == (0.5, -0.5) and seen[0].theta is theta and seen[0].batch is batch
    assert (estimate.projected == 2.0).all() and estimate.loss == 2.0
    assert TwoPoint().forwards(4) == 8


def test_an_unknown_estimator_is_named() -> None:
    assert lookup(ESTIMATORS, "two-point", "estimator") is TwoPoint
    with pytest.raises(ConfigError, match=r"unknown estimator 'two_point'. Did you mean 'two-point'"):
        lookup(ESTIMATORS, "two_point", "estimator")
