"""Loading, splitting and partitioning: on files written here, and on real ones where they lie beside the repository."""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported: no test needs the network

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ConfigError, DataError
from fedzo.tasks import TASKS, Splits, load_splits, partition
from fedzo.tasks.data import permutation

SHARED = Path(__file__).resolve().parents[2] / "shared"
SST2 = TASKS["sst2"]


def reviews(count: int, tag: str = "film") -> list[dict[str, Any]]:
    return [{"sentence": f'{tag} {number}, said "they"', "label": number % 2} for number in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked: with a name that it may have, its client would try for long where there is no network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train.jsonl", reviews(100))
    write(tmp_path / "dev.jsonl", reviews(10, "dev"))
    write(tmp_path / "test.jsonl", reviews(20, "test"))
    return tmp_path


def load(folder: Path, **arguments: Any) -> Splits:
    return load_splits(str(folder), SST2, **arguments)


# ---- files


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"train.{suffix}", reviews(6))
    write(tmp_path / f"test.{suffix}", reviews(4, "test"))
    write(tmp_path / f"dev.{suffix}", reviews(2, "dev"))
    for name in ("dev", f"dev.{suffix}", str(tmp_path / f"dev.{suffix}")):
        splits = load(tmp_path, validation=name)
        assert splits.train == reviews(6) and splits.validation == reviews(2, "dev")
        assert splits.test == reviews(4, "test")


def test_labels_become_class_indices(tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": "not_entailment"}
    write(tmp_path / "train.jsonl", [row, {**row, "premise": "c", "label": "entailment"}] * 5)
    splits = load_splits(str(tmp_path), TASKS["rte"], test="", validation_fraction=0.5)
    assert {(e["premise"], e["label"]) for e in splits.train + splits.validation} == {("a", 1), ("c", 0)}


def test_a_single_file_is_train(folder: Path) -> None:
    splits = load(folder / "dev.jsonl", validation="train", test="")
    assert splits.train == reviews(10, "dev") and splits.validation == reviews(100) and splits.test == []


def test_paragraphs_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("One.\nStill one.\n\n \nTwo.\n", encoding="utf-8")
    splits = load_splits(str(tmp_path), TASKS["lm"], test="", validation_fraction=0.5)
    assert sorted(e["text"] for e in splits.train + splits.validation) == ["One.\nStill one.\n", "Two.\n"]


def test_language_modelling_leaves_empty_documents_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": t} for t in ("a", "", " \n", "b", "c")])
    splits = load_splits(str(tmp_path), TASKS["lm"], test="", validation_fraction=0.5)
    assert sorted(e["text"] for e in splits.train + splits.validation) == ["a", "b", "c"]


def test_the_embedded_data_have_three_splits() -> None:
    splits = load_splits("embedded", TASKS["toy-reviews"])
    assert min(len(splits.train), len(splits.validation), len(splits.test)) > 100
    assert {example["label"] for example in splits.test} == {0, 1}


def test_the_hub_loader_reads_splits_and_configurations(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in the form of a hub data set, through the hub's own loader."""
    from fedzo.tasks.data import _hub

    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n"
        "  - split: held_out\n    path: dev.jsonl\n---\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path.parent)
    for name in (tmp_path.name, f"{tmp_path.name}/main"):
        located = _hub(name)("held_out")
        assert [example for _, example in located] == reviews(10, "dev")
        assert located[2][0] == f"{name}, held_out, row 3"
        with pytest.raises(DataError, match="no split 'test'; it has train, held_out"):
            _hub(name)("test")


def test_an_unknown_name_says_both_things_it_might_be() -> None:
    with pytest.raises(DataError, match="'no-such-owner/no-such-data' is no local directory, and cannot be loaded"):
        load_splits("no-such-owner/no-such-data", SST2)


# ---- what is wrong with a file


def test_missing_files_name_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no data file 'tset'; near it there is test.jsonl"):
        load(folder, test="tset")
    with pytest.raises(DataError, match=f"no directory or file .*near it there is.* {folder.name}"):
        load_splits(str(folder) + "x", SST2)
    write(folder / "train.csv", reviews(3))
    with pytest.raises(DataError, match=r"train.jsonl or train.csv"):
        load(folder)


def test_a_missing_column_is_named_with_those_found(folder: Path) -> None:
    write(folder / "train.jsonl", [{"words": "secret words", "label": 0}])
    with pytest.raises(DataError, match=r"line 1: column 'sentence' .or 'text'. is missing.*found: words, label") as e:
        load(folder)
    assert "secret" not in str(e.value) and "template" in str(e.value)
    write(folder / "train.jsonl", [*reviews(3), {"sentence": "no label"}])
    with pytest.raises(DataError, match=r"train.jsonl, line 4: column 'label' is missing"):
        load(folder)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_an_unknown_label_is_named_with_its_line(folder: Path, suffix: str) -> None:
    (folder / "train.jsonl").unlink()
    write(folder / f"train.{suffix}", [*reviews(3), {"sentence": "secret words", "label": 7}])
    line = 4 if suffix == "jsonl" else 5
    with pytest.raises(DataError, match=rf"train.{suffix}, line {line}: unknown label .*0/negative, 1/positive") as e:
        load(folder)
    assert "secret" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sentence": "secret", "label": 1}\n{"sentence": "sec', r"train.jsonl, line 2: not JSON"),
        ('\n\n["secret"]\n', r"line 3: must be a JSON object"),
        ("", r"train.jsonl has no examples"),
        ('{"sentence": " ", "label": 1}\n', r"line 1: the text in column 'sentence' is empty"),
        ('{"sentence": null, "label": 1}\n', r"line 1: column 'sentence' must hold text, but holds NoneType"),
    ],
)
def test_broken_jsonl(folder: Path, content: str, message: str) -> None:
    (folder / "train.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        load(folder)
    assert "secret" not in str(error.value).replace(str(folder), "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"sentence,label\nsecret,1,2\n", r"t.csv, line 2: has 3 fields, but the header names 2"),
        ("t.csv", b"", r"t.csv has no examples"),
        ("t.csv", b"sentence,label\ncaf\xe9,1\n", r"t.csv: not UTF-8"),
        ("t.json", b'{"secret": 1}', r"t.json: must be a list"),
        ("t.json", b'[{"sentence": "secret"', r"t.json, line 1: not JSON"),
        ("t.parquet", b"secret", r"t.parquet: not a readable Parquet file"),
        ("t.xlsx", b"secret", r"t.xlsx: unknown kind of file; known: .jsonl"),
    ],
)
def test_broken_files_of_other_kinds(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load(folder, train=name)
    assert "secret" not in str(error.value).replace(str(folder), "")


# ---- splits


def test_validation_is_a_seeded_part_of_train(folder: Path) -> None:
    splits = load(folder, validation_fraction=0.1, seed=3)
    assert len(splits.validation) == 10 and len(splits.train) == 90
    everything = sorted(splits.train + splits.validation, key=lambda e: int(e["sentence"].split()[1].rstrip(",")))
    assert everything == reviews(100)
    assert splits == load(folder, validation_fraction=0.1, seed=3)
    assert splits.validation != load(folder, validation_fraction=0.1, seed=4).validation
    for fraction in (0.0, 1.0):
        with pytest.raises(DataError, match="validation_fraction"):
            load(folder, validation_fraction=fraction)


def test_limits_take_a_random_part_in_the_files_order(folder: Path) -> None:
    splits = load(folder, validation="dev", limit=30, validation_limit=5)
    assert len(splits.train) == 30 and len(splits.validation) == 5 and len(splits.test) == 20
    places = [reviews(100).index(example) for example in splits.train]
    assert places == sorted(places) and places[-1] > 50
    assert len(load(folder, validation="dev", limit=1000).train) == 100


def test_one_file_cannot_be_two_splits(folder: Path) -> None:
    for arguments in ({"validation": "test"}, {"validation": "test.jsonl"}, {"test": "train"}):
        with pytest.raises(DataError, match="must differ"):
            load(folder, **arguments)
    write(folder / "copy.json", reviews(20, "test"))
    with pytest.raises(DataError, match="hold the same examples"):
        load(folder, validation="copy")


def test_duplicates_across_splits_are_counted(folder: Path) -> None:
    write(folder / "test.jsonl", [*reviews(7), *reviews(3, "test")])
    write(folder / "dev.jsonl", [*reviews(2), *reviews(2, "dev"), *reviews(1, "test")])
    splits = load(folder, validation="dev")
    assert (splits.train_in_test, splits.train_in_validation, splits.validation_in_test) == (7, 2, 3)
    assert len(splits.train) == 100


# ---- few shots, other names, examples without a label


@pytest.mark.parametrize("validation", ["", "dev"])
def test_shots_are_k_of_each_class(folder: Path, validation: str) -> None:
    splits = load(folder, validation=validation, shots=7, seed=3)
    for part in [splits.train] if validation else [splits.train, splits.validation]:
        assert [sum(e["label"] == label for e in part) for label in (0, 1)] == [7, 7]
    assert len(splits.test) == 20 and len(splits.validation) == (10 if validation else 14)
    kept = {e["sentence"] for e in splits.train}
    assert not kept & {e["sentence"] for e in splits.validation}
    assert [e["sentence"] for e in splits.train] == [e["sentence"] for e in reviews(100) if e["sentence"] in kept]
    assert load(folder, validation=validation, shots=7, seed=3) == splits
    assert load(folder, validation=validation, shots=7, seed=4).train != splits.train
    assert len(load(folder, validation=validation, shots=7, validation_limit=5).validation) == 5


def test_shots_without_fixed_classes_are_k_in_all(tmp_path: Path) -> None:
    row = {"premise": "It rained.", "choice1": "He left.", "choice2": "She left.", "question": "effect"}
    write(tmp_path / "train.jsonl", [{**row, "premise": f"It rained {n}.", "label": n % 2} for n in range(20)])
    splits = load_splits(str(tmp_path), TASKS["copa"], test="", shots=6)
    assert len(splits.train) == len(splits.validation) == 6


def test_too_few_for_the_shots_are_refused(folder: Path) -> None:
    write(folder / "train.jsonl", [*reviews(8), *({"sentence": f"more {n}", "label": 1} for n in range(20))])
    with pytest.raises(DataError, match=r"shots is 3, .*6 training examples of class 0/negative.*there are 4.*name"):
        load(folder, shots=3)
    assert len(load(folder, shots=3, validation="dev").train) == 6
    with pytest.raises(DataError, match=r"data.shots is 5, which needs 5 .*class 0/negative .*there are 4; lower"):
        load(folder, shots=5, validation="dev")


def test_columns_and_labels_of_other_published_forms(tmp_path: Path) -> None:
    """Each task's data set on the hub, and where there are several the others too."""
    forms: dict[str, tuple[str, dict[str, Any], int]] = {
        "SetFit/sst2": ("sst2", {"text": "fine", "label": 1, "label_text": "positive"}, 1),
        "trec": ("trec", {"text": "Who?", "coarse_label": 3, "fine_label": 28}, 3),
        "trec ": ("trec", {"text": "What is AA?", "coarse_label": 0}, 2),
        "glue/rte": ("rte", {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, 1),
        "boolq": ("boolq", {"passage": "a", "question": "b", "answer": True}, 1),
        "snli_1.0.jsonl": ("snli", {"sentence1": "a", "sentence2": "b", "gold_label": "contradiction"}, 2),
    }
    for name, (task, row, label) in forms.items():
        write(tmp_path / "train.jsonl", [row, {**row, "id": 1}])
        splits = load_splits(str(tmp_path), TASKS[task], test="", validation_fraction=0.5)
        assert splits.train[0]["label"] == label, name
        assert all(splits.train[0][column] for column in TASKS[task].columns), name


def test_examples_that_annotators_did_not_agree_on_are_left_out_and_counted(tmp_path: Path) -> None:
    row = {"premise": "a man eats", "hypothesis": "he sits", "label": 1}
    write(tmp_path / "train.jsonl", [{**row, "label": n % 4 - 1} for n in range(12)])
    write(tmp_path / "test.jsonl", [{**row, "premise": "b"}, {**row, "label": -1}])
    splits = load_splits(str(tmp_path), TASKS["snli"], validation_fraction=0.2)
    assert len(splits.train) + len(splits.validation) == 9 and len(splits.test) == 1
    assert splits.unlabelled == 4 and {e["label"] for e in splits.train} <= {0, 1, 2}
    write(tmp_path / "test.jsonl", [{**row, "label": -1}] * 3)
    with pytest.raises(DataError, match=r"test.jsonl: none of its 3 examples has a label.*such as validation"):
        load_splits(str(tmp_path), TASKS["snli"])
    write(tmp_path / "test.jsonl", [{"sentence": "x", "label": -1}])
    write(tmp_path / "train.jsonl", reviews(20))
    with pytest.raises(DataError, match=r"unknown label \(-1\).*secret, report on validation"):
        load_splits(str(tmp_path), SST2)


def test_the_hubs_parquet_branch_takes_the_place_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that branch a configuration is a directory of splits; the hub's own loader reads such a folder here."""
    from fedzo.tasks.data import _load

    for config in ("cb", "copa"):
        for split in ("train", "validation"):
            (tmp_path / config / split).mkdir(parents=True)
            write(tmp_path / config / split / "0000.parquet", reviews(4, f"{config} {split}"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked: list[Any] = []

    def load_dataset(*form: str, **options: Any) -> Any:
        asked.append(options.pop("revision", None))
        if asked[-1] is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found super_glue.py")
        return datasets.load_dataset(*form, **options)

    found = _load(load_dataset, (str(tmp_path), "cb"), "validation")
    assert list(found) == reviews(4, "cb validation") and asked == [None, "refs/convert/parquet"]


# ---- partitions


def roles(counts: list[int]) -> list[dict[str, Any]]:
    rows = [
        {"role": f"role {number}", "label": number % 2} for number, count in enumerate(counts) for _ in range(count)
    ]
    return [rows[i] for i in permutation(9, len(rows))]


def assert_partition(parts: list[Any], count: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all(part.dtype == np.int64 and len(part) and bool((np.diff(part) > 0).all()) for part in parts)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["iid", "linear", "dirichlet", "pathological"]),
    clients=st.integers(2, 12),
    count=st.integers(160, 300),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_example_has_one_client(kind: str, clients: int, count: int, seed: int) -> None:
    examples = reviews(count)
    parts = partition(examples, clients, kind=kind, alpha=10.0, seed=seed)
    assert len(parts) == clients
    assert_partition(parts, count)
    again = partition(examples, clients, kind=kind, alpha=10.0, seed=seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", ["iid", "linear", "dirichlet", "pathological", "natural"])
def test_no_global_generator_is_read_or_written(kind: str) -> None:
    found = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        torch.manual_seed(state)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        parts = partition(roles([9, 8, 7, 6, 5]), 3, kind=kind, column="role" if kind == "natural" else "", seed=5)
        found.append([part.tolist() for part in parts])
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert found[0] == found[1]


def test_iid_is_even_and_shuffled() -> None:
    parts = partition(reviews(103), 10, seed=1)
    assert sorted(map(len, parts)) == [10] * 7 + [11] * 3
    assert max(np.ptp(part) for part in parts) > 50
    other = partition(reviews(103), 10, seed=2)
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_dirichlet_skews_labels_as_alpha_says() -> None:
    examples = reviews(2000)
    labels = np.array([example["label"] for example in examples])

    def spread(alpha: float) -> float:
        parts = partition(examples, 10, kind="dirichlet", alpha=alpha, seed=0)
        assert_partition(parts, 2000)
        return float(np.std([labels[part].mean() for part in parts]))

    assert spread(0.3) > 0.15
    assert spread(1000.0) < 0.05


def test_pathological_gives_two_labels_each() -> None:
    examples = [{"label": number % 6} for number in range(120)]
    parts = partition(examples, 6, kind="pathological")
    assert_partition(parts, 120)
    assert all(len({examples[i]["label"] for i in part}) == 2 for part in parts)


def test_natural_keeps_an_id_together(capfd: pytest.CaptureFixture[str]) -> None:
    examples = roles([5, 9, 1, 4, 4, 7])
    parts = partition(examples, 0, kind="natural", column="role")
    assert_partition(parts, 30)
    assert [{examples[i]["role"] for i in part} for part in parts] == [{f"role {n}"} for n in range(6)]
    grouped = partition(examples, 4, kind="natural", column="role", seed=3)
    assert_partition(grouped, 30)
    owned = [{examples[i]["role"] for i in part} for part in grouped]
    assert sorted(map(len, owned)) == [1, 1, 2, 2] and len(set.union(*owned)) == 6
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "kind_of_error", "message"),
    [
        ({"clients": 31}, DataError, "30 examples cannot be dealt to 31"),
        ({"clients": 0}, ConfigError, "at least 1"),
        ({"clients": 3, "kind": "dirichle"}, ConfigError, "Did you mean 'dirichlet'"),
        ({"clients": 3, "kind": "dirichlet", "alpha": 0.0}, ConfigError, "alpha is 0.0"),
        ({"clients": 3, "kind": "dirichlet", "column": "topic"}, DataError, "'topic' is missing.*columns: sentence"),
        ({"clients": 25, "kind": "dirichlet", "alpha": 0.01}, DataError, "raise alpha"),
        ({"clients": 3, "kind": "natural"}, ConfigError, "needs the name of the column"),
        ({"clients": 3, "kind": "natural", "column": "label"}, DataError, "2 different ids.*3 clients"),
        ({"clients": 30, "kind": "linear"}, DataError, "fewer clients"),
        ({"clients": 10, "min_size": 4}, DataError, "a client has 3 examples, but every client needs 4"),
    ],
)
def test_impossible_partitions_are_refused(arguments: dict[str, Any], kind_of_error: Any, message: str) -> None:
    with pytest.raises(kind_of_error, match=message):
        partition(reviews(30), **arguments)


# ---- real data


def test_real_data_load() -> None:
    root = SHARED / "data"
    if not root.is_dir():
        pytest.skip(f"{root} is not there: real data are not part of the repository")
    sizes = {
        "sst2": ("train", "dev", 67349, 872),
        "trec": ("train", "test", 5452, 500),
        "rte": ("train", "val", 2490, 277),
        "copa": ("train", "val", 400, 100),
        "boolq": ("train1000", "val", 1000, 3270),
        "winogrande": ("train_xs", "dev", 160, 1267),
    }
    for name, (train, test, trained, tested) in sizes.items():
        splits = load_splits(str(root / name), TASKS[name], train=train, test=test)
        assert len(splits.train) + len(splits.validation) == trained and len(splits.test) == tested
    assert len(load_splits(str(root / "wikitext2"), TASKS["lm"], train="valid").train) > 1000
    speakers = load_splits(str(root / "shakespeare_roles"), TASKS["lm"], train="all", test="")
    parts = partition(speakers.train, 20, kind="natural", column="role")
    assert_partition(parts, len(speakers.train))
