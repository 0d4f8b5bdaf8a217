"""What a run is: everything that must be known to replay it, and nothing else."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from fedzo.errors import ConfigError, LedgerError
from fedzo.estimators import ESTIMATORS, Estimator
from fedzo.federation.randomness import derive, pool_seeds
from fedzo.limits import NO_POOL, Value
from fedzo.optimizers import OPTIMIZERS, SGD, Hybrid, PoolSGD, Rule, Schedule, Setup
from fedzo.privacy.sanitiser import Sanitiser
from fedzo.privacy.terms import Terms
from fedzo.registry import lookup
from fedzo.structures import STRUCTURES, Frame, Layout, Structure

PROTOCOL = 5

SeedSchedule = Literal["shared", "independent", "pool", "weighted-pool"]
SEED_SCHEDULES: tuple[SeedSchedule, ...] = ("shared", "independent", "pool", "weighted-pool")
# Those whose seeds come from a fixed pool, so that theta is a sum over it.
POOLS: tuple[SeedSchedule, ...] = ("pool", "weighted-pool")


@dataclass(frozen=True)
class RunSpec:
    """The header of a ledger. Its canonical JSON is hashed; the hash names the run and starts the chain.

    Attributes:
        protocol: version of messages and ledger.
        fingerprint, parameters: identity of the base model, and its number of parameters.
        space, space_hash, size: kind, identity and number of entries of theta.
        theta_dtype: in which theta is kept.
        theta0: SHA-256 of theta before the first step.
        initial: SHA-256 of the artifact with the initial values of parameters that the base model does not have
            ("" when there are none).
        mask: SHA-256 of the artifact with the mask of a sparse space ("" when there is none).
        family, estimator, eps, queries, batch_size: how a step's scalars are made; P = queries.
        optimizer, learning_rate, schedule, warmup_steps: how records move theta.
        rounds, local_steps: length; K = local_steps.
        seed, seeds, pool_size: the run's seed and the seed schedule.
        clients, clients_per_round, client_rate: registered clients, and how many a round asks: a count (0: all), or
            each with a probability (when above 0).
        aggregation, trim, norm_bound, quorum, scalar_bound: how a round's contributions become records.
        digest_every: rounds between recorded digests of theta (the last round always has one).
        experiment: SHA-256 over the configuration of task, data and model preparation.
        clip: magnitude to which a client cuts its scalars (0: it does not).
        structure: which directions the seeds stand for.
        settings: those keys of ``method`` that estimator, structure and optimizer read, by name.
        privacy: the terms of a private run by name (`fedzo.privacy.Terms`); empty: the run is not private.
    """

    protocol: int
    fingerprint: str
    parameters: int
    space: str
    space_hash: str
    size: int
    theta_dtype: str
    theta0: str
    initial: str
    mask: str
    family: str
    estimator: str
    eps: float
    queries: int
    batch_size: int
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    rounds: int
    local_steps: int
    seed: int
    seeds: SeedSchedule
    pool_size: int
    clients: int
    clients_per_round: int
    client_rate: float
    aggregation: str
    trim: float
    quorum: int
    scalar_bound: float
    digest_every: int
    experiment: str
    clip: float = 0.0
    structure: str = "isotropic"
    settings: Mapping[str, Value] = field(default_factory=dict)
    privacy: Mapping[str, Value] = field(default_factory=dict)
    norm_bound: float = 0.0

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, shortest float that reads back the same."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "RunSpec":
        """Inverse of `to_json`.

        Raises:
            LedgerError: fields are missing or unknown, or the protocol's version is another (another version of fedzo),
                or the text is no JSON.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            spec = RunSpec(**values)
        except (TypeError, ValueError) as error:
            raise LedgerError(
                f"the ledger's header is not one of this version of fedzo (protocol {PROTOCOL})"
            ) from error
        if spec.protocol != PROTOCOL:
            raise LedgerError(
                f"the ledger's header has protocol version {spec.protocol}, this version of fedzo has {PROTOCOL}; "
                "use the version of fedzo that wrote it"
            )
        _ = spec.terms
        return spec

    @cached_property
    def terms(self) -> Terms | None:
        """The terms of a private run, or None.

        Raises:
            LedgerError: they are not those of this version of fedzo.
        """
        return Terms.from_header(self.privacy) if self.privacy else None

    @cached_property
    def sanitiser(self) -> Sanitiser | None:
        """What a private run's releases go through, or None."""
        if self.terms is None:
            return None
        return Sanitiser(self.terms, self.local_steps, self.scalars * self.queries, self.batch_size, self.clients)

    @property
    def uncovered(self) -> str:
        """The part of the method that a private run's mode does not cover, by its key and name; "": it covers all."""
        if self.terms is None:
            return ""
        named: tuple[tuple[type[Estimator] | type[Structure] | type[Rule], str], ...] = (
            (lookup(ESTIMATORS, self.estimator, "estimator"), f"estimator {self.estimator}"),
            (lookup(STRUCTURES, self.structure, "structure"), f"structure {self.structure}"),
            (lookup(OPTIMIZERS, self.optimizer, "optimizer"), f"optimizer {self.optimizer}"),
            *([(Hybrid, "first_order")] if self.settings.get("first_order") else []),
        )
        return next((name for part, name in named if self.terms.mode not in part.private), "")

    @cached_property
    def hash(self) -> bytes:
        """Of the header; every message is checked against it."""
        return hashlib.sha256(self.to_json().encode()).digest()

    @property
    def run_id(self) -> bytes:
        """The first 8 bytes of the header's hash: names the run in messages."""
        return self.hash[:8]

    def build_estimator(self) -> Estimator:
        return lookup(ESTIMATORS, self.estimator, "estimator")(self.settings)

    @property
    def scalars(self) -> int:
        """C, the scalars that a query yields."""
        return lookup(ESTIMATORS, self.estimator, "estimator").scalars

    def build_structure(self, layout: Layout) -> Structure:
        frame = Frame(self.family, layout, derive(self.seed, "structure"), self.settings)
        return lookup(STRUCTURES, self.structure, "structure")(frame)

    def build_rule(self, layout: Layout) -> Rule:
        """The update rule over a theta of this layout.

        Raises:
            ConfigError: a seed schedule of `POOLS` with an update rule that is no sum over seeds.
            SpaceError: the layout has no such part as first-order steps are to move.
        """
        schedule = Schedule(self.schedule, self.learning_rate, self.rounds * self.local_steps, self.warmup_steps)
        structure, rounding = self.build_structure(layout), derive(self.seed, "rounding")
        setup = Setup(schedule, self.queries, structure, rounding, self.local_steps, self.settings)
        made = lookup(OPTIMIZERS, self.optimizer, "optimizer")
        if self.settings.get("first_order"):
            name = str(self.settings["first_order_optimizer"])
            return Hybrid.of(made, lookup(OPTIMIZERS, name, "first_order_optimizer"), setup)
        rule = made(setup)
        if self.seeds not in POOLS:
            return rule
        if not isinstance(rule, SGD) or NO_POOL in rule.limits:
            raise ConfigError(
                f'federation.seeds = "{self.seeds}" needs method.optimizer = "sgd" or "conservative", found '
                f'"{self.optimizer}": theta is a sum over the pool\'s seeds'
            )
        return PoolSGD(rule, pool_seeds(self.seed, self.pool_size))

    def has_digest(self, round_: int) -> bool:
        """Whether the ledger holds theta's digest after this round (0, 1, ...)."""
        return (round_ + 1) % self.digest_every == 0 or round_ + 1 == self.rounds
