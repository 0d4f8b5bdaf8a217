"""A run's configuration: checked once, here. TOML sections for people, one flat level ("method.eps") for Flower."""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from fedzo.directions import FAMILIES
from fedzo.errors import ConfigError
from fedzo.estimators import ESTIMATORS, Estimator
from fedzo.federation.aggregation import AGGREGATORS, WEIGHINGS
from fedzo.federation.spec import POOLS, SeedSchedule
from fedzo.limits import PrivacyMode, Value
from fedzo.methods import difference, with_method
from fedzo.optimizers import OPTIMIZERS, SCHEDULES, Hybrid, Rule
from fedzo.privacy.accounting import Law
from fedzo.privacy.terms import SUM_MODES
from fedzo.registry import lookup, nearest
from fedzo.spaces import METHODS
from fedzo.structures import STRUCTURES, Structure

Scalar = bool | int | float | str
_OF_THE_MASK = {"mask", "density", "per_tensor", "calibration", "calibration_examples"}


def _split(value: object) -> object:
    """Flower's run-config has no lists: "a, b" and ["a", "b"] are the same."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return _without(",", value)


def _split_verbatim(value: object) -> object:
    """As `_split` by "|", keeping spaces: they matter in verbalisers."""
    if isinstance(value, str):
        return [part for part in value.split("|") if part]
    return _without("|", value)


def _without(separator: str, value: object) -> object:
    """A list whose items survive being joined by the separator."""
    if isinstance(value, list | tuple) and any(isinstance(part, str) and separator in part for part in value):
        raise ValueError(f"an item may not contain {separator!r}, which separates items")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_split_verbatim)]
Quantisation = Literal["none", "nf4", "fp4", "int8"]
Bases = Annotated[tuple[Quantisation, ...], BeforeValidator(_split)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    source: str = Field(default="embedded", description='"embedded", a hub name, or a local directory')
    kind: Literal["causal", "masked", "encoder"] = Field(
        default="causal",
        description="language model with prompts (causal or masked), or encoder with a classification head",
    )
    revision: str = Field(default="", description="hub revision; empty: the newest")
    max_length: int = Field(default=128, ge=4, description="tokens of an example at most")
    head: Literal["label-texts", "random"] = Field(default="label-texts", description="first rows of an encoder's head")
    head_scale: float = Field(default=20.0, gt=0, description="factor on the cosine between text and head row")
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="how an encoder's hidden states become one vector"
    )
    quantisation: Quantisation = Field(default="none", description="of the frozen weights: none, nf4, fp4 or int8")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="in which a forward pass computes; less than float32 disturbs the scalars"
    )
    client_quantisation: Bases = Field(
        default=(), description="in a simulation client i's quantisation is entry i modulo length; empty: as the server"
    )


class SpaceSection(Section):
    """What is trainable."""

    kind: Literal["full", "sparse", "adapter", "scales", "codes"] = Field(
        default="full",
        description="full, sparse mask, PEFT adapter, or of a quantised base its scales or its int8 codes",
    )
    include: Names = Field(default=("*",), description="patterns of parameter names, for all but adapter")
    exclude: Names = Field(default=(), description="patterns of parameter names left out")
    density: float = Field(default=0.01, gt=0, le=1, description="part of the parameters that is trainable, for sparse")
    mask: str = Field(
        default="random", description='"random", "magnitude", "sensitive", "forward", or a mask file, for sparse'
    )
    per_tensor: bool = Field(default=False, description="give each parameter the same density, for sparse")
    calibration: str = Field(
        default="", description="text file for a sensitive or forward mask; empty: examples of the training data"
    )
    calibration_examples: int = Field(default=128, ge=1, description="examples that such a mask is made from")
    theta_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 keeps theta in the model's own weights, for full"
    )
    adapter: Literal["lora", "ia3", "prefix", "prompt"] = Field(default="lora", description="PEFT method, for adapter")
    rank: int = Field(default=8, ge=1, description="rank of LoRA")
    alpha: float = Field(default=16.0, gt=0, description="scale of LoRA: alpha / rank")
    virtual_tokens: int = Field(default=16, ge=1, description="length of a prefix or prompt")
    prefix_init: Literal["activations", "random"] = Field(
        default="activations", description="first values of a prefix: what random tokens leave in the base, or noise"
    )
    targets: Names = Field(
        default=(), description="modules that LoRA and IA3 adapt; empty: PEFT's choice for the model"
    )


class TaskSection(Section):
    """What the model learns."""

    name: str = Field(default="toy-reviews", description="task of the registry")
    template: str = Field(
        default="", description="prompt with {field} and, for masked models, {mask}; empty: the task's own"
    )
    verbalizers: Texts = Field(default=(), description='label texts joined by "|", spaces kept; empty: the task\'s own')


class DataSection(Section):
    """Where the examples come from and how they are spread over clients."""

    source: str = Field(default="embedded", description='"embedded", a hub name ("glue/sst2"), or a local directory')
    train: str = Field(default="train", description="file or split to train on")
    validation: str = Field(default="", description="file or split to select on; empty: a part of train")
    test: str = Field(default="test", description="file or split to report on; empty: none")
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="part of train used to select when none is given"
    )
    limit: int = Field(default=0, ge=0, description="training examples at most; 0: all")
    shots: int = Field(
        default=0,
        ge=0,
        description="k, training examples a class (in all, without fixed classes), as many to select on; 0: all data",
    )
    clients: int = Field(default=10, ge=1, description="number of clients")
    partition: str = Field(
        default="dirichlet",
        description="how clients' data differ: iid, dirichlet, natural, ...; own: each node has its own",
    )
    alpha: float = Field(
        default=0.5, gt=0, description="concentration of the Dirichlet partition: smaller is more skewed"
    )
    column: str = Field(default="", description="column of a natural partition; for dirichlet empty: the label")


class MethodSection(Section):
    """The zeroth-order method."""

    name: str = Field(default="", description="method of `fedzo methods`, which gives the keys it is made of; or none")
    directions: str = Field(default="rademacher", description="family of random directions")
    estimator: str = Field(default="two-point", description="queries -> scalars")
    structure: str = Field(default="isotropic", description="step and seed -> direction")
    optimizer: str = Field(default="sgd", description="records -> theta")
    eps: float = Field(default=1e-3, gt=0, description="distance of the two points from theta")
    queries: int = Field(default=2, ge=1, le=65535, description="P, directions of a step")
    clip: float = Field(default=0.0, ge=0, description="a client's scalars are cut to this magnitude (QZO); 0: never")
    batch_size: int = Field(default=8, ge=1, description="examples of a step on one client")
    learning_rate: float | Literal["auto"] = Field(
        default=1e-3, description='peak step size; "auto": picked by a probe before the first round'
    )
    schedule: str = Field(default="linear", description="constant, linear or cosine")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise from 0")
    weight_decay: float = Field(default=0.0, ge=0, description="shrinks theta by learning rate x this, each step")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of momentum")
    nesterov: bool = Field(default=False, description="look ahead, for momentum")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment, for adam and adamw")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the second moment, for adam and adamw")
    adam_eps: float = Field(
        default=1e-8, ge=1e-30, description="added to its square root, for adam and adamw; to squared steps, for hiso"
    )
    smoothing: float = Field(default=1e-3, gt=0, lt=1, description="share of the newest curvature, for hizoo and hiso")
    anchor_every: int = Field(default=10, ge=1, description="steps between anchors, for svrg")
    anchor_rate: float = Field(default=1.0, gt=0, description="factor on the learning rate at an anchor, for svrg")
    project_every: int = Field(default=50, ge=1, description="steps between projections of the drift, for dizo")
    project_steps: int = Field(default=10, ge=1, description="steps of a projection, for dizo")
    projection_rate: float = Field(default=2.0, gt=0, description="learning rate of a projection, for dizo")
    projection_clip: float = Field(
        default=0.2, gt=0, lt=1, description="largest change of a parameter's drift by a projection, for dizo"
    )
    layer_share: float = Field(default=0.25, gt=0, le=1, description="part of the layers a direction moves, layer-wise")
    rank: int = Field(default=2, ge=1, description="of a matrix's direction, for low-rank and subspace")
    refresh: int = Field(default=50, ge=1, description="steps between new factors, for low-rank and subspace")

    first_order: Names = Field(
        default=(), description="patterns of trained parameters that move by back-propagation (hybrid); empty: none"
    )
    first_order_optimizer: str = Field(default="sgd", description="gradient -> those parameters")
    first_order_rate: float = Field(default=1e-3, gt=0, description="their peak step size")

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _rate(cls, value: object) -> object:
        with suppress(ValueError):
            if value == "auto" or (isinstance(value, int | float | str) and 0 < float(value) < math.inf):
                return value
        raise ValueError('wanted a number above 0, or "auto"')


class FederationSection(Section):
    """Rounds, clients and how their scalars are combined."""

    rounds: int = Field(default=100, ge=1, description="rounds of the run")
    local_steps: int = Field(default=1, ge=1, le=65535, description="K, steps of a client between two rounds")
    clients_per_round: int = Field(default=0, ge=0, description="clients asked a round; 0: all")
    client_rate: float = Field(
        default=0.0, ge=0, le=1, description="when above 0, each client is asked with this probability"
    )
    seeds: SeedSchedule = Field(default="shared", description="shared, independent, pool or weighted-pool")
    pool_size: int = Field(default=4096, ge=2, description="seeds of the pool")
    aggregation: str = Field(
        default="mean",
        description="mean (by examples; in a private run as uniform), uniform, median, trimmed-mean or norm-bound",
    )
    trim: float = Field(default=0.1, ge=0, lt=0.5, description="part cut at each end by trimmed-mean")
    norm_bound: float = Field(
        default=0.0,
        ge=0,
        description="L2 norm to which norm-bound scales a client's scalars down; 0: the round's median, untuned",
    )
    quorum: int = Field(default=1, ge=1, description="contributions below which a round changes nothing")
    scalar_bound: float = Field(default=1e4, gt=0, description="largest magnitude of a scalar that is accepted")
    digest_every: int = Field(default=1, ge=1, description="rounds between recorded digests of theta")


class PrivacySection(Section):
    """Who is protected from whom, and how well. docs/privacy.md."""

    mode: Literal["none"] | PrivacyMode = Field(
        default="none", description="what is protected, and where noise is added"
    )
    epsilon: float = Field(default=2.0, gt=0, description="budget of an example or client, which the run never exceeds")
    delta: float = Field(default=1e-5, ge=0, lt=1, description="chance that it does not hold; 0: never, for laplace")
    mechanism: Law = Field(default="gaussian", description="discrete noise on the scalars")
    noise_multiplier: float = Field(
        default=0.0, ge=0, le=1e6, description="noise over the clipping bound; 0: the least that lasts for all rounds"
    )
    clip: float = Field(
        default=1.0, gt=0, description="bound on the norm of the scalars of an example (a step's) or client (a round's)"
    )
    clipping: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="adaptive: the bound follows a quantile of the norms, at a share of the budget"
    )
    quantile: float = Field(default=0.5, gt=0, lt=1, description="of the norms, which an adaptive bound follows")
    clip_rate: float = Field(default=0.2, gt=0, le=1, description="step of an adaptive bound's logarithm")
    clip_share: float = Field(default=0.05, gt=0, lt=1, description="of the budget, which an adaptive bound takes")
    sampling: Literal["poisson", "fixed"] = Field(
        default="poisson",
        description="how examples (of clients: client-central) are drawn: each by chance, or a number",
    )
    sampling_rate: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="batch_size over a client's examples, for which noise is planned; 0: the largest of the clients'",
    )
    tolerance: int = Field(
        default=0, ge=0, description="clients of a round that may drop out or collude, for client-secagg"
    )


class EvaluationSection(Section):
    """When and on how much the model is evaluated by the server."""

    every: int = Field(
        default=10, ge=0, description="rounds between evaluations on validation data; 0: first and last only"
    )
    batch_size: int = Field(default=64, ge=1, description="examples of an evaluation's forward pass")
    limit: int = Field(default=0, ge=0, description="validation examples at most; 0: all")
    max_new_tokens: int = Field(default=50, ge=1, description="tokens of a generated answer at most")
    divergence: float = Field(
        default=2.0, ge=0, description="times its start (at least 1 nat) at which the loss stops the run; 0: never"
    )


class RuntimeSection(Section):
    """Where it runs; never part of what is computed."""

    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1"')
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: torch's choice")
    evaluation: Literal["auto", "paired", "sequential"] = Field(
        default="auto", description="the halves of a query in one batch, or one after the other; auto: the faster"
    )
    start_clients: int = Field(
        default=0, ge=0, description="clients that must be there before the first round, with Flower; 0: all"
    )
    join_timeout: float = Field(
        default=60.0, gt=0, description="seconds without a new node after which Flower's server waits for no more"
    )
    round_timeout: float = Field(default=600.0, gt=0, description="seconds that a Flower round waits for its clients")


class Config(Section):
    """All of a run."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="decides every choice of the run")
    name: str = Field(default="", description="name of the run folder; empty: task and time")
    model: ModelSection = ModelSection()
    space: SpaceSection = SpaceSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    method: MethodSection = MethodSection()
    federation: FederationSection = FederationSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    runtime: RuntimeSection = RuntimeSection()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        method, federation = self.method, self.federation
        if federation.client_rate and federation.clients_per_round:
            raise ValueError(
                f"federation.clients_per_round is {federation.clients_per_round} and federation.client_rate is "
                f"{federation.client_rate}: set one of them to 0"
            )
        try:
            for name, known, what in (
                (method.directions, FAMILIES, "method.directions"),
                (method.estimator, ESTIMATORS, "method.estimator"),
                (method.structure, STRUCTURES, "method.structure"),
                (method.optimizer, OPTIMIZERS, "method.optimizer"),
                (method.first_order_optimizer, OPTIMIZERS, "method.first_order_optimizer"),
                (method.schedule, SCHEDULES, "method.schedule"),
                (federation.aggregation, AGGREGATORS, "federation.aggregation"),
            ):
                lookup(dict.fromkeys(known), name, what)
            values = flatten(self)
            if method.name and (differs := difference(method.name, values)):
                raise ConfigError(differs)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for part, name in self.parts():
            for limit in part.limits:
                if fault := limit.fault(values):
                    raise ValueError(f'method.{name} = "{values[f"method.{name}"]}" {fault}')
        if self.data.shots and self.data.limit:
            raise ValueError(
                f"data.shots is {self.data.shots} and data.limit is {self.data.limit}: set one of them to 0"
            )
        if federation.aggregation not in WEIGHINGS and federation.seeds != "shared":
            raise ValueError(
                f'federation.aggregation = "{federation.aggregation}" compares clients seed by seed and needs '
                f'federation.seeds = "shared", found "{federation.seeds}"; "norm-bound" does without'
            )
        if federation.aggregation == "norm-bound" and federation.norm_bound:
            self._one_scale()
        asked = federation.clients_per_round or self.data.clients
        if asked > self.data.clients:
            raise ValueError(f"federation.clients_per_round is {asked}, but data.clients is {self.data.clients}")
        if federation.quorum > asked:
            raise ValueError(f"federation.quorum is {federation.quorum}, but only {asked} clients are asked a round")
        if federation.seeds in POOLS:
            self._sum_over_a_pool()
        if self.space.theta_dtype == "bfloat16" and self.space.kind != "full":
            raise ValueError(
                f'space.theta_dtype = "bfloat16" needs space.kind = "full", found "{self.space.kind}": a mask or '
                "an adapter is small, keep it in float32"
            )
        if self.space.kind in ("scales", "codes"):
            self._one_quantisation()
        if method.warmup_steps >= federation.rounds * federation.local_steps:
            raise ValueError(f"method.warmup_steps is {method.warmup_steps}, not below the run's number of steps")
        if self.privacy.mode != "none":
            self._private()
        return self

    def _private(self) -> None:
        """What a private run cannot do, or cannot promise."""
        privacy, method, federation, mode = self.privacy, self.method, self.federation, self.privacy.mode
        asks = f'privacy.mode = "{mode}"'
        for part, name in self.parts():
            if mode not in part.private:
                others = ", ".join(part.private) or "no privacy mode"
                value = flatten(self)[f"method.{name}"]
                raise ValueError(f'{asks} is not covered by method.{name} = "{value}", which is by {others}')
        if method.clip:
            raise ValueError(f"{asks} clips by privacy.clip: set method.clip = 0, found {method.clip:g}")
        if privacy.delta == 0.0 and privacy.mechanism == "gaussian":
            raise ValueError(
                'privacy.delta = 0 needs privacy.mechanism = "laplace"; for "gaussian" give one above 0, well below 1 '
                "over the number of those protected"
            )
        if self.space.kind == "sparse" and self.space.mask in ("sensitive", "forward") and not self.space.calibration:
            raise ValueError(
                f'{asks}, but space.mask = "{self.space.mask}" is made from training examples: give a public text in '
                'space.calibration, or a mask file, or take space.mask = "magnitude"'
            )
        sums = mode in SUM_MODES
        if sums and federation.seeds != "shared":
            raise ValueError(
                f'{asks} noises the sum over the clients, and with federation.seeds = "{federation.seeds}" each '
                f"client's own "
                'scalars would be records: set federation.seeds = "shared"'
            )
        if sums and federation.aggregation not in ("mean", "uniform"):
            raise ValueError(
                f'{asks} knows the sum over the clients only: set federation.aggregation = "uniform", found '
                f'"{federation.aggregation}"'
            )
        if mode == "client-central":
            self._central()
        if mode == "client-secagg":
            self._secure_sum()
        if mode != "example-local" and privacy.sampling_rate:
            raise ValueError(
                f"privacy.sampling_rate is of examples, for example-local: with {asks} leave it at 0, found "
                f"{privacy.sampling_rate:g}"
            )
        if mode != "example-local" and privacy.delta > 1.0 / self.data.clients:
            raise ValueError(
                f"privacy.delta is {privacy.delta:g}, above 1 / {self.data.clients} clients: it would allow one of "
                f"them to be published whole; set it well below {1.0 / self.data.clients:g}"
            )

    def _central(self) -> None:
        privacy, federation = self.privacy, self.federation
        if privacy.sampling == "poisson" and federation.clients_per_round:
            raise ValueError(
                f"federation.clients_per_round = {federation.clients_per_round} draws a fixed number of clients, and "
                'privacy.sampling = "poisson" counts on a draw of each by chance: set federation.client_rate instead, '
                'or privacy.sampling = "fixed"'
            )
        if privacy.sampling == "fixed" and federation.client_rate:
            raise ValueError(
                f"federation.client_rate = {federation.client_rate:g} draws each client by chance, and "
                'privacy.sampling = "fixed" counts on a fixed number: set federation.clients_per_round instead, or '
                'privacy.sampling = "poisson"'
            )
        if federation.quorum != 1:
            raise ValueError(
                f"federation.quorum is {federation.quorum}, but whether a round has enough clients would tell of their "
                'draw, on which privacy.mode = "client-central" rests: set it to 1'
            )

    def _secure_sum(self) -> None:
        privacy, federation = self.privacy, self.federation
        asked = federation.clients_per_round or self.data.clients
        if federation.client_rate:
            raise ValueError(
                'privacy.mode = "client-secagg" shares its noise among a known number of clients: set '
                "federation.client_rate = 0, and federation.clients_per_round if not all are to be asked"
            )
        if privacy.mechanism != "gaussian":
            raise ValueError(
                'privacy.mode = "client-secagg" needs privacy.mechanism = "gaussian", whose shares add up to the '
                f'noise of the whole; found "{privacy.mechanism}"'
            )
        if asked < 3:
            raise ValueError(f"a secure sum needs at least 3 clients a round, found {asked}")
        if privacy.tolerance > asked - 3:
            raise ValueError(
                f"privacy.tolerance is {privacy.tolerance} of {asked} clients a round: wanted at most {asked - 3}, as "
                "a secure sum needs 3 clients"
            )
        if federation.quorum > asked - privacy.tolerance:
            raise ValueError(
                f"federation.quorum is {federation.quorum}, more than the {asked - privacy.tolerance} clients that "
                "remain when privacy.tolerance drop out"
            )

    def _one_scale(self) -> None:
        """A bound on the norm is in units of what is bounded."""
        method = self.method
        for found, what in (
            (bool(method.first_order), f'method.first_order = "{", ".join(method.first_order)}": gradients'),
            (ESTIMATORS[method.estimator].scalars > 1, f'method.estimator = "{method.estimator}": second scalars'),
        ):
            if found:
                raise ValueError(
                    f"federation.norm_bound is {self.federation.norm_bound:g}, but clients send numbers of two scales "
                    f"with {what} too. Set federation.norm_bound = 0, which bounds each kind by its own median"
                )

    def _sum_over_a_pool(self) -> None:
        """theta is rebuilt from one coefficient a seed; whether the update rule allows that, its limits say."""
        method, federation = self.method, self.federation
        if method.queries > federation.pool_size:
            raise ValueError(
                f"method.queries is {method.queries}, more than federation.pool_size {federation.pool_size}"
            )
        for found, what in (
            (self.space.theta_dtype == "bfloat16", 'space.theta_dtype = "bfloat16" rounds theta at every step'),
            (method.weight_decay > 0, f"method.weight_decay = {method.weight_decay} shrinks theta at every step"),
            (
                not STRUCTURES[method.structure].steady,
                f'method.structure = "{method.structure}" has other directions at every step',
            ),
        ):
            if found:
                raise ValueError(
                    f'{what}, but federation.seeds = "{federation.seeds}" keeps one coefficient a seed for the whole '
                    'run: set federation.seeds = "shared" or "independent"'
                )

    def _one_quantisation(self) -> None:
        """Spaces of what a quantised base is stored as: one base for all."""
        kind, found, others = self.space.kind, self.model.quantisation, self.model.client_quantisation
        wanted = ("int8",) if kind == "codes" else ("nf4", "fp4", "int8")
        if found not in wanted:
            raise ValueError(
                f'space.kind = "{kind}" trains the {kind} of a quantised base and needs model.quantisation = '
                f'{" or ".join(map(json.dumps, wanted))}, found "{found}"'
            )
        if set(others) - {found}:
            raise ValueError(
                f'space.kind = "{kind}" needs one quantisation for all, but model.client_quantisation is '
                f'{", ".join(others)} and model.quantisation is "{found}": leave model.client_quantisation empty'
            )

    def parts(self) -> list[tuple[type[Estimator] | type[Structure] | type[Rule], str]]:
        """What the method is made of, each with the key that names it."""
        method = self.method
        return [
            (ESTIMATORS[method.estimator], "estimator"),
            (STRUCTURES[method.structure], "structure"),
            (OPTIMIZERS[method.optimizer], "optimizer"),
            *([(Hybrid, "first_order")] if method.first_order else []),
            *([(OPTIMIZERS[method.first_order_optimizer], "first_order_optimizer")] if method.first_order else []),
        ]

    @property
    def step_forwards(self) -> float:
        """Forward passes over a batch that a client's step takes, on average over a run's steps."""
        total = 0.0
        for part, _ in self.parts():
            if issubclass(part, Estimator):
                total += part(self.settings()).forwards(self.method.queries)
            elif issubclass(part, Rule):
                total += part.forwards
        return total

    def settings(self) -> dict[str, Value]:
        """The keys of ``method`` that its parts read, by name."""
        names, values = sorted({name for part, _ in self.parts() for name in part.settings}), flatten(self)
        return {name: values[f"method.{name}"] for name in names}

    def for_client(self, number: int) -> "Config":
        """With a client's own base, where `model.client_quantisation` gives it one."""
        bases = self.model.client_quantisation
        return self.on_base(bases[number % len(bases)]) if bases else self

    def on_base(self, quantisation: Quantisation) -> "Config":
        """With another quantisation of the base."""
        return self.model_copy(update={"model": self.model.model_copy(update={"quantisation": quantisation})})

    def on_machine(self, source: str = "", device: str = "") -> "Config":
        """With another place of the base model, and another device, where they are given."""
        model = self.model.model_copy(update={"source": source or self.model.source})
        runtime = self.runtime.model_copy(update={"device": device or self.runtime.device})
        return self.model_copy(update={"model": model, "runtime": runtime})

    def with_learning_rate(self, rate: float) -> "Config":
        """With another learning rate."""
        return self.model_copy(update={"method": self.method.model_copy(update={"learning_rate": rate})})

    def with_noise(self, multiplier: float) -> "Config":
        """With a noise multiplier of its own."""
        return self.model_copy(update={"privacy": self.privacy.model_copy(update={"noise_multiplier": multiplier})})

    def resolved(self) -> "Config":
        """With the local directories and files that exist as absolute paths, so that any process finds them."""

        def absolute(text: str) -> str:
            return str(Path(text).resolve()) if text and Path(text).exists() else text

        model = self.model.model_copy(update={"source": absolute(self.model.source)})
        data = self.data.model_copy(update={"source": absolute(self.data.source)})
        files = {"mask": self.space.mask, "calibration": self.space.calibration}
        # A file that happens to be called "random" is given as "./random".
        space = self.space.model_copy(
            update={key: text if text in METHODS else absolute(text) for key, text in files.items()}
        )
        return self.model_copy(update={"model": model, "data": data, "space": space})

    def experiment(self) -> str:
        """SHA-256 over what decides the run besides its ledger header: task, data and preparation of the model.

        Paths are left out (they differ between machines): the header names base model, space and mask by their hashes.
        So is what may differ between clients: quantisation, compute dtype, the way of evaluation.
        """
        chosen = self.model_dump(
            include={
                "seed": True,
                "model": {"kind", "max_length", "head", "head_scale", "pooling"},
                "space": set(SpaceSection.model_fields) - _OF_THE_MASK - {"theta_dtype"},
                "task": True,
                "data": set(DataSection.model_fields) - {"source"},
            },
            mode="json",
        )
        text = json.dumps(chosen, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Config) -> dict[str, Scalar]:
    """The configuration as Flower's run-config: dotted keys, scalar values."""
    flat: dict[str, Scalar] = {}
    for key, value in config.model_dump(mode="json").items():
        fields = value.items() if isinstance(value, dict) else [(None, value)]
        for name, leaf in fields:
            joiner = "|" if (key, name) == ("task", "verbalizers") else ", "
            flat[key if name is None else f"{key}.{name}"] = joiner.join(leaf) if isinstance(leaf, list) else leaf
    return flat


_DEFAULTS = flatten(Config())
KEYS: tuple[str, ...] = tuple(_DEFAULTS)


def from_flat(flat: Mapping[str, Any], where: str = "the configuration") -> Config:
    """A checked configuration from dotted keys; those of the method that it names need not be given.

    Raises:
        ConfigError: an unknown key (the nearest valid one is offered) or an impossible value.
    """
    nested: dict[str, Any] = {}
    for key, value in with_method(flat).items():
        if key not in KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}. {nearest(key, KEYS)}")
        section, _, name = key.partition(".")
        if name:
            nested.setdefault(section, {})[name] = value
        else:
            nested[key] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        found = f" (found {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{message}{found}") from None


def from_run_config(flat: Mapping[str, Any]) -> Config:
    """A checked configuration from Flower's run-config, which has every key: of those that a named method gives, one at
    its default counts as not given.

    Raises:
        ConfigError: as `from_flat`.
    """
    given = {key: value for key, value in flat.items() if key != "out"}
    fixed = with_method({"method.name": given.get("method.name", "")})
    kept = {key: value for key, value in given.items() if key not in fixed or value != _DEFAULTS[key]}
    return from_flat(kept, "the run-config")


def _flat_toml(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat_toml(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` of the command line; the value is read as TOML, else taken as a string.

    A text's value needs no quotes, whatever it looks like: name=2024.
    """
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator:
        raise ConfigError(f"override {text!r} has no '='; wanted key=value, such as method.eps=1e-3")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key, value
    return key, value if isinstance(_DEFAULTS.get(key), str) and not isinstance(parsed, str | list) else parsed


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a TOML file (None: the defaults) with overrides.

    Relative paths of model, data and mask count from the working directory.

    Raises:
        ConfigError: no such file, no TOML, or what `from_flat` refuses.
    """
    flat: dict[str, Any] = {}
    if path is not None:
        try:
            flat = _flat_toml(tomllib.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            near = ", ".join(sorted(str(p) for p in path.parent.glob("*.toml"))) if path.parent.is_dir() else ""
            hint = f"; there are {near}" if near else ""
            raise ConfigError(f"no configuration file {path}{hint}") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from None
    flat |= dict(parse_override(text) for text in overrides)
    return from_flat(flat, str(path) if path else "the command line")


def to_toml(config: Config) -> str:
    """The configuration as TOML that `load_config` and Flower's --run-config read back."""
    lines: list[str] = []
    section = ""
    for key, value in flatten(config).items():
        head, _, name = key.partition(".")
        if name and head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines.append(f"{name or key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def describe() -> str:
    """Every key with its default and meaning, as TOML."""

    def line(key: str, name: str, field: FieldInfo) -> str:
        return f"{name} = {_toml_value(_DEFAULTS[key])}  # {field.description}"

    lines: list[str] = []
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += ["", f"# {section.__doc__}", f"[{name}]"]
            lines += [line(f"{name}.{key}", key, field) for key, field in section.model_fields.items()]
        else:
            lines.append(line(name, name, info))
    return "\n".join(lines)


def _toml_value(value: Scalar) -> str:
    # A JSON string is a TOML basic string but for DEL; floats such as 1e-05 are the same in both.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
