"""The client's side of the protocol: a plan in, loss requests out, a contribution in the end. Knows no transport."""

from collections.abc import Generator
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.errors import ProtocolError
from fedzo.evaluation import Batch, LossRequest
from fedzo.federation.messages import Behind, Contribution, Failure, Hello, Plan
from fedzo.federation.randomness import choose, derive
from fedzo.federation.replica import Replica
from fedzo.federation.spec import PROTOCOL
from fedzo.optimizers import Records


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

    def round(self, plan: Plan) -> Generator[LossRequest, Tensor, Contribution | Behind | Failure]:
        """Does a plan; yields loss requests and is sent losses float32 [len(seeds), len(offsets), B].

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
        scalars = np.empty((steps, queries), dtype=np.float32)
        estimator, rule = spec.build_estimator(), replica.rule.local()
        theta, state, losses = replica.theta, rule.init(replica.theta), 0.0
        for k in range(steps):
            place = derive(spec.seed, "batch", plan.round, self.client, k)
            batch = self.data.batch(choose(place, len(self.data), plan.batch_size))
            estimate = yield from estimator.estimate(theta, batch, plan.seeds[k].tolist(), plan.eps, spec.family)
            with np.errstate(over="ignore"):
                scalars[k] = estimate.projected.mean(axis=1)
            if spec.clip:  # the directional derivatives, as in QZO, arXiv 2505.13430
                scalars[k] = scalars[k].clip(-spec.clip, spec.clip)
            losses += estimate.loss / steps
            if not np.isfinite(scalars[k]).all() or not np.isfinite(losses):
                return Failure(plan.run_id, plan.round, self.client, "not-finite")
            if k + 1 < steps:
                theta = theta.clone() if k == 0 else theta
                step = plan.round * steps + k
                state = rule.apply(theta, state, [Records(step, plan.seeds[k : k + 1], scalars[k : k + 1])])
        return Contribution(plan.run_id, plan.round, self.client, plan.seeds, scalars, len(self.data), losses)
