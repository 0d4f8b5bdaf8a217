"""The client's side of the protocol: a plan in, loss requests out, a contribution in the end. Knows no transport."""

from collections.abc import Generator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.errors import DivergedError, ProtocolError
from fedzo.estimators import Estimate, Query
from fedzo.evaluation import Batch, GradientRequest, Request
from fedzo.federation.messages import Behind, Contribution, Failure, Hello, Plan
from fedzo.federation.randomness import choose, derive
from fedzo.federation.replica import Replica
from fedzo.federation.spec import PROTOCOL
from fedzo.optimizers import Records, Scalars


class Data(Protocol):
    """A client's examples."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch: ...


class Worker:
    """One client. Several workers of a process may share a replica: a plan first brings it to its round.

    Args:
        client: the client's number.
        replica: theta of this process.
        data: the client's own examples.
        fingerprint, mask, space_hash, theta0, theta_dtype, quantisation, compute_dtype: of this process's base model
            and space, for the handshake.
    """

    def __init__(
        self,
        client: int,
        replica: Replica,
        data: Data,
        *,
        fingerprint: str,
        space_hash: str,
        theta0: str,
        mask: str = "",
        theta_dtype: str = "float32",
        quantisation: str = "none",
        compute_dtype: str = "float32",
    ) -> None:
        self.client = client
        self.replica = replica
        self.data = data
        self._hello = Hello(
            client, len(data), PROTOCOL, fingerprint, mask, space_hash, theta0, replica.spec.family, theta_dtype,
            quantisation, compute_dtype,
        )  # fmt: skip

    def hello(self) -> Hello:
        return self._hello

    def round(self, plan: Plan) -> Generator[Request, Tensor, Contribution | Behind | Failure]:
        """Does a plan; yields requests and is sent their answers (`fedzo.evaluation.Evaluator.answer`).

        Raises:
            ProtocolError: the plan is another run's or another client's.
        """
        spec, replica = self.replica.spec, self.replica
        if plan.run_id != spec.run_id or plan.client != self.client:
            raise ProtocolError(f"plan for client {plan.client} of another run, this is client {self.client}")
        if replica.rounds > plan.round or (plan.initial and replica.rounds == 0):
            replica.reset(plan.initial)
        # Also before a snapshot: one of pool coefficients builds on theta0, whose initial values a restart has lost.
        if plan.catch_up.start > replica.rounds:
            return Behind(plan.run_id, plan.round, self.client, replica.rounds)
        replica.catch_up(plan.catch_up)
        if any(plan.digest) and replica.digest() != plan.digest:
            replica.reset()
            return Failure(plan.run_id, plan.round, self.client, "digest")
        steps, queries = plan.seeds.shape
        estimator, rule, theta, state, losses = spec.build_estimator(), replica.rule, replica.theta, replica.state, 0.0
        scalars = np.empty((steps, spec.scalars * queries), dtype=np.float32)
        gradients = np.empty((steps, sum(length for _, length in rule.ranges)), dtype=np.float32)
        if steps > 1:
            theta, (rule, state) = theta.clone(), rule.fork(state)
        for k in range(steps):
            step, seeds = plan.round * steps + k, plan.seeds[k : k + 1]
            place = derive(spec.seed, "batch", plan.round, self.client, k)
            count = estimator.examples(step, plan.batch_size, len(self.data))
            chosen = choose(place, len(self.data), count)
            found, anchor = rule.directions(step, theta, state), rule.anchor(step, state)
            parts = []
            for start in range(0, len(chosen), plan.batch_size):
                batch = self.data.batch(chosen[start : start + plan.batch_size])
                query = Query(theta, batch, tuple(seeds[0].tolist()), plan.eps, step, found, anchor)
                parts.append((yield from estimator.estimate(query)))
            estimate = Estimate.joined(parts)
            scalars[k] = _scalars(estimate, spec.clip)
            losses += estimate.loss / steps
            if rule.ranges:  # of rules whose step is made on one batch, as those that settle are
                gradients[k] = (yield GradientRequest(theta, batch, rule.ranges)).numpy()[len(batch.labels) :]
            if not all(np.isfinite(found).all() for found in (scalars[k], losses, gradients[k])):
                return Failure(plan.run_id, plan.round, self.client, "not-finite")
            own = Records(step, seeds, scalars[k : k + 1], gradients[k : k + 1] if rule.ranges else None)
            try:
                scalars[k] = yield from rule.settle(theta, state, batch, own)  # own is a view of them
                if k + 1 < steps:
                    state = rule.apply(theta, state, [own])
            except DivergedError:
                return Failure(plan.run_id, plan.round, self.client, "not-finite")
        return Contribution(
            plan.run_id, plan.round, self.client, plan.seeds, scalars, len(self.data), losses,
            gradients if rule.ranges else None,
        )  # fmt: skip


def _scalars(estimate: Estimate, clip: float) -> Scalars:
    """float32 [C P]: means over the batch; projected gradients beyond the clip are cut (QZO, arXiv 2505.13430)."""
    with np.errstate(over="ignore"):
        projected = estimate.projected.mean(axis=1).astype(np.float32)
        second = [] if estimate.second is None else [estimate.second.mean(axis=1).astype(np.float32)]
    return np.concatenate([projected.clip(-clip, clip) if clip else projected, *second])
