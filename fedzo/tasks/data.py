"""Examples from files and hubs, checked, in three splits that are kept apart."""

import csv
import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedzo.directions import philox
from fedzo.errors import DataError
from fedzo.tasks.prompts import Example, TaskSpec

Ints = npt.NDArray[np.int64]
Located = list[tuple[str, Example]]  # each example with where it comes from: file and line, for messages


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to select on and to report on; each has its class index in "label".

    Attributes:
        train_in_test, validation_in_test, train_in_validation: how many examples of the first split have the same
            text (all of the task's columns) as one of the second: a warning to show, they are kept.
        unlabelled: how many examples were left out because their annotators agreed on no label.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    train_in_test: int
    validation_in_test: int
    train_in_validation: int
    unlabelled: int = 0


def permutation(seed: int, count: int) -> Ints:
    """The numbers below `count` in random order, a function of `seed` alone (a stable sort of Philox words)."""
    return np.argsort(philox.words(seed, count), kind="stable").astype(np.int64)


def load_splits(
    source: str,
    spec: TaskSpec,
    *,
    train: str = "train",
    validation: str = "",
    test: str = "test",
    validation_fraction: float = 0.05,
    seed: int = 0,
    limit: int = 0,
    validation_limit: int = 0,
    shots: int = 0,
) -> Splits:
    """Load, check and split the examples of a task.

    Args:
        source: "embedded", a local directory, a single local file (which is then `train`), or a data set's name on
            the hub, with its configuration after a slash where it has several ("glue/sst2", "owner/name/config").
        spec: the task, whose columns and labels are checked in every example.
        train, validation, test: splits of a hub data set, or files: relative to the directory, with or without their
            ending (.jsonl, .json, .csv, .tsv, .parquet, and .txt for language modelling, where a paragraph is a
            document). Empty validation: a part of train, which is removed from train (the embedded data has its
            own). Empty test: none. Empty train: none, where every client has its own.
        validation_fraction: that part, between 0 and 1.
        seed: decides which part, and which examples a limit leaves.
        limit: training examples at most, a random choice in the file's order; 0: all.
        validation_limit: the same for validation.
        shots: k, instead of a limit: training examples of each class (in all, where the task has no fixed classes), and
            as many others for validation where that comes from train; 0: off.

    Raises:
        DataError: nothing there, unreadable or empty, a column or text missing, an unknown label, the same file
            or content named for two splits, or fewer examples of a class than shots.
    """
    if not train and not validation:
        raise DataError(f"{source}: without a train split there is none to take validation from; name data.validation")
    load, names = _opened(source, train, validation, test)
    given = [name for name in names if name]
    if len(set(given)) != len(given):
        raise DataError(
            f"train, validation and test must differ, but are {', '.join(map(repr, names))}; leave validation empty to "
            "select on a part of train"
        )
    shown = [name if Path(name).is_absolute() else f"{source}, split {name}" for name in names]
    located = [load(name) if name else [] for name in names]
    parts = [
        _checked(found, spec, show) if name else [] for found, name, show in zip(located, names, shown, strict=True)
    ]
    unlabelled = sum(not spec.labelled(spec.adapt(example)) for found in located for _, example in found)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        if parts[first] and parts[first] == parts[second]:
            raise DataError(f"{source}: {names[first]!r} and {names[second]!r} hold the same examples; change one")
    training, selection, report = parts
    order = permutation(seed, len(training))
    if shots and training:
        chosen, held_out = _few(training, order, spec, shots, source, validate=not names[1])
        selection = selection if names[1] else [training[i] for i in np.sort(held_out)]
        order = chosen
    elif not names[1]:
        count = math.ceil(validation_fraction * len(training))
        if not 0 < count < len(training):
            raise DataError(
                f"{source}: validation_fraction {validation_fraction} of {len(training)} training examples leaves "
                "train or validation empty; name a validation file, or set a fraction between 0 and 1 that fits"
            )
        selection = [training[i] for i in np.sort(order[:count])]
        order = order[count:]
    training = [training[i] for i in np.sort(order[:limit] if limit else order)]
    if validation_limit and validation_limit < len(selection):
        selection = [selection[i] for i in np.sort(permutation(seed, len(selection))[:validation_limit])]
    keys = [[tuple(example[column] for column in spec.columns) for example in p] for p in (training, selection, report)]
    seen = [set(part) for part in keys]
    return Splits(
        training,
        selection,
        report,
        train_in_test=sum(key in seen[2] for key in keys[0]),
        validation_in_test=sum(key in seen[2] for key in keys[1]),
        train_in_validation=sum(key in seen[1] for key in keys[0]),
        unlabelled=unlabelled,
    )


def load_file(path: Path, spec: TaskSpec) -> list[Example]:
    """The checked examples of one file, all of them.

    Raises:
        DataError: as `load_splits`.
    """
    path = path.expanduser().resolve()
    if not path.is_file() or path.suffix.lower() not in _READERS:
        raise DataError(f"there is no data file {path} of a known kind ({', '.join(_READERS)})")
    return _checked(_read(str(path)), spec, str(path))


def _few(
    examples: list[Example], order: Ints, spec: TaskSpec, shots: int, source: str, validate: bool
) -> tuple[Ints, Ints]:
    """The first `shots` examples of each class in `order`, and, to validate, those that follow them."""
    labels = np.array([spec.label(example) if spec.form == "classes" else 0 for example in examples])
    wanted = 2 * shots if validate else shots
    chosen: list[Ints] = []
    for label in range(len(spec.classes) if spec.form == "classes" else 1):
        members = order[labels[order] == label]
        if len(members) < wanted:
            of = f" of class {'/'.join(spec.classes[label])}" if spec.form == "classes" else ""
            why = f"{shots} to train on and as many to select on" if validate else f"{shots} to train on"
            hint = ", or name a validation file" if validate and len(members) >= shots else ""
            raise DataError(
                f"{source}: data.shots is {shots}, which needs {wanted} training examples{of} ({why}), but there are "
                f"{len(members)}; lower data.shots{hint}"
            )
        chosen.append(members[:wanted])
    return np.concatenate([part[:shots] for part in chosen]), np.concatenate([part[shots:] for part in chosen])


def _opened(source: str, train: str, validation: str, test: str) -> tuple[Callable[[str], Located], list[str]]:
    """How a split of `source` is loaded by its name, and the names of the three splits."""
    if source == "embedded":
        folder = Path(__file__).resolve().parents[1] / "embedded" / "data"
        names = [train, validation or "validation", test]
        return _read, [str(_find(folder, name)) if name else "" for name in names]
    path = Path(source).expanduser()
    if path.is_file():
        path, train = path.parent, path.name
    if path.is_dir():
        names = [train, validation, test]
        return _read, [str(_find(path, name)) if name else "" for name in names]
    if source.startswith((".", "/", "~")) or path.suffix in _READERS:
        near = ", ".join(_nearest(path.name, path.parent)) or "nothing"
        raise DataError(f"there is no directory or file {source}; near it there is {near}")
    return _hub(source), [train, validation, test]


def _nearest(name: str, folder: Path) -> list[str]:
    """The names in a folder that are most like `name`."""
    present = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return difflib.get_close_matches(name, present, 3, 0.4) or present[:5]


def _find(folder: Path, name: str) -> Path:
    """The data file called `name` in `folder`, with or without its ending."""
    exact = folder / name
    if exact.is_file():
        found = [exact]
    else:
        found = [path for suffix in _READERS if (path := folder / f"{name}{suffix}").is_file()]
    if not found:
        near = ", ".join(_nearest(name, folder)) or "nothing"
        raise DataError(f"{folder}: there is no data file {name!r}; near it there is {near}. Set its name")
    if len(found) > 1:
        raise DataError(f"{folder}: {name!r} may be {' or '.join(path.name for path in found)}; give it in full")
    if found[0].suffix.lower() not in _READERS:
        raise DataError(f"{found[0]}: unknown kind of file; known: {', '.join(_READERS)}")
    return found[0].resolve()


def _read(name: str) -> Located:
    """The examples of a file."""
    path = Path(name)
    try:
        return [(f"{path}, {place}", example) for place, example in _READERS[path.suffix.lower()](path)]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it in that encoding") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or type(error).__name__}") from None


def _checked(located: Located, spec: TaskSpec, name: str) -> list[Example]:
    """The examples with their class index as "label".

    Documents without text are left out in language modelling, and examples that the task counts as unlabelled.
    """
    located = [(place, spec.adapt(example)) for place, example in located]
    if located and not any(spec.labelled(example) for _, example in located):
        raise DataError(
            f"{name}: none of its {len(located)} examples has a label; the hub's test splits of GLUE keep theirs "
            "secret: name another split, such as validation"
        )
    located = [(place, example) for place, example in located if spec.labelled(example)]
    if spec.form == "text":
        blank = {"", None}
        located = [(place, e) for place, e in located if not any(_blank(e.get(c, "-"), blank) for c in spec.columns)]
    if not located:
        raise DataError(f"{name} has no examples; name a file or split that has some")
    examples: list[Example] = []
    for place, example in located:
        try:
            spec.check(example)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None
        examples.append({**example, "label": spec.label(example)} if spec.classes else example)
    return examples


def _blank(value: Any, blank: set[str | None]) -> bool:
    return (value.strip() if isinstance(value, str) else value) in blank


def _jsonl(path: Path) -> Iterator[tuple[str, Example]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(example, dict):
                raise DataError(f"{path}, line {number}: must be a JSON object with named columns")
            yield f"line {number}", example


def _json(path: Path) -> Iterator[tuple[str, Example]]:
    try:
        examples = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); a file with one object a line must end in .jsonl"
        ) from None
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise DataError(f"{path}: must be a list of JSON objects with named columns")
    yield from ((f"example {number}", example) for number, example in enumerate(examples, 1))


def _table(path: Path) -> Iterator[tuple[str, Example]]:
    """CSV with quotes, or TSV without: in published TSV files a quote is a character of the text."""
    tsv = path.suffix.lower() == ".tsv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else csv.reader(file)
        try:
            header = next(rows, [])
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}, line {rows.line_num}: has {len(row)} fields, but the header names {len(header)}"
                    )
                if row:
                    yield f"line {rows.line_num}", dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Example]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        examples = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({type(error).__name__})") from None
    yield from ((f"row {number}", example) for number, example in enumerate(examples, 1))


def _text(path: Path) -> Iterator[tuple[str, Example]]:
    """Paragraphs, which blank lines part."""
    paragraph: list[str] = []
    start = 1
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate([*lines, ""], 1):
            if line.strip():
                start = start if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield f"line {start}", {"text": "".join(paragraph)}
                paragraph = []


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Example]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _text,
}


def _hub(source: str) -> Callable[[str], Located]:
    """How a split of a hub data set is loaded: "name", "owner/name", "name/config" or "owner/name/config"."""
    from datasets import get_dataset_split_names, load_dataset

    owner_name, _, config = source.rpartition("/")
    forms: list[tuple[str, ...]] = [(source,)] if source.count("/") < 2 else []
    forms += [(owner_name, config)] if owner_name else []

    def load(split: str) -> Located:
        reason = ""
        for form in forms:
            try:
                data = _load(load_dataset, form, split)
                return [(f"{source}, {split}, row {number}", dict(row)) for number, row in enumerate(data, 1)]
            except ValueError as error:  # the data set is there, its split or configuration is not
                reason = str(error).splitlines()[0]
                if "split" in reason.lower():
                    names = ", ".join(get_dataset_split_names(*form))
                    raise DataError(f"data set {source!r} has no split {split!r}; it has {names}") from None
            except Exception as error:  # the hub's client raises many kinds: not found, offline, gated, no network
                reason = reason or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise DataError(
            f"{source!r} is no local directory, and cannot be loaded from the hub: {reason}. Give the path of a "
            "directory with your files, or check the name and the network"
        )

    return load


def _load(load_dataset: Callable[..., Any], form: tuple[str, ...], split: str) -> Any:
    """A split of (name,) or (name, configuration).

    `datasets` no longer runs the loading scripts of older data sets; the hub keeps their examples as Parquet files in
    a branch, where each configuration is a directory.
    """
    try:
        return load_dataset(*form, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    folder = {"data_dir": form[1]} if len(form) == 2 else {}
    return load_dataset(form[0], revision="refs/convert/parquet", split=split, **folder)
