"""The named methods: each federated and replayed, what is told of it, and one message for each mistake."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_runs import fedzo

from fedzo import experiment
from fedzo.config import Config, flatten, from_flat, from_run_config, load_config, to_toml
from fedzo.errors import ConfigError
from fedzo.evaluation import DerivativeRequest, Evaluator, LossRequest, Request
from fedzo.experiment import Experiment
from fedzo.federation.spec import SEED_SCHEDULES
from fedzo.method_facts import MARK, SPACES, facts, named, rewrite, row
from fedzo.methods import METHODS
from fedzo.optimizers import Rule

ROOT = Path(__file__).resolve().parents[1]
OF_A_QUANTISED_BASE = {"scales": ["model.quantisation=nf4"], "codes": ["model.quantisation=int8"]}
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    """simulations/method_replay.py."""
    sys.path.insert(0, str(ROOT / "simulations"))
    import method_replay

    yield method_replay
    sys.path.remove(str(ROOT / "simulations"))


# Each method, federated.


@pytest.mark.parametrize("name", METHODS)
def test_a_run_replays_and_is_resumed_bit_for_bit(
    name: str, simulation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = 1 under the first seed schedule; the forwards that it took and the state it left are those told."""
    chosen = simulation.configured(
        name, federation__rounds=4, method__queries=3, federation__seeds=facts(name).seeds[0]
    )
    counted, answer = 0, Evaluator.answer

    def count(evaluator: Evaluator, request: Request) -> Any:
        nonlocal counted
        counted += passes(request) * len(request.batch.labels)
        return answer(evaluator, request)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answer", count)
        ledger, server = simulation.run(chosen, tmp_path / "whole")
    rounds, size = ledger.spec.rounds, chosen.method.batch_size
    estimator, beside = ledger.spec.build_estimator(), sum(part.forwards for part in rules_of(chosen))
    told = [estimator.evaluated(3, size, member.examples) + beside * size for member in server.members.values()]
    assert counted == pytest.approx(rounds * sum(told))
    kept = sum(value.numel() * value.element_size() for value in server.replica.state.values())
    assert round(kept / 4 / ledger.spec.size) == facts(name).state
    held = simulation.check(chosen, (ledger, server), tmp_path)
    assert all(held.values()), held


def rules_of(config: Config) -> list[type[Rule]]:
    return [part for part, _ in config.parts() if issubclass(part, Rule)]


def passes(request: Request) -> int:
    """Forward passes over its batch; a derivative counts as two."""
    if isinstance(request, LossRequest):
        return len(request.seeds) * len(request.offsets) + request.origin
    return 2 * len(request.seeds) if isinstance(request, DerivativeRequest) else 1


@pytest.mark.parametrize("name", METHODS)
def test_local_steps_replay_or_are_refused(name: str, simulation: ModuleType, tmp_path: Path) -> None:
    """K = 4 under the method's last seed schedule."""
    changes = {"federation__local_steps": 4, "federation__rounds": 2, "federation__seeds": facts(name).seeds[-1]}
    if facts(name).local_steps == "1":
        with pytest.raises(ConfigError, match=r"needs federation.local_steps = 1, found 4: \w+"):
            simulation.configured(name, **changes)
        return
    chosen = simulation.configured(name, **changes)
    held = simulation.check(chosen, simulation.run(chosen, tmp_path / "whole"), tmp_path)
    assert all(held.values()), held


# What is told of them.


def test_the_documentation_is_that_of_the_registry() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert MARK in text and rewrite(text) == text, "run the command that docs/methods.md names"


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_what_the_configuration_accepts(name: str, simulation: ModuleType) -> None:
    found = facts(name)
    assert found.spaces and found.seeds and all(part.source and part.formula for part in found.parts)
    for schedule in set(SEED_SCHEDULES) - set(found.seeds):
        with pytest.raises(ConfigError, match=r"federation.seeds = "):
            simulation.configured(name, federation__seeds=schedule)
    for kind in SPACES:
        keys = {"space__kind": kind, "model__quantisation": "none"}
        keys |= dict(text.replace(".", "__").split("=") for text in OF_A_QUANTISED_BASE.get(kind, []))
        if kind in found.spaces:
            simulation.configured(name, **keys)
        else:
            with pytest.raises(ConfigError, match=r"space.kind = "):
                simulation.configured(name, **keys)


def test_words_for_a_choice() -> None:
    assert [named(chosen, "abc") for chosen in ("abc", "ac", "b", "")] == ["all", "all but b", "b", "none"]


def test_the_command_tells_the_same() -> None:
    answer = fedzo("methods", "--json")
    assert [one["name"] for one in json.loads(answer.out)] == list(METHODS)
    lines = fedzo("methods").out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", *METHODS]
    for name in METHODS:
        one, found = fedzo("methods", name), facts(name)
        assert one.code == 0 and found.title in one.out
        assert all(part.formula in one.out and part.source in one.out for part in found.parts)
        assert all(limit.because in one.out for limit in found.limits)
        assert json.loads(fedzo("methods", name, "--json").out)["forwards"] == row(found)["forwards"]
    unknown = fedzo("methods", "zo-sdg")
    assert (unknown.code, unknown.err) == (2, "error: unknown method 'zo-sdg'. Did you mean 'zo-sgd'?\n")


# The key method.name.


@pytest.mark.parametrize("name", METHODS)
def test_a_name_stands_for_its_keys(name: str, simulation: ModuleType, tmp_path: Path) -> None:
    """Filled in, also beside the defaults of Flower's run-config; written out, it reads back the same."""
    chosen = simulation.configured(name)
    assert METHODS[name].keys.items() <= flatten(chosen).items()
    path = tmp_path / "config.toml"
    path.write_text(to_toml(chosen), encoding="utf-8")
    assert load_config(path) == chosen
    assert from_run_config({**flatten(chosen), "out": "runs/x"}) == chosen
    given = {key: value for key, value in flatten(chosen).items() if key not in METHODS[name].keys}
    assert from_run_config({**flatten(Config()), **given}) == chosen
    parts = from_flat({key: value for key, value in flatten(chosen).items() if key != "method.name"})
    assert Experiment(parts).spec() == Experiment(chosen).spec()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_files_leave_the_parts_open(path: Path) -> None:
    """Any file and a method's name on the command line: no key of the file contradicts the name."""
    for name, method in METHODS.items():
        kind = facts(name).spaces[0]
        space = [
            f"space.kind={kind}",
            "method.queries=2",
            "model.client_quantisation=",
            "privacy.mode=none",
            *OF_A_QUANTISED_BASE.get(kind, []),
        ]
        written = load_config(path, [f"method.name={name}", *(f"{key}=*" for key in method.open), *space])
        assert method.keys.items() <= flatten(written).items()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"method.name": "zo-sdg"}, r"unknown method.name 'zo-sdg'. Did you mean 'zo-sgd'\?"),
    ({"method.name": "qqqq"}, "unknown method.name 'qqqq'. Known: .*zo-adam"),
    ({"method.name": 7}, "method.name: .*string"),
    (
        {"method.name": "zo-adam", "method.optimizer": "sgd"},
        'method.name = "zo-adam" is method.optimizer = "adam", found "sgd": leave method.optimizer out, or method.name',
    ),
    (
        {"method.name": "zo-sgd", "method.estimator": "one-point"},
        'is method.estimator = "two-point", found "one-point"',
    ),
    ({"method.name": "fedkseed", "federation.seeds": "shared"}, 'is federation.seeds = "pool", found "shared"'),
    ({"method.name": "zo-sgd", "method.first_order": "head.*"}, 'is method.first_order = "", found "head.*"'),
    ({"method.name": "hybrid"}, 'method.name = "hybrid" needs method.first_order, which is empty'),
    ({"method.name": "qzo"}, 'needs space.kind = "scales", found "full": '),
    ({"method.name": "zo-sgd", "space.kind": "codes", "model.quantisation": "int8"}, 'needs space.kind = "full" or '),
    (
        {"method.name": "quzo", "space.kind": "codes", "model.quantisation": "nf4"},
        'needs model.quantisation = "int8", found "nf4"',
    ),
    ({"method.name": "zo-adam", "federation.seeds": "pool"}, 'needs federation.seeds = .*, found "pool": '),
    ({"method.name": "dizo", "federation.local_steps": 4}, "needs federation.local_steps = 1, found 4: "),
]


@pytest.mark.parametrize(("keys", "message"), MISTAKES)
def test_mistakes_are_one_message_before_anything_is_loaded(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_flat(keys, "here")
    assert "\n" not in str(caught.value)

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(experiment, "load_model", load)
    options = [part for key, value in keys.items() for part in ("-o", f"{key}={value}")]
    if keys["method.name"] == 7:
        return  # a text on the command line
    answer = fedzo("run", *options, "--out", tmp_path / "run")
    assert answer.code == 2 and answer.out == "" and answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1 and str(caught.value).removeprefix("here: ") in answer.err
    assert not (tmp_path / "run").exists()
