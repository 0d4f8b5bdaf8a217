"""Configuration: every mistake is named where it was made."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.config import KEYS, Config, describe, flatten, from_flat, load_config, parse_override, to_toml
from fedzo.errors import ConfigError
from fedzo.registry import lookup, nearest


def test_defaults_are_consistent_and_complete() -> None:
    assert load_config(None) == Config() == from_flat({})
    assert set(flatten(Config())) == set(KEYS) and "method.eps" in KEYS and "seed" in KEYS
    assert all(isinstance(value, bool | int | float | str) for value in flatten(Config()).values())


def test_describe_is_the_default_configuration_as_toml(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(describe(), encoding="utf-8")
    assert load_config(path) == Config()
    described = tomllib.loads(describe())
    assert sum(len(v) if isinstance(v, dict) else 1 for v in described.values()) == len(KEYS)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.epsilon": 1}, r"unknown key 'method.epsilon'. Did you mean 'method.eps'\?"),
        ({"federation.round": 1}, r"Did you mean 'federation.rounds'\?"),
        ({"sed": 1}, r"unknown key 'sed'. Did you mean 'seed'\?"),
        ({"method": 1}, "unknown key 'method'"),
        ({"method.eps.x": 1}, "unknown key 'method.eps.x'"),
        ({"qqqqqq": 1}, "Known: .*seed"),
        ({"method.eps": 0}, r"method.eps: .*greater than 0 \(found 0\)"),
        ({"method.eps": "big"}, r"method.eps: .*number.*\(found 'big'\)"),
        ({"method.eps": float("nan")}, "method.eps: .*finite"),
        ({"method.queries": 1.5}, "method.queries: .*integer"),
        ({"method.queries": 65536}, "method.queries"),
        ({"method.optimizer": "sdg"}, r"unknown method.optimizer 'sdg'. Did you mean 'sgd'\?"),
        ({"method.schedule": "cosin"}, r"Did you mean 'cosine'\?"),
        ({"method.directions": "rademacher2"}, r"Did you mean 'rademacher'\?"),
        ({"method.estimator": "two point"}, r"Did you mean 'two-point'\?"),
        ({"federation.aggregation": "medan"}, r"Did you mean 'median'\?"),
        ({"federation.seeds": "own"}, "federation.seeds: .*'shared', 'independent', 'pool' or 'weighted-pool'"),
        ({"federation.trim": 0.5}, "federation.trim"),
        ({"federation.client_rate": 1.1}, "federation.client_rate"),
        ({"model.kind": "decoder"}, "model.kind: .*'causal', 'masked' or 'encoder'"),
        ({"model.kind": True}, "model.kind"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"seed": 2**63}, "seed: .*less than"),
        ({"name": 2024}, "name: .*string"),
        ({"task.verbalizers": ["a|b", "c"]}, "task.verbalizers: .*may not contain '|'"),
        ({"space.include": ["a,b"]}, "space.include: .*may not contain ','"),
        # what does not fit together
        ({"federation.aggregation": "median", "federation.seeds": "pool"}, 'needs federation.seeds = "shared"'),
        ({"federation.aggregation": "trimmed-mean", "federation.seeds": "independent"}, "needs federation.seeds"),
        ({"federation.norm_bound": -1}, "federation.norm_bound: .*greater than or equal to 0"),
        (
            {"federation.aggregation": "norm-bound", "federation.norm_bound": 2, "method.estimator": "hizoo"}
            | {"method.optimizer": "hizoo", "method.directions": "gaussian"},
            'norm_bound is 2, but .*method.estimator = "hizoo": second scalars too. Set federation.norm_bound = 0',
        ),
        (
            {"federation.aggregation": "norm-bound", "federation.norm_bound": 2, "method.first_order": "head.*, b"},
            r'norm_bound is 2, but .*method.first_order = "head.\*, b": gradients too. Set federation.norm_bound = 0',
        ),
        ({"federation.clients_per_round": 11}, "clients_per_round is 11, but data.clients is 10"),
        ({"federation.clients_per_round": 2, "federation.quorum": 3}, "quorum is 3, but only 2 clients"),
        ({"federation.quorum": 11}, "quorum is 11, but only 10 clients"),
        ({"federation.clients_per_round": 2, "federation.client_rate": 0.5}, "set one of them to 0"),
        (
            {"federation.seeds": "pool", "federation.pool_size": 3, "method.queries": 4},
            "queries is 4, more than federation.pool_size 3",
        ),
        ({"method.warmup_steps": 100}, "warmup_steps is 100"),
        ({"model.quantisation": "int4"}, "model.quantisation: .*'none', 'nf4', 'fp4' or 'int8'"),
        ({"model.client_quantisation": "nf4, 8bit"}, "model.client_quantisation.1: .*'int8'"),
        ({"model.compute_dtype": "fp16"}, "model.compute_dtype: .*'float32', 'bfloat16' or 'float16'"),
        ({"space.density": 0}, "space.density: .*greater than 0"),
        ({"space.density": 1.5}, "space.density: .*less than or equal to 1"),
        ({"space.calibration_examples": 0}, "space.calibration_examples"),
        ({"space.theta_dtype": "float16"}, "space.theta_dtype: .*'float32' or 'bfloat16'"),
        ({"space.theta_dtype": "bfloat16", "space.kind": "sparse"}, 'needs space.kind = "full", found "sparse"'),
        ({"space.theta_dtype": "bfloat16", "federation.seeds": "pool"}, 'set federation.seeds = "shared"'),
        ({"runtime.evaluation": "both"}, "runtime.evaluation: .*'auto', 'paired' or 'sequential'"),
    ],
)
def test_mistakes_are_named(flat: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_flat(flat, "here")
    assert str(caught.value).startswith("here: ") and "\n" not in str(caught.value)


def test_what_fits_together_passes() -> None:
    from_flat({"federation.aggregation": "uniform", "federation.seeds": "pool"})
    from_flat({"federation.aggregation": "norm-bound", "federation.norm_bound": 2, "federation.seeds": "pool"})
    from_flat({"federation.aggregation": "norm-bound", "method.first_order": "head.*"})
    from_flat({"federation.client_rate": 0.5, "federation.quorum": 10})
    from_flat({"method.warmup_steps": 199, "federation.local_steps": 2})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("method.eps=1e-3", ("method.eps", 1e-3)),
        ("method.queries = 8", ("method.queries", 8)),
        ("federation.seeds=pool", ("federation.seeds", "pool")),
        ('federation.seeds="pool"', ("federation.seeds", "pool")),
        ("name=", ("name", "")),
        ("name=2024", ("name", "2024")),
        ("name=1e5", ("name", "1e5")),
        ("name=true", ("name", "true")),
        ("name=2024-01-01", ("name", "2024-01-01")),
        ("name=a=b", ("name", "a=b")),
        ("space.include=*.bias, head.*", ("space.include", "*.bias, head.*")),
        ('space.include=["*.bias"]', ("space.include", ["*.bias"])),
        ("task.verbalizers= terrible| great", ("task.verbalizers", " terrible| great")),
    ],
)
def test_overrides(text: str, wanted: tuple[str, object]) -> None:
    assert parse_override(text) == wanted
    load_config(None, [text])


def test_override_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"'method.eps' has no '='"):
        parse_override("method.eps")
    with pytest.raises(ConfigError, match=r"the command line: unknown key 'method.ep'. Did you mean 'method.eps'"):
        load_config(None, ["method.ep=1"])
    with pytest.raises(ConfigError, match=r"method.eps"):
        load_config(None, ["method.eps=2024-01-01"])


def test_lists_are_read_from_text_and_keep_their_spaces() -> None:
    config = from_flat({"space.include": "a.*, b.*,", "task.verbalizers": " terrible| great"})
    assert config.space.include == ("a.*", "b.*") and config.task.verbalizers == (" terrible", " great")


def test_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('seed = 3\n[method]\neps = 0.5\n[space]\ninclude = ["a"]\n', encoding="utf-8")
    config = load_config(path, ["method.eps=0.25", "method.eps=0.125"])
    assert (config.seed, config.method.eps, config.space.include) == (3, 0.125, ("a",))


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("seed = ", encoding="utf-8")
    (tmp_path / "two.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"no configuration file .*thre.toml; there are .*one.toml, .*two.toml"):
        load_config(tmp_path / "thre.toml")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "no" / "folder.toml")
    for name in ("one.toml", "two.toml", ""):
        with pytest.raises(ConfigError, match="cannot be read as TOML"):
            load_config(tmp_path / name)
    (tmp_path / "three.toml").write_text("[method]\nepz = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"three.toml: unknown key 'method.epz'"):
        load_config(tmp_path / "three.toml")


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NAMES = st.lists(st.text("ab.*_[", min_size=1, max_size=6), max_size=3)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), min_size=1), max_size=3)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "name": WORDS,
            "task.template": WORDS,
            "task.verbalizers": TEXTS,
            "space.include": NAMES,
            "space.targets": NAMES,
            "method.eps": st.floats(min_value=5e-324, allow_infinity=False),
            "method.learning_rate": st.floats(min_value=5e-324, allow_infinity=False),
            "federation.scalar_bound": st.floats(1e-9, 1e30),
            "model.max_length": st.integers(4, 10**6),
        },
    )
)
def test_a_configuration_survives_toml_and_flower(tmp_path_factory: pytest.TempPathFactory, flat: dict) -> None:
    config = from_flat(flat)
    assert from_flat(flatten(config)) == config
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert from_flat(flatten(load_config(path))).experiment() == config.experiment()


def test_the_experiment_hash_counts_what_decides_the_run() -> None:
    base = Config().experiment()
    for same in (
        "data.source=/elsewhere",
        "model.source=/elsewhere",
        "runtime.threads=1",
        "name=x",
        "evaluation.every=3",
        # what clients may differ in, and what the hash of the mask stands for
        "model.quantisation=nf4",
        "model.compute_dtype=bfloat16",
        "model.client_quantisation=nf4, none",
        "runtime.evaluation=paired",
        "space.mask=sensitive",
        "space.density=0.001",
        "space.calibration=/elsewhere",
    ):
        assert load_config(None, [same]).experiment() == base
    for other in ("seed=1", "data.alpha=0.1", "data.limit=9", "task.template={text}", "model.max_length=64"):
        assert load_config(None, [other]).experiment() != base


def test_resolved_makes_existing_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = load_config(None, ["model.source=model", "data.source=glue/sst2"]).resolved()
    assert config.model.source == str(tmp_path / "model") and config.data.source == "glue/sst2"
    for name in ("random", "own.safetensors", "text.txt"):
        (tmp_path / name).touch()
    space = load_config(None, ["space.mask=own.safetensors", "space.calibration=text.txt"]).resolved().space
    assert (space.mask, space.calibration) == (str(tmp_path / "own.safetensors"), str(tmp_path / "text.txt"))
    assert Config().resolved().space.mask == "random"  # a method, whatever files there are


def test_clients_take_turns_on_the_bases() -> None:
    config = load_config(None, ["model.quantisation=fp4", "model.client_quantisation=nf4, int8, none"])
    assert config.model.client_quantisation == ("nf4", "int8", "none")
    bases = [config.for_client(number).model.quantisation for number in range(4)]
    assert bases == ["nf4", "int8", "none", "nf4"]
    assert Config().for_client(3) == Config()


def test_lookup_and_nearest() -> None:
    assert lookup({"a": 1}, "a", "letter") == 1
    with pytest.raises(ConfigError, match=r"unknown letter 'alpa'. Did you mean 'alpha'\?"):
        lookup({"alpha": 1, "beta": 2}, "alpa", "letter")
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
