"""An attack on private runs: does a release tell more of one unit than the accountant states?

    python simulations/audit_privacy.py [--trials N] [--epsilon X] [--delta X] [--only NAMES] [--jobs N] [--quick]

A trial is a whole run, by the real workers, plans, sanitisers, budgets and noise, and where the server noises by the
real coordinator and ledger, on logistic regression as a small torch module. In one world a unit (the canary) gives
scalars as large as clipping lets through, in the other its loss does not depend on theta, so that it gives zeros.
The attacker is the one of the proofs: it knows every seed, the canary, all other units and who of them was drawn, and
replays theta from what was released; it does not know the noise, nor whether the canary was drawn. Its score is the
logarithm of the likelihood ratio of all releases: of Gaussian (Laplace) noise around the canary's clipped vector, under
Poisson draws of a mixture of that and noise around 0, against noise around 0.

The score's threshold is chosen on one half of the trials. On the other half its errors are counted: epsilon is at least
log((1 - delta - FNR) / FPR) and log((1 - delta - FPR) / FNR) (Kairouz, Oh, Viswanath, arXiv 1311.0776), with upper
Clopper-Pearson limits of both errors that hold together at 95%. Beside it stand what it would be, on average over
simulated scores, if releases told exactly what is stated, and the most that so many trials can show. The same attack
must find more than is stated in runs that are broken on purpose:

    seeded noise    drawn from the generators of the directions, as DPZero's and DP-AggZO's published code does
    seeded draw     of examples, or of clients, from the run's seed, with the amplification of a secret one
    no clipping     but the noise of clipped scalars
    whole bound     on each of a round's local steps, which are accounted for as one release

Units are zeroed out, so draws of a fixed number, stated for one unit in another's place, are not attacked. delta is
large, for an epsilon at 1e-5 rests on events that no few thousand trials contain. Ends with one line of JSON; the exit
code is 1 if a real mechanism is above its statement, or a broken one is not.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fedzo.config import Config, from_flat
from fedzo.directions import fill
from fedzo.estimators import Estimator
from fedzo.evaluation import Batch, Evaluator, Request
from fedzo.federation.coordinator import Coordinator, _Open
from fedzo.federation.ledger import Ledger, LedgerRound
from fedzo.federation.messages import Behind, CatchUp, Contribution, Failure, Held, Plan, RoundRecords, decode
from fedzo.federation.randomness import bernoulli, derive, round_seeds, sample_clients
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.federation.worker import Worker
from fedzo.optimizers import Records, Seeds
from fedzo.privacy.account import Account, Budget
from fedzo.privacy.accounting import Release, epsilon
from fedzo.privacy.mechanisms import Floats, Gaussian, Ints, Mechanism
from fedzo.privacy.sanitiser import Sanitiser, Scalars
from fedzo.privacy.terms import Terms
from fedzo.privacy_plan import make_terms
from fedzo.spaces import full

Rows = npt.NDArray[np.float32]

SIZE = 8  # entries of theta
SEED = 11  # of the runs; the attacker knows it
FAR = 100.0  # the canary's one feature, whose scalars are as large along any rademacher direction
CONFIDENCE = 0.95
# What is left for the attacker to know, over the bound, when it knows the noise: rounding to float32.
_ROUNDING = 1e-3


class Model(nn.Module):
    """Logistic regression: the score of a row, its features times its label, is log sigmoid(w . x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, 1, bias=False)
        with torch.no_grad():
            # The first feature is the canary's: of so wrong a weight its loss is linear.
            self.linear.weight.copy_(torch.tensor([[-1.0] + [0.1] * (SIZE - 1)]))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1] of [B, SIZE]."""
        return logsigmoid(self.linear(x))


def ordinary(client: int, count: int) -> Rows:
    """float32 [count, SIZE] of a client, the first feature 0."""
    rows = np.random.default_rng(100 + client).normal(size=(count, SIZE)).astype(np.float32)
    rows[:, 0] = 0.0
    return rows


class Examples:
    """A client's data: one example a row."""

    def __init__(self, rows: Rows) -> None:
        self.rows = torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        return Batch({"x": self.rows[torch.from_numpy(indices)]}, torch.zeros(len(indices), dtype=torch.int64))


class Client(Worker):
    """The real worker, which lets the attacker see what it draws, step by step, in `drawn`."""

    drawn: list[npt.NDArray[np.int64]]

    def _choose(self, plan: Plan, k: int, estimator: Estimator, step: int) -> npt.NDArray[np.int64]:
        self.drawn = [] if k == 0 else self.drawn
        self.drawn.append(self._draw(plan, k, estimator, step))
        return self.drawn[-1]

    def _draw(self, plan: Plan, k: int, estimator: Estimator, step: int) -> npt.NDArray[np.int64]:
        return super()._choose(plan, k, estimator, step)


# What is broken: each a part of the real code, replaced.


@dataclass(frozen=True)
class BrokenTerms(Terms):
    """Terms whose noise is another mechanism's."""

    made: Mechanism

    @property
    def noise(self) -> Mechanism:
        return self.made


def with_noise(sanitiser: Sanitiser, made: Mechanism) -> Sanitiser:
    return replace(sanitiser, terms=BrokenTerms(**vars(sanitiser.terms), made=made))


@dataclass(frozen=True)
class SeededGaussian(Gaussian):
    """Noise that the directions' generators give after the directions' own entries.

    Attributes:
        seeds: of the directions, one for each number that is drawn.
    """

    seeds: Iterator[int] = field(default_factory=itertools.count)

    def _draw(self, count: int, scale: float) -> list[int]:
        return [
            round(scale * float(fill(torch.empty(1), seed, "gaussian", offset=SIZE)))
            for seed in itertools.islice(self.seeds, count)
        ]


def seeded(sanitiser: Sanitiser, seeds: Seeds) -> Sanitiser:
    """With noise from the generators of the directions uint64 [K, P] of a round."""
    noise = sanitiser.terms.noise
    return with_noise(sanitiser, SeededGaussian(noise.noise_multiplier, noise.levels, iter(seeds.ravel().tolist())))


class Unclipped(Gaussian):
    """Puts vectors on the grid as they are."""

    def clip(self, values: Floats, bound: float) -> tuple[Ints, npt.NDArray[np.bool_]]:
        return np.trunc(values * (self.levels / bound)).astype(np.int64), np.ones(values.shape[1], dtype=bool)


class WholeBound(Sanitiser):
    """Gives each of K local steps the bound, and the noise, of a whole release."""

    def step(self, values: Floats, bound: float) -> tuple[Scalars, float]:
        noise = self.terms.noise
        steps, _ = noise.clip(values[:, None], bound)
        return noise.values(steps[:, 0] + noise.draw(self.width), bound).astype(np.float32), 0.0


class SeededNoiseClient(Client):
    def _private(self, plan: Plan, sanitiser: Sanitiser) -> Any:
        return super()._private(plan, seeded(sanitiser, plan.seeds))


class SeededDrawClient(Client):
    def _draw(self, plan: Plan, k: int, estimator: Estimator, step: int) -> npt.NDArray[np.int64]:
        return seeded_examples(self.replica.spec, plan.round, k, len(self.data))


class UnclippedClient(Client):
    def _private(self, plan: Plan, sanitiser: Sanitiser) -> Any:
        noise = sanitiser.terms.noise
        return super()._private(plan, with_noise(sanitiser, Unclipped(noise.noise_multiplier, noise.levels)))


class WholeBoundClient(Client):
    def _private(self, plan: Plan, sanitiser: Sanitiser) -> Any:
        return super()._private(plan, WholeBound(**vars(sanitiser)))


class SeededNoiseServer(Coordinator):
    def _summed(self, current: _Open, sanitiser: Sanitiser) -> LedgerRound:
        return super()._summed(current, seeded(sanitiser, current.shared))


class SeededDrawServer(Coordinator):
    def _sample(self, round_: int) -> list[int]:
        return seeded_clients(self.spec, round_)


def seeded_examples(spec: RunSpec, round_: int, k: int, total: int) -> npt.NDArray[np.int64]:
    return bernoulli(derive(spec.seed, "batch", round_, 0, k), total, spec.batch_size / total)


def seeded_clients(spec: RunSpec, round_: int) -> list[int]:
    drawn: list[int] = sample_clients(derive(spec.seed, "sampling", round_), spec.clients, spec.client_rate).tolist()
    return drawn


CLIENTS: dict[str, type[Client]] = {
    "seeded noise": SeededNoiseClient,
    "seeded draw": SeededDrawClient,
    "no clipping": UnclippedClient,
    "whole bound": WholeBoundClient,
}
SERVERS: dict[str, type[Coordinator]] = {"seeded noise": SeededNoiseServer, "seeded draw": SeededDrawServer}


@dataclass(frozen=True)
class Case:
    """A kind of run to attack.

    Attributes:
        mode, mechanism: of privacy.
        flaw: what is broken; "": nothing.
        examples, batch: of each client, and of a local step (expected).
        clients, rate: of the run, and the chance of each in a round (0: all).
        rounds, steps, queries: T, K and P.
    """

    mode: str
    mechanism: str = "gaussian"
    flaw: str = ""
    examples: int = 12
    batch: int = 12
    clients: int = 1
    rate: float = 0.0
    rounds: int = 2
    steps: int = 1
    queries: int = 2

    @property
    def chance(self) -> float:
        """That a unit is drawn for a release."""
        return self.batch / self.examples if self.mode == "example-local" else self.rate or 1.0

    @property
    def draw(self) -> str:
        return f"Poisson, {self.chance:g}" if self.chance < 1.0 else "none"


CASES: dict[str, Case] = {
    "examples": Case("example-local", rounds=3),
    "examples-drawn": Case("example-local", examples=48, batch=12, steps=2),
    "examples-laplace": Case("example-local", "laplace", queries=1),
    "client": Case("client-local", steps=2),
    "clients-drawn": Case("client-central", clients=6, rate=0.25, steps=2),
    "clients-secure-sum": Case("client-secagg", clients=3),
    "examples-seeded-noise": Case("example-local", flaw="seeded noise", rounds=3),
    "examples-seeded-draw": Case("example-local", flaw="seeded draw", examples=200, batch=20, steps=4),
    "examples-unclipped": Case("example-local", flaw="no clipping", rounds=3),
    "client-whole-bound": Case("client-local", flaw="whole bound", rounds=1, steps=9, queries=1),
    "clients-seeded-noise": Case("client-central", flaw="seeded noise", clients=6, rate=0.25, steps=2),
    "clients-seeded-draw": Case("client-central", flaw="seeded draw", clients=40, rate=0.05, rounds=3),
}


@dataclass(frozen=True)
class Setting:
    """A case with the terms that its budget comes to."""

    case: Case
    terms: Terms

    @staticmethod
    def of(case: Case, budget: float, delta: float) -> "Setting":
        """By the library's own planning: the least noise with which the run stays within epsilon and delta."""
        config = configuration(case, budget, 0.0 if case.mechanism == "laplace" else delta)
        return Setting(case, make_terms(config, [case.examples] * case.clients, 1))

    @cached_property
    def release(self) -> Release:
        """One release of the canary to the accountant."""
        sanitiser = Sanitiser(
            self.terms, self.case.steps, self.case.queries, self.case.batch, self.case.clients
        )  # of a two-point estimator: a scalar a query
        rate = self.case.chance if self.terms.of_examples else None
        return self.terms.release(sanitiser.coordinates, rate, units=self.case.clients)

    @property
    def releases(self) -> int:
        return self.case.rounds * (self.case.steps if self.terms.of_examples else 1)

    @property
    def stated(self) -> float:
        """epsilon of exactly the releases that are made."""
        return epsilon(self.release, self.releases, self.terms.delta)


def configuration(case: Case, budget: float, delta: float) -> Config:
    return from_flat(
        {
            "seed": SEED,
            "data.clients": case.clients,
            "method.batch_size": case.batch,
            "method.queries": case.queries,
            "federation.rounds": case.rounds,
            "federation.local_steps": case.steps,
            "federation.client_rate": case.rate,
            "privacy.mode": case.mode,
            "privacy.mechanism": case.mechanism,
            "privacy.epsilon": budget,
            "privacy.delta": delta,
        }
    )


class Lab:
    """The parts of a setting's runs, and what the attacker knows of them."""

    def __init__(self, setting: Setting) -> None:
        self.case, self.terms = setting.case, setting.terms
        model = Model()
        space = full(model)
        self.evaluator = Evaluator(model, space, "paired")
        self._theta0 = space.theta0(model)
        self.spec = self._spec(space.hash)
        assert self.spec.sanitiser is not None
        self.sanitiser = self.spec.sanitiser
        self.budget = Budget(self.terms, setting.release)
        self.canary = self._place()
        # Rows of the clients: of the canary's an example, or the client, stands apart.
        self.rows = {client: ordinary(client, self.case.examples) for client in range(self.case.clients)}
        self._hidden = np.zeros((1 if self.terms.of_examples else self.case.examples, SIZE), dtype=np.float32)
        self._loud = self._hidden.copy()
        self._loud[:, 0] = FAR
        self.told = {client: self.data(client, present=True) for client in self.rows}  # what the attacker knows

    def _spec(self, space_hash: str) -> RunSpec:
        case = self.case
        return RunSpec(
            protocol=PROTOCOL, fingerprint=hashlib.sha256(b"logistic regression").hexdigest(), parameters=SIZE,
            space="full", space_hash=space_hash, size=SIZE, theta_dtype="float32",
            theta0=theta_digest(self._theta0).hex(), initial="", mask="", family="rademacher", estimator="two-point",
            eps=1e-3, queries=case.queries, batch_size=case.batch, optimizer="sgd", learning_rate=1e-3,
            schedule="constant", warmup_steps=0, rounds=case.rounds, local_steps=case.steps, seed=SEED, seeds="shared",
            pool_size=1, clients=case.clients, clients_per_round=0, client_rate=case.rate, aggregation="uniform",
            trim=0.0, quorum=1, scalar_bound=1e9, digest_every=1, experiment="", privacy=self.terms.to_header(),
        )  # fmt: skip

    def _place(self) -> int:
        """The canary's number among the client's examples, or the clients: of all that the run's seed draws most.

        Which it is makes no difference to a secret draw.
        """
        case, spec = self.case, self.spec
        units = case.examples if self.terms.of_examples else case.clients
        drawn = [
            seeded_examples(spec, round_, k, units) if self.terms.of_examples else seeded_clients(spec, round_)
            for round_, k in itertools.product(range(case.rounds), range(case.steps))
        ]
        counts = np.bincount(np.concatenate(drawn).astype(np.int64), minlength=units)
        return int(counts.argmax()) if case.chance < 1.0 else 0

    def data(self, client: int, present: bool) -> Rows:
        """A client's examples in the world in which the canary gives its part, or in the other."""
        canary = self._loud if present else self._hidden
        if not self.terms.of_examples:
            return canary if client == self.canary else self.rows[client]
        rows = self.rows[client].copy()
        rows[self.canary] = canary
        return rows

    def replica(self) -> Replica:
        return Replica(self.spec, self._theta0.clone)

    def client(self, client: int, present: bool, replica: Replica, folder: Path) -> Client:
        account = None
        if not self.terms.secret:
            account = Account(folder / f"{client}.json", self.spec.run_id, self.budget)
        return CLIENTS.get(self.case.flaw, Client)(
            client, replica, Examples(self.data(client, present)), fingerprint=self.spec.fingerprint,
            space_hash=self.spec.space_hash, theta0=self.spec.theta0, account=account,
        )  # fmt: skip

    def answer(self, client: Client, plan: bytes) -> bytes:
        """What a client answers to a plan."""
        message = decode(plan)
        assert isinstance(message, Plan)
        found: Contribution | Held | Behind | Failure = _driven(client.round(message), self.evaluator.answer)
        return found.to_bytes()

    def asked(self, round_: int) -> Seeds:
        """The seeds uint64 [K, P] of a round."""
        return round_seeds(self.spec.seed, "shared", round_, 0, (self.case.steps, self.case.queries))

    @cached_property
    def mechanism(self) -> Mechanism:
        """By which a unit's scalars come onto the grid, in these runs."""
        noise = self.terms.noise
        return Unclipped(noise.noise_multiplier, noise.levels) if self.case.flaw == "no clipping" else noise

    def known_noise(self, seeds: Seeds, scale: float) -> Ints:
        """The noise [len(seeds)] that the attacker knows, in grid steps."""
        if self.case.flaw != "seeded noise":
            return np.zeros(len(seeds), dtype=np.int64)
        return SeededGaussian(scale, self.terms.levels, iter(seeds.tolist())).draw(len(seeds))

    @property
    def spread(self) -> float:
        """Of the noise that it does not know, in grid steps."""
        known = self.case.flaw == "seeded noise"
        return (_ROUNDING if known else self.mechanism.noise_multiplier) * self.terms.levels

    def walk(self, replica: Replica, round_: int, rows: Sequence[Rows], released: Scalars | None) -> Iterator[Floats]:
        """The scalars float64 [P, B] of examples in the local steps of a round that begins where the replica stands.

        Args:
            rows: the examples, step by step.
            released: [K, P], along which a step moves the client; None: along the means of the examples.
        """
        (rule, state), theta = replica.rule.fork(replica.state), replica.theta.clone()
        seeds, eps = self.asked(round_), self.spec.eps
        for k, examples in enumerate(rows):
            row = slice(k, k + 1)
            away = eps * directions(tuple(seeds[k].tolist()))
            plus, minus = (np.logaddexp(0.0, -(theta.numpy() + a) @ examples.T) for a in (away, -away))
            values = (plus - minus) / (2.0 * eps)
            yield values
            moved = values.mean(axis=1)[None].astype(np.float32) if released is None else released[row]
            state = rule.apply(theta, state, [Records(round_ * self.case.steps + k, seeds[row], moved)])


@lru_cache(maxsize=4096)
def directions(seeds: tuple[int, ...]) -> Floats:
    """float64 [P, SIZE]."""
    return np.stack([fill(torch.empty(SIZE), seed, "rademacher").numpy() for seed in seeds]).astype(np.float64)


def _driven(steps: Any, respond: Callable[[Request], Tensor]) -> Any:
    """What a generator of requests returns in the end."""
    try:
        request = next(steps)
        while True:
            request = steps.send(respond(request))
    except StopIteration as stop:
        return stop.value


def log_ratio(rest: Floats, part: Floats, spread: float, order: int, chance: float) -> Floats:
    """log of p(rest | the unit gives `part` with a chance) / p(rest | it gives nothing), over the last axis.

    Args:
        rest: [..., d], a release less all that is known of it: the noise, and maybe the unit's part.
        part: [d].
        spread: of the noise: standard deviation for order 2 (Gaussian), scale for order 1 (Laplace).
        chance: that the unit is drawn; a mixture where it is below 1.
    """
    if order == 2:
        drawn = (rest @ part - part @ part / 2.0) / spread**2
    else:
        drawn = (np.abs(rest) - np.abs(rest - part)).sum(axis=-1) / spread
    if chance in (0.0, 1.0):
        return np.asarray(drawn * chance)
    return np.logaddexp(math.log1p(-chance), math.log(chance) + drawn)


def attack_client(lab: Lab, present: bool, folder: Path) -> float:
    """A run of one client that noises by itself, attacked by the server, which makes the plans."""
    client, replica, score = lab.client(0, present, lab.replica(), folder), lab.replica(), 0.0
    missed = CatchUp("none", 0, 0)
    for round_ in range(lab.case.rounds):
        seeds = lab.asked(round_)
        plan = Plan(
            lab.spec.run_id, round_, 0, seeds, lab.spec.eps, lab.spec.batch_size, replica.digest(), missed,
            clip=lab.terms.clip,
        )  # fmt: skip
        message = decode(lab.answer(client, plan.to_bytes()))
        assert isinstance(message, Contribution)
        score += _local_score(lab, replica, round_, message.scalars, client.drawn)
        replica.apply([Records(round_ * lab.case.steps, seeds, message.scalars)])
        missed = CatchUp("records", round_, round_ + 1, (RoundRecords(seeds, message.scalars),))
    return score


def _local_score(
    lab: Lab, replica: Replica, round_: int, released: Scalars, drawn: Sequence[npt.NDArray[np.int64]]
) -> float:
    """Of a client's K releases of examples, or of the K parts of its one release."""
    data, examples = lab.told[0], lab.terms.of_examples
    bound, mechanism, noise, width = lab.terms.clip, lab.mechanism, lab.mechanism.noise_multiplier, 1.0
    if not examples and lab.case.flaw != "whole bound":
        width = lab.case.steps ** (1.0 / lab.terms.order)  # a step has its share of the bound, and all of the noise
    # The canary's example comes last.
    others = [indices[indices != lab.canary] if examples else indices for indices in drawn]
    rows = [data[[*some, lab.canary] if examples else some] for some in others]
    score = 0.0
    for k, values in enumerate(lab.walk(replica, round_, rows, released)):
        known, chance = np.zeros(lab.case.queries, dtype=np.int64), lab.case.chance
        if examples:
            steps, _ = mechanism.clip(values, bound)
            known, canary = steps[:, :-1].sum(axis=1), steps[:, -1]
            if lab.case.flaw == "seeded draw":
                chance = float(lab.canary in drawn[k])
        else:
            canary = mechanism.clip(values.mean(axis=1, keepdims=True), bound / width)[0][:, 0]
        found = released[k].astype(np.float64) * (lab.sanitiser.expected * lab.terms.levels * width / bound)
        seen = lab.known_noise(lab.asked(round_)[k], noise * width)
        part, spread = canary.astype(np.float64), lab.spread * width
        score += float(log_ratio(found - known - seen, part, spread, lab.terms.order, chance))
    return score


def attack_server(lab: Lab, present: bool, folder: Path) -> float:
    """A run of the real coordinator, attacked by whoever reads the ledger and knows all clients but the canary."""
    score, everyone = 0.0, range(lab.case.clients)
    with Ledger.create(folder / "ledger.sqlite", lab.spec) as ledger:
        coordinator = SERVERS.get(lab.case.flaw, Coordinator)(ledger, lab.replica())
        theirs, replica = lab.replica(), lab.replica()
        clients = {number: lab.client(number, present, theirs, folder) for number in everyone}
        for client in clients.values():
            coordinator.admit(client.hello())
        for round_ in range(lab.case.rounds):
            plans = coordinator.open_round()
            for plan in plans:
                coordinator.receive(plan.client, lab.answer(clients[plan.client], plan.to_bytes()))
            holders = coordinator.holders
            if holders:
                held = [vector for number in holders if (vector := clients[number].held) is not None]
                coordinator.receive_total((holders, np.sum(held, axis=0)))
            coordinator.close_round()
            (entry,) = ledger.read(round_)
            if entry.scalars.size:  # of nobody but the server's own draw, nothing is released
                score += _sum_score(lab, replica, entry, [plan.client for plan in plans])
            replica.apply([entry.records()])
    return score


def _sum_score(lab: Lab, replica: Replica, entry: LedgerRound, asked: Sequence[int]) -> float:
    """Of a round's noised sum over clients."""
    parts = {}
    for client in {*asked, lab.canary}:
        rows = [lab.told[client]] * lab.case.steps
        steps = list(lab.walk(replica, entry.round, rows, None))
        means = np.stack([values.mean(axis=1) for values in steps])
        parts[client] = lab.mechanism.clip(means.reshape(-1, 1), lab.terms.clip)[0][:, 0]
    canary, nobody = parts.pop(lab.canary), np.zeros(entry.scalars.size, dtype=np.int64)
    chance = lab.case.chance
    if lab.case.flaw == "seeded draw":
        chance = float(lab.canary in asked)
    released = entry.scalars.ravel().astype(np.float64)
    found = released * (lab.sanitiser.expected * lab.terms.levels / lab.terms.clip)
    seen = lab.known_noise(entry.seeds.ravel(), lab.mechanism.noise_multiplier)
    rest = found - sum(parts.values(), nobody) - seen
    return float(log_ratio(rest, canary.astype(np.float64), lab.spread, lab.terms.order, chance))


# Statistics.


def upper_limit(errors: npt.ArrayLike, trials: int, confidence: float) -> Floats:
    """One-sided Clopper-Pearson limit: the error rates that so few errors do not refute."""
    from scipy.stats import beta

    found = np.asarray(errors, dtype=np.float64)
    inside = np.minimum(found, trials - 1.0)
    return np.where(found >= trials, 1.0, beta.ppf(confidence, inside + 1.0, trials - inside))


def epsilon_bound(
    false_positives: npt.ArrayLike, false_negatives: npt.ArrayLike, trials: int, delta: float, confidence: float
) -> Floats:
    """What epsilon at least is when a test errs so often in `trials` of either world; 0 where that tells nothing.

    Args:
        confidence: of both errors' limits together.
    """
    one = 1.0 - (1.0 - confidence) / 2.0
    positive, negative = (upper_limit(errors, trials, one) for errors in (false_positives, false_negatives))
    # Without log's complaints where nothing is left of 1 - delta.
    left = np.maximum(1.0 - delta - negative, 0.0) / positive, np.maximum(1.0 - delta - positive, 0.0) / negative
    found: Floats = np.log(np.maximum(np.maximum(*left), 1.0))
    return found


def lower_bound(absent: Floats, present: Floats, delta: float, confidence: float = CONFIDENCE) -> float:
    """What epsilon at least is, by scores [n] of runs without and with the canary.

    The threshold is the best for the first half of the scores; the other half is judged by it.
    """
    half = len(absent) // 2
    found = np.unique(np.concatenate([absent[:half], present[:half]]))
    tried = np.concatenate([found[:1] - 1.0, (found[1:] + found[:-1]) / 2.0])
    false_positives = half - np.searchsorted(np.sort(absent[:half]), tried, side="right")
    false_negatives = np.searchsorted(np.sort(present[:half]), tried, side="right")
    best = int(np.argmax(epsilon_bound(false_positives, false_negatives, half, delta, confidence)))
    wrong = (absent[half:] > tried[best]).sum(), (present[half:] <= tried[best]).sum()
    return float(epsilon_bound(*wrong, len(absent) - half, delta, confidence))


def expected(setting: "Setting", trials: int, confidence: float = CONFIDENCE, repeats: int = 20) -> float:
    """The bound, on average, if releases tell of the canary exactly what is stated: a shift of noise by the bound."""
    rng, release = np.random.default_rng(0), setting.release
    noise = rng.normal if setting.terms.order == 2 else rng.laplace
    shape = repeats, trials, setting.releases, 1
    scored = []
    for present in (False, True):
        shift = (rng.random(shape) < release.chance) if present else 0.0
        rest = noise(0.0, release.noise_multiplier, shape) + shift
        each = log_ratio(rest, np.ones(1), release.noise_multiplier, setting.terms.order, release.chance)
        scored.append(each.sum(axis=-1))
    delta = setting.terms.delta
    return float(np.mean([lower_bound(*pair, delta, confidence) for pair in zip(scored[0], scored[1], strict=True)]))


def most(trials: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The bound if of so many trials of either world half were judged without an error."""
    return float(epsilon_bound(0, 0, trials - trials // 2, delta, confidence))


# Trials.


@lru_cache
def _lab(setting: Setting) -> Lab:
    return Lab(setting)


def scores(setting: Setting, present: bool, trials: int) -> list[float]:
    """Of runs of their own."""
    lab = _lab(setting)
    attack = attack_client if setting.terms.local else attack_server
    memory = Path("/dev/shm")  # budgets and ledgers are written through to the disk
    found = []
    for _ in range(trials):
        with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            found.append(attack(lab, present, Path(folder)))
    return found


@dataclass(frozen=True)
class Finding:
    """What the attack found in a setting.

    Attributes:
        trials: in each world.
        bound: lower bound on epsilon.
        expected: of a mechanism that is just what is stated.
        most: the highest that so many trials can give.
    """

    setting: Setting
    trials: int
    bound: float
    expected: float
    most: float

    @property
    def right(self) -> bool:
        """Within the statement if nothing is broken, and beyond it if something is."""
        return (self.bound > self.setting.stated) == bool(self.setting.case.flaw)

    @property
    def verdict(self) -> str:
        if self.setting.case.flaw:
            return "caught" if self.right else "NOT CAUGHT"
        return "holds" if self.right else "VIOLATED"


def audit(
    settings: Sequence[Setting], trials: int, confidence: float = CONFIDENCE, jobs: int = 1, chunk: int = 50
) -> Iterator[Finding]:
    """Attacks each setting with so many trials in each world, in `jobs` processes."""
    sizes = [min(chunk, trials - start) for start in range(0, trials, chunk)]
    tasks = [(setting, present, size) for setting in settings for present in (False, True) for size in sizes]
    with _mapped(jobs) as run:
        found = run(tasks)
        for setting in settings:
            absent, present = (np.concatenate([next(found) for _ in sizes]) for _ in range(2))
            bound = lower_bound(absent, present, setting.terms.delta, confidence)
            best = most(trials, setting.terms.delta, confidence)
            yield Finding(setting, trials, bound, expected(setting, trials, confidence), best)


Task = tuple[Setting, bool, int]


@contextmanager
def _mapped(jobs: int) -> Iterator[Callable[[Sequence[Task]], Iterator[list[float]]]]:
    """`scores` of tasks in their order, in this process or in others."""
    if jobs == 1:
        yield lambda tasks: itertools.starmap(scores, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        yield lambda tasks: pool.imap(_scores, tasks)


def _scores(task: Task) -> list[float]:
    return scores(*task)


ROW = "{:<23}{:<10}{:<15}{:<15}{:<14}{:>8}{:>7}{:>8}{:>13}{:>10}{:>9}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1200, help="of each case in each of the two worlds")
    parser.add_argument("--epsilon", type=float, default=2.0, help="budget of each run")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Gaussian ones; Laplace noise has 0")
    parser.add_argument("--only", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--quick", action="store_true", help="100 trials of three cases")
    args = parser.parse_args()
    names = QUICK if args.quick else args.only.split(",")
    trials = 100 if args.quick else args.trials
    started = time.monotonic()
    torch.set_num_threads(1)
    settings = [Setting.of(CASES[name], args.epsilon, args.delta) for name in names]
    print(ROW.format(*("case", "mechanism", "mode", "draw", "broken"), "releases", "delta", "stated", "lower bound",
                     "expected", "at most", "verdict"))  # fmt: skip
    rows = []
    for name, finding in zip(names, audit(settings, trials, jobs=1 if args.quick else args.jobs), strict=True):
        setting, case = finding.setting, finding.setting.case
        delta, numbers = setting.terms.delta, (setting.stated, finding.bound, finding.expected, finding.most)
        print(ROW.format(name, case.mechanism, case.mode, case.draw, case.flaw or "-", setting.releases, f"{delta:g}",
                         *(f"{number:.2f}" for number in numbers), finding.verdict), flush=True)  # fmt: skip
        rows.append(
            {
                "case": name, "mechanism": case.mechanism, "mode": case.mode, "draw": case.draw, "broken": case.flaw,
                "releases": setting.releases, "noise_multiplier": setting.terms.noise_multiplier, "delta": delta,
                **dict(zip(("stated", "bound", "expected", "most"), (round(n, 4) for n in numbers), strict=True)),
                "verdict": finding.verdict, "right": finding.right,
            }
        )  # fmt: skip
    right = all(row["right"] for row in rows)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"trials": trials, "confidence": CONFIDENCE, "seconds": seconds, "rows": rows, "right": right}))
    if not right:
        sys.exit(1)


QUICK = ["examples", "examples-seeded-noise", "examples-unclipped"]


if __name__ == "__main__":
    main()
