"""A configuration made concrete: base model, space, task, clients' data. Both engines and both sides start here."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo import spaces
from fedzo.config import Config
from fedzo.errors import ConfigError, DataError
from fedzo.evaluation import Evaluator, losses_from_scores
from fedzo.federation.artifact import artifact_name, pack_values
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.federation.worker import Worker
from fedzo.models import EncoderClassifier, LoadedModel, add_adapter, add_head, load_model
from fedzo.spaces import TrainableSpace
from fedzo.tasks import EncodedDataset, Example, Splits, Task, build_task, load_splits, metrics, partition


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


def prepare_model(config: Config, task_of: Callable[[LoadedModel], Task]) -> tuple[LoadedModel, Task]:
    """Base model with the head or adapter that the configuration asks for, and the task over its tokenizer."""
    section, space = config.model, config.space
    loaded = load_model(
        section.source, section.kind, device=choose_device(config.runtime.device), revision=section.revision or None
    )
    task = task_of(loaded)
    if section.kind == "encoder":
        if task.num_labels is None:
            raise ConfigError(f'task "{task.name}" has no fixed labels; model.kind = "encoder" needs them')
        texts = task.label_texts if section.head == "label-texts" else None
        loaded = add_head(
            loaded, task.num_labels, texts, scale=section.head_scale, pooling=section.pooling, seed=config.seed
        )  # fmt: skip
    if space.kind == "adapter":
        loaded = add_adapter(
            loaded, space.adapter, rank=space.rank, alpha=space.alpha, virtual_tokens=space.virtual_tokens,
            target_modules=space.targets, seed=config.seed,
        )  # fmt: skip
    return loaded, task


def build_space(config: Config, loaded: LoadedModel) -> TrainableSpace:
    """The trainable space of a prepared model."""
    section = config.space
    if section.kind == "full":
        return spaces.full(loaded.model, section.include, section.exclude)
    if section.kind == "adapter":
        return spaces.adapter(loaded.model)
    new = loaded.new_parameters
    if section.mask in spaces.METHODS:
        mask = spaces.draw_mask(
            loaded.model, section.density, section.mask, loaded.fingerprint, seed=config.seed,
            include=section.include, exclude=(*section.exclude, *new), per_tensor=section.per_tensor,
        )  # fmt: skip
    else:
        mask = spaces.Mask.load(Path(section.mask))
        mask.check(loaded.model, loaded.fingerprint)
    return spaces.sparse(loaded.model, mask, dense=new)


class Experiment:
    """Everything that a run needs besides its ledger. Parts are made when first used.

    Raises:
        ConfigError, DataError, ModelError, SpaceError: from whatever part cannot be made.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        self.loaded, self.task = prepare_model(config, self._task)
        self.space = build_space(config, self.loaded)
        self.evaluator = Evaluator(self.loaded.model, self.space)
        self._clients: dict[int, EncodedDataset] = {}

    def _task(self, loaded: LoadedModel) -> Task:
        section = self.config.task
        return build_task(
            section.name, loaded.kind, loaded.tokenizer, max_length=self.config.model.max_length,
            template=section.template, verbalizers=section.verbalizers,
        )  # fmt: skip

    @cached_property
    def splits(self) -> Splits:
        """Examples to train on, to select on and to report on."""
        section = self.config.data
        return load_splits(
            section.source, self.task.spec, train=section.train, validation=section.validation, test=section.test,
            validation_fraction=section.validation_fraction, seed=self.config.seed, limit=section.limit,
            validation_limit=self.config.evaluation.limit,
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

    def client_data(self, number: int) -> EncodedDataset:
        """The examples of a client, tokenised once."""
        if number not in self._clients:
            if not 0 <= number < len(self._parts):
                raise DataError(
                    f"client {number} has no data: the partition has the clients 0 to {len(self._parts) - 1}"
                )
            self._clients[number] = self._encode([self._train[i] for i in self._parts[number]])
        return self._clients[number]

    @cached_property
    def validation(self) -> EncodedDataset:
        return self._encode(self.task.prepare(self.splits.validation))

    @cached_property
    def test(self) -> EncodedDataset | None:
        return self._encode(self.task.prepare(self.splits.test)) if self.splits.test else None

    def theta0(self) -> Tensor:
        """theta before the first step, float32 [size], a new tensor each time."""
        return self.space.theta0(self.loaded.model)

    @cached_property
    def theta0_digest(self) -> str:
        return theta_digest(self.theta0()).hex()

    @cached_property
    def initial(self) -> bytes:
        """The initial values that the base model does not have (head, adapters); b"" when there are none."""
        new = set(self.loaded.new_parameters)
        ranges = [(s.offset, s.size) for s in self.space.segments if s.name in new]
        return pack_values(self.theta0(), ranges) if ranges else b""

    def spec(self) -> RunSpec:
        """The header of this experiment's ledger."""
        config, method, federation = self.config, self.config.method, self.config.federation
        return RunSpec(
            protocol=PROTOCOL,
            fingerprint=self.loaded.fingerprint,
            parameters=sum(p.numel() for p in self.loaded.model.parameters()),
            space=self.space.kind,
            space_hash=self.space.hash,
            size=self.space.size,
            theta_dtype="float32",
            theta0=self.theta0_digest,
            initial=artifact_name(self.initial) if self.initial else "",
            family=method.directions,
            estimator=method.estimator,
            eps=method.eps,
            queries=method.queries,
            batch_size=method.batch_size,
            optimizer=method.optimizer,
            learning_rate=method.learning_rate,
            schedule=method.schedule,
            warmup_steps=method.warmup_steps,
            rounds=federation.rounds,
            local_steps=federation.local_steps,
            seed=config.seed,
            seeds=federation.seeds,
            pool_size=federation.pool_size,
            clients=len(self._parts),
            clients_per_round=federation.clients_per_round,
            client_rate=federation.client_rate,
            aggregation=federation.aggregation,
            trim=federation.trim,
            quorum=federation.quorum,
            scalar_bound=federation.scalar_bound,
            digest_every=federation.digest_every,
            experiment=config.experiment(),
        )

    def replica(self, spec: RunSpec) -> Replica:
        return Replica(spec, self.theta0)

    def worker(self, number: int, replica: Replica) -> Worker:
        """The worker of a client over this process's model."""
        return Worker(
            number, replica, self.client_data(number), self.loaded.fingerprint, self.space.hash, self.theta0_digest
        )  # fmt: skip

    def evaluate(self, theta: Tensor, data: EncodedDataset) -> dict[str, float]:
        """Metrics of the model at theta: mean loss, and accuracy and macro-F1 (language modelling: perplexity)."""
        order = data.by_length(self.config.evaluation.batch_size)
        batches = [data.batch(chosen) for chosen in order]
        scores = [self.evaluator.scores(theta, batch) for batch in batches]
        losses = torch.cat([losses_from_scores(s, b.labels) for s, b in zip(scores, batches, strict=True)])
        if self.task.num_labels is None:
            tokens = torch.cat([metrics.scored_tokens(batch)[:, 0] for batch in batches])
            return {"loss": metrics.mean_loss(losses, tokens), "perplexity": metrics.perplexity(losses, tokens)}
        labels, width = torch.from_numpy(data.labels[np.concatenate(order)]), max(s.shape[1] for s in scores)
        padded = [torch.nn.functional.pad(s, (0, width - s.shape[1]), value=-torch.inf) for s in scores]
        table = torch.cat(padded)
        return {
            "loss": metrics.mean_loss(losses),
            "accuracy": metrics.accuracy(table, labels),
            "macro_f1": metrics.macro_f1(table, labels),
        }
