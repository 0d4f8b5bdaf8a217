"""A tiny federated run for tests: real coordinator, ledger, replicas and workers on least squares.

The "model" is 1/2 (x . theta - y)^2, computed from theta here; every plan and answer crosses as bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.evaluation import Batch, GradientRequest, LossRequest, Request
from fedzo.federation.artifact import artifact_name, pack_values
from fedzo.federation.coordinator import Coordinator, RoundSummary
from fedzo.federation.ledger import Ledger, LedgerRound
from fedzo.federation.messages import Plan, decode
from fedzo.federation.replica import Replica, theta_digest
from fedzo.federation.spec import PROTOCOL, RunSpec
from fedzo.federation.worker import Worker
from fedzo.privacy.account import Account, Budget
from fedzo.privacy.mechanisms import LEVELS
from fedzo.privacy.terms import Terms
from fedzo.spaces import Segment
from fedzo.structures import Layout

SIZE = 12
Load = Callable[[], Tensor]
# (round, client, answer) -> the answers that arrive instead.
Tamper = Callable[[int, int, bytes], Iterable[bytes]]


def theta0(size: int = SIZE) -> Tensor:
    """theta before the first step, float32 [size]."""
    return torch.from_numpy(np.random.default_rng(3).normal(size=size).astype(np.float32))


def make_spec(**changes: Any) -> RunSpec:
    """A run of 6 rounds with 4 clients; theta0 and learning rate follow the size."""
    size = changes.get("size", SIZE)
    values: dict[str, Any] = {
        "protocol": PROTOCOL, "fingerprint": "f" * 64, "parameters": size, "space": "full", "space_hash": "5" * 64,
        "size": size, "theta_dtype": "float32", "theta0": theta_digest(theta0(size)).hex(), "initial": "", "mask": "",
        "family": "rademacher", "estimator": "two-point", "eps": 1e-2, "queries": 3, "batch_size": 5,
        "optimizer": "sgd", "learning_rate": 0.24 / size, "schedule": "cosine", "warmup_steps": 1, "rounds": 6,
        "local_steps": 1, "seed": 7, "seeds": "shared", "pool_size": 16, "clients": 4, "clients_per_round": 0,
        "client_rate": 0.0, "aggregation": "mean", "trim": 0.25, "quorum": 1, "scalar_bound": 1e4, "digest_every": 1,
        "experiment": "e" * 64,
    }  # fmt: skip
    return RunSpec(**{**values, **changes})


def make_terms(mode: str, **changes: Any) -> Terms:
    """Terms with a budget that outlasts any test."""
    values: dict[str, Any] = {
        "mode": mode, "mechanism": "gaussian", "epsilon": 1e4, "delta": 1e-3, "noise_multiplier": 1.0, "clip": 2.0,
        "clipping": "fixed", "quantile": 0.5, "clip_rate": 0.2, "clip_share": 0.05,
        "sampling": "poisson" if mode == "example-local" else "none", "rate": 1.0, "releases": 6, "tolerance": 0,
        "asked": 4 if mode == "client-secagg" else 0, "levels": LEVELS, "nonce": "0" * 16,
    }  # fmt: skip
    return Terms(**{**values, **changes})


def private_spec(terms: Terms, **changes: Any) -> RunSpec:
    """As `make_spec`, under these terms."""
    return make_spec(**{"privacy": terms.to_header(), **changes})


def initial_values(size: int = SIZE) -> bytes:
    """The last four entries of theta0, as an artifact."""
    return pack_values(theta0(size), [(size - 4, 4)])


def other_theta0(size: int = SIZE) -> Tensor:
    """theta0 of a party whose last four entries were drawn anew."""
    theta = theta0(size)
    theta[-4:] += 1.0
    return theta


class Rows:
    """A client's examples: x [n, size] and y [n], with different n for different clients unless it is given."""

    def __init__(self, client: int, size: int = SIZE, count: int | None = None) -> None:
        rng = np.random.default_rng(100 + client)
        self.x = torch.from_numpy(rng.normal(size=(8 + client if count is None else count, size)).astype(np.float32))
        self.y = self.x.sum(1) / 2.0

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        rows = torch.from_numpy(indices)
        return Batch({"x": self.x[rows], "y": self.y[rows]}, torch.zeros(len(rows), dtype=torch.int64), None)


def losses(request: LossRequest) -> Tensor:
    """float32 at theta + a z, in the shape that `LossRequest` states."""

    def at(point: Tensor) -> Tensor:
        return 0.5 * ((request.batch.inputs["x"] * point).sum(1) - request.batch.inputs["y"]) ** 2

    rows = [at(request.theta)] if request.origin else []
    for seed in request.seeds:
        for a in request.offsets:
            rows.append(at(request.directions.axpy(request.theta, seed, a, out=torch.empty_like(request.theta))))
    found = torch.stack(rows)
    return found if request.origin else found.view(len(request.seeds), len(request.offsets), -1)


def gradient(request: GradientRequest) -> Tensor:
    """float32 [B + F]: the losses at theta, and their mean's gradient with respect to the ranges."""
    x, residual = request.batch.inputs["x"], request.batch.inputs["x"] @ request.theta - request.batch.inputs["y"]
    whole = (residual[:, None] * x).mean(0)
    return torch.cat([0.5 * residual**2, *(whole[offset : offset + length] for offset, length in request.ranges)])


def respond(request: Request) -> Tensor:
    """The answer to any request that least squares can answer."""
    if isinstance(request, GradientRequest):
        return gradient(request)
    assert isinstance(request, LossRequest)
    return losses(request)


def mean_loss(theta: Tensor, clients: int = 4) -> float:
    """Over all examples of the first clients."""
    sets = [Rows(client, theta.numel()) for client in range(clients)]
    x, y = torch.cat([s.x for s in sets]), torch.cat([s.y for s in sets])
    return float((0.5 * (x @ theta - y) ** 2).mean())


def answer(worker: Worker, plan: bytes, evaluate: Callable[[Any], Tensor] = respond) -> bytes:
    """What a worker answers to a plan; what `evaluate` raises is thrown into it, as the engine does."""
    message = decode(plan)
    assert isinstance(message, Plan)
    steps = worker.round(message)
    try:
        request = next(steps)
        while True:
            try:
                found = evaluate(request)
            except Exception as error:
                request = steps.throw(error)
            else:
                request = steps.send(found)
    except StopIteration as stop:
        return bytes(stop.value.to_bytes())


def layout(size: int = SIZE) -> Layout:
    """Of theta: a layer that is a matrix, one that is a vector, and the last four entries, the head."""
    cut = (size - 4) // 4 * 2
    layers = Segment("layers.0", (cut // 2, 2), 0, cut), Segment("layers.1", (size - 4 - cut,), cut, size - 4 - cut)
    return Layout((*layers, Segment("head", (4,), size - 4, 4)))


def make_replica(spec: RunSpec, load: Load | None = None) -> Replica:
    """A replica at theta0; `load` makes it."""
    return Replica(spec, load or (lambda: theta0(spec.size)), layout(spec.size))


def make_account(spec: RunSpec, client: int, folder: Path, examples: int) -> Account | None:
    """A client's own budget, which a private run has unless the server keeps it."""
    terms, sanitiser = spec.terms, spec.sanitiser
    if terms is None or sanitiser is None or terms.secret:
        return None
    rate = min(1.0, spec.batch_size / max(1, examples)) if terms.of_examples else None
    release = terms.release(sanitiser.coordinates, rate, units=examples)
    return Account(folder / f"{client}.json", spec.run_id, Budget(terms, release))


def make_worker(
    spec: RunSpec, client: int, load: Load | None = None, budgets: Path | None = None, rows: Rows | None = None
) -> Worker:
    """A worker with a replica of its own; `load` makes its theta0. One of a private run needs a folder for budgets."""
    made, data = load or (lambda: theta0(spec.size)), Rows(client, spec.size) if rows is None else rows
    digest = theta_digest(made()).hex()
    return Worker(
        client, make_replica(spec, made), data, fingerprint=spec.fingerprint, mask=spec.mask,
        space_hash=spec.space_hash, theta0=digest,
        account=None if budgets is None else make_account(spec, client, budgets, len(data)),
    )  # fmt: skip


@dataclass
class Federation:
    """A coordinator with its workers, and what went down to each client."""

    coordinator: Coordinator
    workers: dict[int, Worker]
    plans: dict[tuple[int, int], list[Plan]] = field(default_factory=dict)
    rows: Callable[[int], Rows] | None = None  # a client's examples, where not its own
    evaluate: Callable[[Any], Tensor] = respond

    @property
    def ledger(self) -> Ledger:
        return self.coordinator.ledger

    def join(self, client: int, load: Load | None = None) -> Worker:
        """Admits a client, or one that starts anew."""
        rows = None if self.rows is None else self.rows(client)
        worker = make_worker(self.coordinator.spec, client, load, self.ledger.path.parent / "budgets", rows)
        self.coordinator.admit(worker.hello())
        self.workers[client] = worker
        return worker

    def round(self, tamper: Tamper | None = None) -> RoundSummary:
        """Plays one round; an answer may be tampered with on its way."""
        pending = self.coordinator.open_round()
        while pending:
            replies: list[Plan] = []
            for plan in pending:
                self.plans.setdefault((plan.round, plan.client), []).append(plan)
                data = answer(self.workers[plan.client], plan.to_bytes(), self.evaluate)
                for message in [data] if tamper is None else tamper(plan.round, plan.client, data):
                    again = self.coordinator.receive(plan.client, message)
                    replies += [again] if again is not None else []
            pending = replies
        holders = self.coordinator.holders
        if holders and len(holders) >= self.coordinator.threshold:
            held = [self.workers[client].held for client in holders]
            self.coordinator.receive_total((holders, np.sum([one for one in held if one is not None], axis=0)))
        return self.coordinator.close_round()

    def finish(self, tamper: Tamper | None = None) -> bytes:
        """Plays the rounds that are left; returns the ledger's hash."""
        while not self.coordinator.finished:
            self.round(tamper)
        return self.ledger.head


def start(
    path: Path, spec: RunSpec, clients: Iterable[int] | None = None, rows: Callable[[int], Rows] | None = None
) -> Federation:
    """A new run in an empty folder, or the one whose ledger is there, with workers that stand at theta0."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "ledger.sqlite"
    artifacts = {spec.initial: initial_values(spec.size)} if spec.initial else None
    ledger = Ledger(file, write=True) if file.exists() else Ledger.create(file, spec, artifacts)
    federation = Federation(Coordinator(ledger, make_replica(spec)), {}, rows=rows)
    for client in range(spec.clients) if clients is None else clients:
        federation.join(client)
    return federation


def with_initial(**changes: Any) -> RunSpec:
    """A run whose last four entries of theta are an artifact."""
    return make_spec(initial=artifact_name(initial_values(changes.get("size", SIZE))), **changes)


def rounds_of(ledger: Ledger) -> list[LedgerRound]:
    return list(ledger.read())
