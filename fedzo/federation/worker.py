"""The client's side of the protocol: a plan in, loss requests out, a contribution in the end. Knows no transport."""

import logging
import math
from collections.abc import Generator
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedzo.errors import DivergedError, ProtocolError
from fedzo.estimators import Estimate, Estimator, Query
from fedzo.evaluation import Batch, GradientRequest, Request
from fedzo.federation.messages import Answer, Behind, Contribution, Failure, FailureReason, Held, Hello, Plan
from fedzo.federation.randomness import choose, derive
from fedzo.federation.replica import Replica
from fedzo.federation.spec import PROTOCOL
from fedzo.optimizers import Records, Rule, Scalars, State
from fedzo.privacy import sampling
from fedzo.privacy.account import Account
from fedzo.privacy.mechanisms import Floats, Ints
from fedzo.privacy.sanitiser import Sanitiser

_log = logging.getLogger("fedzo.client")


class Data(Protocol):
    """A client's examples."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch: ...


class Worker:
    """One client. Several workers of a process may share a replica: a plan first brings it to its round.

    Args:
        client: the client's number.
        replica: theta of this process.
        data: the client's own examples; in a private run there may be none.
        fingerprint, mask, space_hash, theta0, theta_dtype, quantisation, compute_dtype: of this process's base model
            and space, for the handshake.
        account: the client's own budget, which a private run needs where the client adds noise, or a share of it.

    Raises:
        ProtocolError: the run is private in a way that its method is not covered by, or lacks a budget.

    Attributes:
        held: of a run with a secure sum, the vector int64 of the last plan's contribution, which nobody may see alone.
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
        account: Account | None = None,
    ) -> None:
        self.client = client
        self.replica = replica
        self.data = data
        self.account = account
        self.held: Ints | None = None
        terms = replica.spec.terms
        if uncovered := replica.spec.uncovered:
            raise ProtocolError(f"client {client} refused: {uncovered} is not covered by the run's privacy mode")
        if terms is not None and not terms.secret and account is None:
            raise ProtocolError(f'client {client}: privacy.mode = "{terms.mode}" needs a budget of the client\'s own')
        self._hello = Hello(
            client, 0 if terms else len(data), PROTOCOL, fingerprint, mask, space_hash, theta0, replica.spec.family,
            theta_dtype, quantisation, compute_dtype,
        )  # fmt: skip

    def hello(self) -> Hello:
        """For the handshake."""
        return replace(self._hello, applied=self.replica.rounds)

    def round(self, plan: Plan) -> Generator[Request, Tensor, Answer]:
        """Does a plan; yields requests and is sent their answers (`fedzo.evaluation.Evaluator.answer`).

        Of a private run nothing that it returns depends on the data but what the run's sanitiser let through; an error
        of the evaluation that is thrown in counts as scalars of 0, unless the server is trusted.

        Raises:
            ProtocolError: the plan is another run's or another client's, or does not keep a private run's terms.
        """
        spec, replica, sanitiser = self.replica.spec, self.replica, self.replica.spec.sanitiser
        if plan.run_id != spec.run_id or plan.client != self.client:
            raise ProtocolError(f"plan for client {plan.client} of another run, this is client {self.client}")
        if sanitiser is not None:
            self._check(plan)
        if replica.rounds > plan.round or (plan.initial and replica.rounds == 0):
            replica.reset(plan.initial)
        # Also before a snapshot: one of pool coefficients builds on theta0, whose initial values a restart has lost.
        if plan.catch_up.start > replica.rounds:
            return Behind(plan.run_id, plan.round, self.client, replica.rounds)
        replica.catch_up(plan.catch_up)
        if any(plan.digest) and replica.digest() != plan.digest:
            replica.reset()
            return self._failure(plan, "digest")
        if sanitiser is None:
            return (yield from self._open(plan))
        if self.account is not None and not self.account.charge(sanitiser.releases):
            return self._failure(plan, "budget")
        return (yield from self._private(plan, sanitiser))

    def _check(self, plan: Plan) -> None:
        """The budget counts on steps, queries and batches as the header has them, and a server may ask for others."""
        spec = self.replica.spec
        asked, wanted = (*plan.seeds.shape, plan.batch_size), (spec.local_steps, spec.queries, spec.batch_size)
        if asked != wanted:
            raise ProtocolError(f"plan with steps, queries and batch size {asked}, the run's are {wanted}")
        if not 0.0 < plan.clip < math.inf:
            raise ProtocolError(f"plan with a clipping bound of {plan.clip}, wanted a number above 0")

    def _failure(self, plan: Plan, reason: FailureReason) -> Failure:
        return Failure(plan.run_id, plan.round, self.client, reason)

    def _open(self, plan: Plan) -> Generator[Request, Tensor, Contribution | Failure]:
        """A round whose scalars leave as they are."""
        rule, theta, state, losses = *self._start(plan), 0.0
        steps, queries = plan.seeds.shape
        scalars = np.empty((steps, self.replica.spec.scalars * queries), dtype=np.float32)
        gradients = np.empty((steps, sum(length for _, length in rule.ranges)), dtype=np.float32)
        for k in range(steps):
            estimate, batch = yield from self._estimate(plan, k, rule, theta, state)
            assert estimate is not None and batch is not None  # there are examples: the handshake asks for one
            scalars[k] = _scalars(estimate, self.replica.spec.clip)
            losses += estimate.loss / steps
            if rule.ranges:  # of rules whose step is made on one batch, as those that settle are
                gradients[k] = (yield GradientRequest(theta, batch, rule.ranges)).numpy()[len(batch.labels) :]
            if not all(np.isfinite(found).all() for found in (scalars[k], losses, gradients[k])):
                return self._failure(plan, "not-finite")
            own = _own(plan, k, scalars, gradients if rule.ranges else None)
            try:
                scalars[k] = yield from rule.settle(theta, state, batch, own)  # own is a view of them
                if k + 1 < steps:
                    state = rule.apply(theta, state, [own])
            except DivergedError:
                return self._failure(plan, "not-finite")
        return Contribution(
            plan.run_id, plan.round, self.client, plan.seeds, scalars, len(self.data), losses,
            gradients if rule.ranges else None,
        )  # fmt: skip

    def _private(self, plan: Plan, sanitiser: Sanitiser) -> Generator[Request, Tensor, Contribution | Held | Failure]:
        """A round of which only what the sanitiser released, or will release as a sum, leaves."""
        terms, (rule, theta, state) = sanitiser.terms, self._start(plan)
        steps = len(plan.seeds)
        scalars = np.zeros((steps, sanitiser.width), dtype=np.float32)
        counts = np.zeros(sanitiser.counts, dtype=np.float32)
        for k in range(steps):
            values = np.zeros((sanitiser.width, 0))
            try:
                estimate, batch = yield from self._estimate(plan, k, rule, theta, state)
                if estimate is not None and batch is not None:
                    values = estimate.scalars
                if not terms.of_examples:
                    scalars[k] = _mean(values)
                    if batch is not None:
                        settled = yield from rule.settle(theta, state, batch, _own(plan, k, scalars))
                        scalars[k] = np.where(np.isfinite(settled).all(), settled, 0.0)
            except Exception as error:
                if terms.secret:
                    raise
                _log.error("the scalars of client %d count as 0: %s", self.client, type(error).__name__)
                values, scalars[k] = np.zeros((sanitiser.width, 0)), 0.0
            if terms.of_examples:
                scalars[k], count = sanitiser.examples(values, plan.clip)
            elif terms.local:
                scalars[k], count = sanitiser.step(scalars[k].astype(np.float64), plan.clip)
            if terms.local and counts.size:
                counts[k] = count
            if k + 1 < steps:
                try:
                    state = rule.apply(theta, state, [_own(plan, k, scalars)])
                except DivergedError:
                    if terms.local:  # by scalars that are released
                        return self._failure(plan, "not-finite")
                    break
        if terms.mode == "client-secagg":
            self.held = sanitiser.share(scalars.astype(np.float64), plan.clip)
            return Held(plan.run_id, plan.round, self.client)
        if not terms.local:
            scalars, counts = sanitiser.clipped(scalars.astype(np.float64), plan.clip)
        return Contribution(plan.run_id, plan.round, self.client, plan.seeds, scalars, None, None, counts=counts)

    def _start(self, plan: Plan) -> tuple[Rule, Tensor, State]:
        """What the plan's steps move: a copy, where there are several."""
        replica = self.replica
        if len(plan.seeds) == 1:
            return replica.rule, replica.theta, replica.state
        rule, state = replica.rule.fork(replica.state)
        return rule, replica.theta.clone(), state

    def _estimate(
        self, plan: Plan, k: int, rule: Rule, theta: Tensor, state: State
    ) -> Generator[Request, Tensor, tuple[Estimate | None, Batch | None]]:
        """The estimate of local step k, and its last batch; None where no example was drawn."""
        estimator = self.replica.spec.build_estimator()
        step, seeds = plan.round * len(plan.seeds) + k, tuple(plan.seeds[k].tolist())
        found, anchor = rule.directions(step, theta, state), rule.anchor(step, state)
        chosen, parts, batch = self._choose(plan, k, estimator, step), [], None
        for start in range(0, len(chosen), plan.batch_size):
            batch = self.data.batch(chosen[start : start + plan.batch_size])
            query = Query(theta, batch, seeds, plan.eps, step, found, anchor)
            parts.append((yield from estimator.estimate(query)))
        return Estimate.joined(parts) if parts else None, batch

    def _choose(self, plan: Plan, k: int, estimator: Estimator, step: int) -> npt.NDArray[np.int64]:
        """The examples of a step, ascending. Where their privacy rests on the draw, nobody can repeat it."""
        total, terms = len(self.data), self.replica.spec.terms
        count = estimator.examples(step, plan.batch_size, total)
        if terms is None or not terms.of_examples:
            return choose(derive(self.replica.spec.seed, "batch", plan.round, self.client, k), total, count)
        if terms.sampling == "poisson":
            return sampling.poisson(total, min(1.0, count / max(1, total)))
        return sampling.fixed(total, count)


def _own(plan: Plan, k: int, scalars: Scalars, gradients: Scalars | None = None) -> Records:
    """The records of a client's own step k."""
    row = slice(k, k + 1)
    step = plan.round * len(plan.seeds) + k
    return Records(step, plan.seeds[row], scalars[row], None if gradients is None else gradients[row])


def _mean(values: Floats) -> Scalars:
    """float32 [C P] over the examples; 0 where there are none, or where one of them is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = values.mean(axis=1).astype(np.float32) if values.shape[1] else np.zeros(len(values), dtype=np.float32)
    return mean if np.isfinite(mean).all() else np.zeros_like(mean)


def _scalars(estimate: Estimate, clip: float) -> Scalars:
    """float32 [C P]: means over the batch; projected gradients beyond the clip are cut (QZO, arXiv 2505.13430)."""
    with np.errstate(over="ignore"):
        projected = estimate.projected.mean(axis=1).astype(np.float32)
        second = [] if estimate.second is None else [estimate.second.mean(axis=1).astype(np.float32)]
    return np.concatenate([projected.clip(-clip, clip) if clip else projected, *second])
