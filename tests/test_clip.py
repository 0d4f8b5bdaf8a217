"""`fedzo privacy clip`: the norms of a run's first scalars, on public data and on nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from small_runs import config, fedzo, make_data, options
from torch import Tensor

from fedzo.clip import Suggestion, suggest
from fedzo.config import from_flat, to_toml
from fedzo.directions.base import Isotropic
from fedzo.errors import ConfigError, RunError
from fedzo.evaluation import LossRequest
from fedzo.experiment import Experiment
from fedzo.federation.randomness import derive, shuffled, words64

PUBLIC = 12  # examples
EXAMPLE = {"privacy__mode": "example-local", "privacy__delta": 1e-3}
CLIENT = {"privacy__mode": "client-central", "privacy__delta": 1e-3, "method__batch_size": 3}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), test=PUBLIC)


def scalars(experiment: Experiment, chosen: npt.NDArray[np.int64], seeds: list[int]) -> npt.NDArray[np.float64]:
    """float64 [P, B]: differences of losses at theta0 +- eps z, one direction and one point at a time."""
    batch, theta, eps = experiment.validation.batch(chosen), experiment.theta0(), experiment.config.method.eps

    def loss(seed: int, offset: float) -> npt.NDArray[np.float64]:
        request = LossRequest(theta, batch, (offset,), (seed,), Isotropic())
        return experiment.evaluator.answer(request)[0, 0].double().numpy()

    return np.stack([(loss(seed, eps) - loss(seed, -eps)) / (2 * eps) for seed in seeds])


def first_seeds(steps: int, queries: int = 2) -> list[list[int]]:
    return words64(derive(0, "clip", "directions"), steps * queries).reshape(steps, queries).tolist()


def check(found: Suggestion, norms: npt.NDArray[np.float64], quantile: float = 0.5) -> None:
    assert found.units == len(norms)
    for q, norm in found.quantiles.items():
        assert norm == pytest.approx(np.quantile(norms, q), rel=1e-4)
    assert found.clip == pytest.approx(np.quantile(norms, quantile), rel=6e-3)
    assert found.clipped == pytest.approx((norms > found.clip).mean())


@pytest.mark.parametrize(("mechanism", "delta", "order"), [("gaussian", 1e-3, 2), ("laplace", 0.0, 1)])
def test_norms_of_examples(mechanism: str, delta: float, order: int, data: Path) -> None:
    chosen = EXAMPLE | {"privacy__mechanism": mechanism, "privacy__delta": delta}
    experiment = Experiment(config(data, **chosen))
    norms = np.linalg.norm(scalars(experiment, np.arange(PUBLIC), first_seeds(1)[0]), ord=order, axis=0)
    check(suggest(experiment), norms)
    found = suggest(experiment, 0.9)
    check(found, norms, 0.9)
    assert found.clipped < 0.2
    assert (found.examples, found.forwards) == (PUBLIC, 3 * 4)  # 3 batches, 2 points of 2 directions


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", ["client-central", "client-local", "client-secagg"])
def test_norms_of_clients(mode: str, steps: int, data: Path) -> None:
    chosen = CLIENT | {"privacy__mode": mode, "federation__local_steps": steps}
    experiment = Experiment(config(data, **chosen))
    batches = shuffled(derive(0, "clip"), PUBLIC).reshape(-1, steps, 3)
    seeds = first_seeds(steps)
    means = np.array(
        [[scalars(experiment, client[k], seeds[k]).mean(axis=1) for k in range(steps)] for client in batches]
    )  # [clients, K, P]
    if mode == "client-local":  # each step has a bound of its own, 1 / sqrt(K) of the whole
        norms = np.sqrt(steps) * np.linalg.norm(means.reshape(-1, 2), axis=1)
    else:
        norms = np.linalg.norm(means.reshape(len(means), -1), axis=1)
    found = suggest(experiment)
    check(found, norms)
    assert (found.examples, found.forwards) == (PUBLIC, 4 * 4)


def test_both_scalars_of_a_query_count(data: Path) -> None:
    """They are released together, so they are clipped together."""
    experiment = Experiment(config(data, method__name="hizoo", **EXAMPLE))
    batch, theta, eps = (
        experiment.validation.batch(np.arange(PUBLIC)),
        experiment.theta0(),
        experiment.config.method.eps,
    )
    request = LossRequest(theta, batch, (eps, 0.0, -eps), tuple(first_seeds(1)[0]), Isotropic("gaussian"))
    plus, here, minus = experiment.evaluator.answer(request).double().numpy().transpose(1, 0, 2)
    both = np.concatenate([(plus - minus) / (2 * eps), (plus + minus - 2 * here) / (2 * eps**2)])
    check(suggest(experiment), np.linalg.norm(both, axis=0))


def test_a_bound_stands_for_its_share_of_a_run(data: Path) -> None:
    """What a run's own sanitiser counts as within the bound, of the same vectors."""
    experiment = Experiment(config(data, **EXAMPLE))
    values = scalars(experiment, np.arange(PUBLIC), first_seeds(1)[0])
    terms = experiment.terms
    assert terms is not None
    for quantile in (0.2, 0.5, 0.8):
        found = suggest(experiment, quantile)
        _, within = terms.noise.clip(values, found.clip)
        assert 1 - within.mean() == pytest.approx(found.clipped)


def test_nothing_of_the_clients_is_looked_at(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_data(tmp_path / "other", train=72, test=PUBLIC)
    lines = (other / "train.jsonl").read_text(encoding="utf-8").splitlines()[36:]
    (other / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert (other / "train.jsonl").read_bytes() != (data / "train.jsonl").read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("a client's data was asked for")

    monkeypatch.setattr(Experiment, "client_data", refuse)
    for keys in (EXAMPLE, CLIENT):
        assert suggest(Experiment(config(data, **keys))) == suggest(Experiment(config(other, **keys)))


def test_batches_are_mixed_whatever_the_order_of_the_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one label each would have means that no client's have."""
    ordered = make_data(tmp_path / "ordered", test=PUBLIC)
    lines = (ordered / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    lines.sort(key=lambda line: str(json.loads(line)["label"]))
    (ordered / "validation.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    experiment, mixed = Experiment(config(ordered, **CLIENT)), 0
    answer = experiment.evaluator.answer

    def look(request: LossRequest) -> Tensor:
        nonlocal mixed
        mixed += len(set(request.batch.labels.tolist())) > 1
        return answer(request)

    monkeypatch.setattr(experiment.evaluator, "answer", look)
    suggest(experiment)
    assert mixed >= 3  # of 4


@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, float("nan")])
def test_a_quantile_is_between_0_and_1(quantile: float, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"a quantile is .*, wanted above 0 and below 1"):
        suggest(Experiment(config(data, **EXAMPLE)), quantile)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (EXAMPLE | {"data__validation": ""}, "data.validation is empty.*name a split or file of public examples"),
        ({}, 'privacy.mode is "none".*privacy.mode=example-local'),
        (CLIENT | {"method__batch_size": 13}, "12 examples, fewer than the 13 of one client"),
        (CLIENT | {"federation__local_steps": 5}, "fewer than the 15 of one client"),
    ],
)
def test_what_gives_no_bound(keys: dict[str, Any], said: str, data: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        suggest(Experiment(config(data, **keys)))


def test_losses_that_give_no_bound(data: Path) -> None:
    experiment = Experiment(config(data, **EXAMPLE))
    answer = experiment.evaluator.answer

    def with_losses(change: Any) -> None:
        experiment.evaluator.answer = lambda request: change(answer(request))

    with_losses(torch.zeros_like)
    with pytest.raises(RunError, match=r"100% of the units is flat.*check method.eps"):
        suggest(experiment)
    with_losses(lambda losses: losses * torch.inf)
    with pytest.raises(RunError, match=r"not finite.*check model.compute_dtype"):
        suggest(experiment)
    with_losses(lambda losses: torch.cat([torch.zeros_like(losses[..., :3]), losses[..., 3:]], dim=-1))
    with pytest.raises(RunError, match=r"75% of the units is flat.*take a higher one"):
        suggest(experiment)
    assert suggest(experiment, 0.9).clip > 0


def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config(data, **EXAMPLE)), encoding="utf-8")
    before = sorted(tmp_path.iterdir())

    told = fedzo("privacy", "clip", file, "--json")
    found = json.loads(told.out)
    wanted = suggest(Experiment(config(data, **EXAMPLE)))
    assert (told.code, found["clip"], found["units"]) == (0, wanted.clip, PUBLIC)
    assert list(found["quantiles"]) == ["0.1", "0.25", "0.5", "0.75", "0.9", "0.99"]

    shown = fedzo("privacy", "clip", file, *options(data, **CLIENT), "-o", "federation.local_steps=2")
    assert shown.code == 0
    assert "All 2 local steps are taken at the base model." in shown.out
    assert "99%" in shown.out

    for arguments, code, said in (
        (["--quantile", "1"], 2, "a quantile is 1"),
        (["-o", "data.validation="], 2, "data.validation is empty"),
        (["-o", "privacy.mode=none"], 2, 'privacy.mode is "none"'),
    ):
        answer = fedzo("privacy", "clip", file, *arguments)
        assert (answer.code, answer.out) == (code, "")
        assert said in answer.err
        assert "Traceback" not in answer.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_embedded_data_has_public_examples_of_its_own() -> None:
    found = suggest(Experiment(from_flat({"privacy.mode": "example-local", "privacy.delta": 1e-4})))
    assert found.units == 256
    assert found.clip > 0
