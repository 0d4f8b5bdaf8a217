"""A configuration made concrete: base model, space, task, clients' data. Both engines and both sides start here."""

import hashlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo import spaces
from fedzo.config import Config, Quantisation
from fedzo.errors import ConfigError, DataError, LedgerError, SpaceError
from fedzo.estimators import ESTIMATORS
from fedzo.evaluation import Batch, Evaluator, losses_from_scores
from fedzo.evaluation.generation import generate
from fedzo.federation.artifact import artifact_name, pack_values
from fedzo.federation.ledger import Ledger
from fedzo.federation.randomness import choose, derive
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.federation.worker import Data, Worker
from fedzo.models import EncoderClassifier, LoadedModel, add_adapter, add_head, load_model, prefix_activations
from fedzo.optimizers import OPTIMIZERS, Schedule
from fedzo.privacy.account import Account, Budget, budget_file
from fedzo.privacy.sanitiser import Sanitiser
from fedzo.privacy.terms import LOCAL_MODES, Terms
from fedzo.privacy_plan import make_terms
from fedzo.quantisation import COMPUTE_DTYPES, quantise
from fedzo.sensitivity import forward_mask, sensitive_mask, text_batches
from fedzo.spaces import Mask, TrainableSpace
from fedzo.spaces.space import shape_of
from fedzo.spaces.sparse import DRAWN
from fedzo.step_size import LEAST_EXAMPLES, MOST_EXAMPLES, Probe, Steps, StepSize, pick, probe
from fedzo.structures import Layout
from fedzo.tasks import (
    OWN,
    EncodedDataset,
    Example,
    Reading,
    Splits,
    Task,
    build_task,
    load_file,
    load_splits,
    metrics,
    partition,
)


def choose_device(name: str) -> str:
    """ "auto" is CUDA where there is one.

    Raises:
        ConfigError: a CUDA device is asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch finds no CUDA device; set runtime.device = "cpu"')
    if name != "cpu" and not name.startswith("cuda"):
        raise ConfigError(f'runtime.device is "{name}"; wanted "auto", "cpu" or "cuda"')
    return name


def load_base(
    config: Config, task_of: Callable[[LoadedModel], Task], dtype: torch.dtype | None
) -> tuple[LoadedModel, Task]:
    """The unquantised base model on the CPU, an encoder with its head, and the task over its tokenizer."""
    section = config.model
    loaded = load_model(section.source, section.kind, revision=section.revision or None, dtype=dtype)
    task = task_of(loaded)
    if section.kind == "encoder":
        if task.num_labels is None:
            raise ConfigError(f'task "{task.name}" has no fixed labels; model.kind = "encoder" needs them')
        texts = task.label_texts if section.head == "label-texts" else None
        loaded = add_head(
            loaded, task.num_labels, texts, scale=section.head_scale, pooling=section.pooling, seed=config.seed
        )  # fmt: skip
    return loaded, task


def prepare(config: Config, loaded: LoadedModel, mask: Mask | None) -> tuple[LoadedModel, TrainableSpace]:
    """Quantises a base model, puts the adapter on it and moves it to its device; its trainable space.

    The initial values of theta come from the unquantised base, whatever this party's base is, but for spaces of scales
    or codes. A bfloat16 theta becomes the model's own weights (`TrainableSpace.adopt`).

    Raises:
        SpaceError: the mask or the patterns do not fit the model, or a full space holds a quantised weight.
    """
    section, space, device = config.model, config.space, choose_device(config.runtime.device)
    if mask is not None:
        mask.check(loaded.model, loaded.fingerprint)
    exact: dict[str, Tensor] = {}
    own: tuple[str, ...] = ()
    if space.theta_dtype == "bfloat16":
        whole = spaces.full(loaded.model, space.include, space.exclude)
        whole.adopt(loaded.model, torch.bfloat16, device)
        own = tuple(segment.name for segment in whole.segments)
    elif space.kind == "full" and section.compute_dtype != "float32":
        names = {s.name for s in spaces.full(loaded.model, space.include, space.exclude).segments}
        exact = {name: p.detach().float().clone() for name, p in loaded.model.named_parameters() if name in names}
    masked = {entry.name: entry.indices for entry in mask.entries} if mask is not None else {}
    compute = COMPUTE_DTYPES[section.compute_dtype]
    prefix = None
    if (space.kind, space.adapter, space.prefix_init) == ("adapter", "prefix", "activations"):
        prefix = prefix_activations(loaded, space.virtual_tokens, config.seed)
    if space.kind in ("scales", "codes"):
        # On the CPU whatever the device: theta0 is what quantising gives, and has the same bits everywhere.
        quantise(loaded.model, section.quantisation, compute_dtype=compute, double=False)
        over = spaces.scales if space.kind == "scales" else spaces.codes
        built = over(loaded.model, space.include, space.exclude, loaded.new_parameters)
        loaded.model.to(device)
        return loaded, built
    quantise(loaded.model, section.quantisation, compute_dtype=compute, masked=masked, kept=own, device=device)
    if space.kind == "adapter":
        loaded = add_adapter(
            loaded, space.adapter, rank=space.rank, alpha=space.alpha, virtual_tokens=space.virtual_tokens,
            target_modules=space.targets, seed=config.seed, prefix=prefix,
        )  # fmt: skip
        loaded.model.to(device)
        return loaded, spaces.adapter(loaded.model)
    if mask is not None:
        return loaded, spaces.sparse(loaded.model, mask, dense=loaded.new_parameters)
    built = spaces.full(loaded.model, space.include, space.exclude)
    if exact:
        segments = tuple(replace(s, values=exact[s.name].reshape(-1)) for s in built.segments)
        built = replace(built, segments=segments)
    return loaded, built


def check_terms(config: Config, ledger: Ledger) -> None:
    """Checks that a configuration promises what a run was begun with: what was released cannot be taken back.

    What follows from the keys (rate, releases, grid) is not compared; nor is noise that is to be calibrated.

    Raises:
        LedgerError: it does not; the message names the key, not what changing it does to others.
    """
    privacy, spec, terms = config.privacy, ledger.spec, ledger.spec.terms
    if terms is None or privacy.mode == "none":
        pairs: list[tuple[str, object, object]] = [("privacy.mode", privacy.mode, terms.mode if terms else "none")]
    else:
        apart = {"noise_multiplier": not privacy.noise_multiplier, "sampling": not terms.of_examples}
        pairs = [
            (f"privacy.{name}", given, getattr(terms, name))
            for name, given in privacy
            if hasattr(terms, name) and not apart.get(name)
        ]
        if privacy.sampling_rate:
            pairs.append(("privacy.sampling_rate", privacy.sampling_rate, terms.rate))
        pairs += [
            ("method.batch_size", config.method.batch_size, spec.batch_size),
            ("method.queries", config.method.queries, spec.queries),
            ("federation.rounds", config.federation.rounds, spec.rounds),
            ("federation.local_steps", config.federation.local_steps, spec.local_steps),
        ]
    for key, given, own in pairs:
        if given != own:
            raise LedgerError(
                f"{ledger.path} was begun with other privacy terms: its {key} is {own!r}, config.toml gives {given!r}. "
                "Set it back to go on, or start a run in another folder, whose budget is apart from this one's"
            )


def open_experiment(config: Config, ledger: Ledger) -> "Experiment":
    """The experiment of a ledger: mask, learning rate and noise are those that it keeps, and never made again.

    Raises:
        LedgerError: the mask in the ledger is damaged, or the configuration has other privacy terms.
    """
    if config.method.learning_rate == "auto":
        config = config.with_learning_rate(ledger.spec.learning_rate)
    check_terms(config, ledger)
    if ledger.spec.terms is not None:
        config = config.with_noise(config.privacy.noise_multiplier or ledger.spec.terms.noise_multiplier)
    if not ledger.spec.mask:
        return Experiment(config)
    return Experiment(config, Mask.from_bytes(ledger.artifact(ledger.spec.mask), f"the mask in {ledger.path}"))


class _Later:
    """A client's examples, tokenised when a batch of them is first asked for.

    Args:
        count: of examples.
        load: tokenises them; called at every batch.
    """

    def __init__(self, count: int, load: Callable[[], EncodedDataset]) -> None:
        self._count, self._load = count, load

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        return self._load().batch(indices)


class Experiment:
    """Everything that a run needs besides its ledger. Parts are made when first used.

    Args:
        mask: the run's mask, for a sparse space; None: it is made, or read from the file that the configuration names.

    Raises:
        ConfigError, DataError, ModelError, SpaceError: from whatever part cannot be made.
    """

    def __init__(self, config: Config, mask: Mask | None = None) -> None:
        self.config = config
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        calibrated = config.space.kind == "sparse" and mask is None and config.space.mask not in DRAWN
        lean = not calibrated and (config.model.quantisation != "none" or config.space.theta_dtype == "bfloat16")
        base, self.task = load_base(config, self._task, None if lean else torch.float32)
        self.mask = self._choose_mask(base, mask) if config.space.kind == "sparse" else None
        self.loaded, self.space = prepare(config, base, self.mask)
        self.evaluator = Evaluator(
            self.loaded.model, self.space, config.runtime.evaluation, COMPUTE_DTYPES[config.model.compute_dtype]
        )  # fmt: skip
        self._clients: dict[int, EncodedDataset] = {}
        self._given: dict[int, Path] = {}  # clients' own files
        self._weights = self.space.bound(self.loaded.model) if config.space.theta_dtype == "bfloat16" else None
        self._terms: tuple[Config, Terms] | None = None
        self._moved = False
        self._mover: Callable[[], Replica | None] = lambda: None  # the replica that moves these weights

    def on_base(self, quantisation: Quantisation) -> "Experiment":
        """The same experiment over another quantisation of the base; mask, splits and partition are shared."""
        if quantisation == self.config.model.quantisation:
            return self
        other = Experiment(self.config.on_base(quantisation), self.mask)
        other._given = self._given
        if self.config.data.partition != OWN:
            other.splits, other._train, other._parts = self.splits, self._train, self._parts
        if self._frozen_encoder is None:
            other._clients = self._clients
        return other

    def _choose_mask(self, base: LoadedModel, given: Mask | None) -> Mask:
        """The given mask, the one of a file, or a new one of the unquantised base.

        Raises:
            SpaceError: the configuration names a file that holds another mask than the given one.
        """
        section = self.config.space
        if section.mask not in spaces.METHODS:
            if given is not None and not Path(section.mask).exists():
                return given  # a run's configuration may name a file of another machine
            named = Mask.load(section.mask)
            if given is not None and named.hash != given.hash:
                raise SpaceError(
                    f"mask file {section.mask} holds the mask {named.hash[:12]}, the run's is {given.hash[:12]}: set "
                    f'space.mask to the run\'s own, or to "{given.method}"'
                )
            return named
        if given is not None:
            return given
        chosen: dict[str, Any] = {
            "include": section.include,
            "exclude": (*section.exclude, *base.new_parameters),
            "per_tensor": section.per_tensor,
        }
        seed, model = self.config.seed, base.model
        if section.mask in DRAWN:
            return spaces.draw_mask(model, section.density, section.mask, base.fingerprint, seed=seed, **chosen)
        batches, calibration = self._calibration(base)
        model.to(choose_device(self.config.runtime.device))
        if section.mask == "forward":
            chosen["seed"] = seed
        make = forward_mask if section.mask == "forward" else sensitive_mask
        return make(model, batches, section.density, base.fingerprint, settings=calibration, **chosen)

    def _calibration(self, base: LoadedModel) -> tuple[list[Batch], dict[str, Any]]:
        """What a mask is made from: blocks of a text, or training examples that the seed chooses."""
        section, seed = self.config.space, self.config.seed
        if section.calibration:
            path = Path(section.calibration)
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"calibration text {path} cannot be read: {error}") from None
            length, examples = self.config.model.max_length, section.calibration_examples
            batches = text_batches(base, text, length=length, examples=examples, seed=seed)
            digest = hashlib.sha256(text.encode()).hexdigest()
            return batches, {"text": digest, "examples": examples, "length": length, "calibration_seed": seed}
        chosen = choose(derive(seed, "calibration"), len(self._train), section.calibration_examples)
        data = EncodedDataset(self.task, [self._train[i] for i in chosen])
        return [data.batch([i]) for i in range(len(data))], {
            "task": self.task.name, "examples": len(data), "calibration_seed": seed
        }  # fmt: skip

    def _task(self, loaded: LoadedModel) -> Task:
        section = self.config.task
        task = build_task(
            section.name, loaded.kind, loaded.tokenizer, max_length=self.config.model.max_length,
            template=section.template, verbalizers=section.verbalizers,
        )  # fmt: skip
        if task.spec.form == "answer":
            task.prompts([], self.config.evaluation.max_new_tokens)  # is there room?
        return task

    @cached_property
    def splits(self) -> Splits:
        """Examples to train on, to select on and to report on."""
        section = self.config.data
        return load_splits(
            section.source, self.task.spec, train="" if section.partition == OWN else section.train,
            validation=section.validation, test=section.test,
            validation_fraction=section.validation_fraction, seed=self.config.seed, limit=section.limit,
            validation_limit=self.config.evaluation.limit, shots=section.shots,
        )  # fmt: skip

    @cached_property
    def _train(self) -> list[Example]:
        return self.task.prepare(self.splits.train, self.config.data.column)

    @cached_property
    def _parts(self) -> list[npt.NDArray[np.int64]]:
        section = self.config.data
        if self.task.num_labels is None and section.partition in ("dirichlet", "pathological") and not section.column:
            raise ConfigError(
                f'data.partition is "{section.partition}", which spreads labels, but task "{self.task.name}" has none; '
                'set data.partition = "iid", or "natural" with data.column'
            )
        return partition(
            self._train, section.clients, kind=section.partition, alpha=section.alpha, column=section.column,
            seed=self.config.seed,
        )  # fmt: skip

    @property
    def _frozen_encoder(self) -> EncoderClassifier | None:
        """The encoder, when theta has no part of it: then its features are computed once for each example."""
        model = self.loaded.model
        if isinstance(model, EncoderClassifier) and all(s.name.startswith("head.") for s in self.space.segments):
            return model
        return None

    def _encode(self, examples: list[Example]) -> EncodedDataset:
        data = EncodedDataset(self.task, examples)
        encoder = self._frozen_encoder
        if encoder is None:
            return data
        device = next(encoder.parameters()).device
        features = torch.empty(len(data), encoder.head.in_features)
        with torch.no_grad():
            for chosen in data.by_length(self.config.evaluation.batch_size):
                features[torch.from_numpy(chosen)] = encoder.features(**data.batch(chosen).to(device).inputs).cpu()
        return data.with_features(features)

    def give(self, number: int, path: Path) -> None:
        """Has a client train on all examples of a file of its own, instead of its part of the run's data."""
        if self._given.get(number) != path:
            self._given[number] = path
            self._clients.pop(number, None)

    def client_data(self, number: int) -> EncodedDataset:
        """The examples of a client, tokenised once.

        Raises:
            DataError: it has none, or they cannot be read.
        """
        if number not in self._clients:
            self._clients[number] = self._encode(self._examples(number))
        return self._clients[number]

    def _examples(self, number: int) -> list[Example]:
        section = self.config.data
        if not 0 <= number < section.clients:
            raise DataError(f"client {number} has no data: the run has the clients 0 to {section.clients - 1}")
        if number in self._given:
            return self.task.prepare(load_file(self._given[number], self.task.spec), section.column)
        if section.partition == OWN:
            raise DataError(
                f'client {number} has no data: with data.partition = "{OWN}" its node names its own file, with '
                "--node-config 'data=\"FILE\"'; in one process choose another partition"
            )
        return [self._train[i] for i in self._parts[number]]

    @cached_property
    def validation(self) -> EncodedDataset:
        return self._encode(self.task.prepare(self.splits.validation))

    @cached_property
    def test(self) -> EncodedDataset | None:
        return self._encode(self.task.prepare(self.splits.test)) if self.splits.test else None

    def theta0(self) -> Tensor:
        """theta before the first step, [size], a new tensor each time.

        A bfloat16 theta is the model's weights, and there is only this one: where a replica has moved them, their first
        values are read from the checkpoint again (in the host's memory, next to the weights), and the replica is lost.
        """
        if self._weights is None:
            return self.space.theta0(self.loaded.model, COMPUTE_DTYPES[self.config.space.theta_dtype])
        if (mover := self._mover()) is not None:
            mover.theta = mover.theta[:0]  # what still uses it fails loudly
        if self._moved:
            base, _ = load_base(self.config, self._task, None)
            self._weights.copy_(self.space.adopt(base.model, torch.bfloat16))
            self._moved = False
        return self._weights

    @cached_property
    def theta0_digest(self) -> str:
        return theta_digest(self.theta0()).hex()

    @cached_property
    def initial(self) -> bytes:
        """The initial values that the base model does not have (head, adapters); b"" when there are none."""
        new = set(self.loaded.new_parameters)
        ranges = [(s.offset, s.size) for s in self.space.segments if s.name in new]
        return pack_values(self.theta0(), ranges) if ranges else b""

    @cached_property
    def artifacts(self) -> dict[str, bytes]:
        """What the ledger keeps besides the records, by SHA-256: initial values, mask."""
        kept = [self.initial] if self.initial else []
        kept += [self.mask.to_bytes()] if self.mask is not None else []
        return {artifact_name(data): data for data in kept}

    @property
    def step_size(self) -> StepSize:
        """The learning rate that "auto" stands for.

        Raises:
            RunError: as `step_size.probe`.
        """
        estimator, optimizer = ESTIMATORS[self.config.method.estimator], OPTIMIZERS[self.config.method.optimizer]
        rule = self.spec(1.0).build_rule(Layout.of(self.space))
        return pick(self.probe, self._steps, estimator, rule, optimizer.normalised)

    @cached_property
    def probe(self) -> Probe:
        """The loss around theta0 along the run's first directions, of the validation data, which is the server's.

        Raises:
            RunError: as `step_size.probe`.
        """
        method, steps = self.config.method, self._steps
        rule, theta, data = self.spec(1.0).build_rule(Layout.of(self.space)), self.theta0(), self.validation
        state = rule.init(theta)
        count = min(max(steps.examples, LEAST_EXAMPLES), MOST_EXAMPLES)
        chosen = choose(derive(self.config.seed, "probe"), len(data), count)
        return probe(
            self.evaluator.answer, theta,
            [data.batch(chosen[i : i + method.batch_size]) for i in range(0, len(chosen), method.batch_size)],
            lambda step: rule.directions(step, theta, state),
            eps=method.eps, count=steps.directions, seed=self.config.seed,
        )  # fmt: skip

    @property
    def _steps(self) -> Steps:
        method, federation = self.config.method, self.config.federation
        asked = federation.clients_per_round or max(
            1, round(self.config.data.clients * (federation.client_rate or 1.0))
        )
        together, apart = (asked, 1) if federation.seeds == "shared" else (1, asked)
        total = federation.rounds * federation.local_steps
        shares = map(Schedule(method.schedule, 1.0, total, method.warmup_steps), range(total))
        return Steps(
            method.queries * apart,
            method.batch_size * together,
            method.batch_size,
            sum(share**2 for share in shares),
            self._noise_variance / (together if self.config.privacy.mode in LOCAL_MODES else 1),
        )

    @property
    def _noise_variance(self) -> float:
        """Of the privacy noise in a scalar of one release."""
        method, federation = self.config.method, self.config.federation
        if self.terms is None:
            return 0.0
        width = ESTIMATORS[method.estimator].scalars * method.queries
        return (
            Sanitiser(self.terms, federation.local_steps, width, method.batch_size, self.config.data.clients).error ** 2
        )

    def spec(self, learning_rate: float | None = None) -> RunSpec:
        """The header of this experiment's ledger.

        Args:
            learning_rate: None: the configuration's, or what a probe finds where that is "auto".

        Raises:
            SpaceError: the method names a part of theta that the space does not have.
            RunError: as `step_size`.
        """
        config, method, federation = self.config, self.config.method, self.config.federation
        _ = self.splits if config.data.partition == OWN else self._parts  # a mistake in the data is found here
        if learning_rate is None:
            rate = method.learning_rate
            learning_rate = self.step_size.learning_rate if rate == "auto" else rate
        spec = RunSpec(
            protocol=PROTOCOL,
            fingerprint=self.loaded.fingerprint,
            parameters=sum(math.prod(shape_of(p)) for p in self.loaded.model.parameters()),
            space=self.space.kind,
            space_hash=self.space.hash,
            size=self.space.size,
            theta_dtype=config.space.theta_dtype,
            theta0=self.theta0_digest,
            initial=artifact_name(self.initial) if self.initial else "",
            mask=self.mask.hash if self.mask is not None else "",
            family=method.directions,
            estimator=method.estimator,
            eps=method.eps,
            queries=method.queries,
            batch_size=method.batch_size,
            optimizer=method.optimizer,
            learning_rate=learning_rate,
            schedule=method.schedule,
            warmup_steps=method.warmup_steps,
            rounds=federation.rounds,
            local_steps=federation.local_steps,
            seed=config.seed,
            seeds=federation.seeds,
            pool_size=federation.pool_size,
            clients=config.data.clients,
            clients_per_round=federation.clients_per_round,
            client_rate=federation.client_rate,
            aggregation=federation.aggregation,
            trim=federation.trim,
            quorum=federation.quorum,
            scalar_bound=federation.scalar_bound,
            digest_every=federation.digest_every,
            experiment=config.experiment(),
            clip=method.clip,
            structure=method.structure,
            settings=config.settings(),
            privacy={} if self.terms is None else self.terms.to_header(),
            norm_bound=federation.norm_bound,
        )
        spec.build_rule(Layout.of(self.space))  # refuses what does not fit the space
        return spec

    @property
    def terms(self) -> Terms | None:
        """What a private run promises; None: it is not private. With the noise that its budget needs, and a nonce that
        is new with each configuration.

        Raises:
            ConfigError: a library for privacy is missing, delta is above 1 over the examples of a client, or no noise
                (or no grid) serves.
        """
        config = self.config
        if config.privacy.mode == "none":
            return None
        if self._terms is None or self._terms[0] is not config:
            scalars = ESTIMATORS[config.method.estimator].scalars
            sizes = [] if config.data.partition == OWN else [len(part) for part in self._parts]
            self._terms = config, make_terms(config, sizes, scalars)
        return self._terms[1]

    def _account(self, number: int, examples: int, spec: RunSpec, folder: Path | None) -> Account | None:
        """A client's own budget, kept below a folder of its machine; None: the server keeps the run's.

        Raises:
            RunError: the budget that is there cannot be read.
        """
        terms, sanitiser = spec.terms, spec.sanitiser
        if folder is None or terms is None or sanitiser is None or terms.secret:
            return None
        rate = min(1.0, spec.batch_size / max(1, examples)) if terms.of_examples else None
        release = terms.release(sanitiser.coordinates, rate, units=examples)
        return Account(budget_file(folder, spec.run_id, number), spec.run_id, Budget(terms, release))

    def replica(self, spec: RunSpec) -> Replica:
        """A replica at theta0. Of a bfloat16 theta one can be used at a time: a new one takes the weights over."""
        if self._weights is None:
            return Replica(spec, self.theta0, Layout.of(self.space))
        _ = self.theta0_digest, self.initial  # while the weights are at theta0
        replica = Replica(spec, self._weights_to_move, Layout.of(self.space))
        self._mover = weakref.ref(replica)
        return replica

    def _weights_to_move(self) -> Tensor:
        weights, self._moved = self.theta0(), True
        return weights

    def worker(self, number: int, replica: Replica, budgets: Path | None = None, *, later: bool = False) -> Worker:
        """The worker of a client over this process's model.

        Args:
            budgets: the folder of its machine in which a client keeps count of what it releases in a private run.
            later: its examples are tokenised when it is first asked for a round, not now.
        """
        data: Data
        if later:
            data = _Later(len(self._examples(number)), partial(self.client_data, number))
        else:
            data = self.client_data(number)
        return Worker(
            number, replica, data, fingerprint=self.loaded.fingerprint,
            mask=self.mask.hash if self.mask is not None else "", space_hash=self.space.hash,
            theta0=self.theta0_digest, theta_dtype=self.config.space.theta_dtype,
            quantisation=self.config.model.quantisation, compute_dtype=self.config.model.compute_dtype,
            account=self._account(number, len(data), replica.spec, budgets),
        )  # fmt: skip

    def evaluate(self, theta: Tensor, data: EncodedDataset) -> dict[str, float]:
        """Metrics of the model at theta: mean loss, and what the task is judged by.

        For language modelling perplexity; for generated answers F1 and exact match, each the best over the references;
        else accuracy, and for fixed classes or positions macro-F1.
        """
        order = data.by_length(self.config.evaluation.batch_size)
        batches = [data.batch(chosen) for chosen in order]
        scores = [self.evaluator.scores(theta, batch) for batch in batches]
        losses = torch.cat([losses_from_scores(s, b.labels) for s, b in zip(scores, batches, strict=True)])
        spec, items = self.task.spec, [data.items[i] for i in np.concatenate(order)]
        if spec.form == "answer":
            return {"loss": metrics.mean_loss(losses), **self._answered(theta, items)}
        if spec.form == "text":
            tokens = torch.cat([metrics.scored_tokens(batch)[:, 0] for batch in batches])
            return {"loss": metrics.mean_loss(losses, tokens), "perplexity": metrics.perplexity(losses, tokens)}
        width = max(s.shape[1] for s in scores)
        table = torch.cat([torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-torch.inf) for s in scores])
        labels = metrics.credited(metrics.predictions(table), [spec.right(item) for item in items])
        figures = {"loss": metrics.mean_loss(losses), "accuracy": metrics.accuracy(table, labels)}
        return figures | ({"macro_f1": metrics.macro_f1(table, labels)} if spec.classes else {})

    def _answered(self, theta: Tensor, items: Sequence[Example]) -> dict[str, float]:
        """F1 and exact match of the answers that the model at theta generates."""
        spec, section = self.task.spec, self.config.evaluation
        assert isinstance(spec, Reading)
        prompts = self.task.prompts(items, section.max_new_tokens)
        with self.evaluator.at(theta) as model:
            answers = generate(
                model, self.task.tokenizer, prompts, max_new_tokens=section.max_new_tokens,
                batch_size=section.batch_size,
            )  # fmt: skip
        pairs = [(answer, spec.references(item)) for answer, item in zip(answers, items, strict=True)]
        f1, exact = (fmean(score(*pair) for pair in pairs) for score in (metrics.token_f1, metrics.exact_match))
        return {"f1": f1, "exact_match": exact}
