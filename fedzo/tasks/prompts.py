"""What a task is, before any tokenizer: columns, classes, prompts. A new task is one entry of `TASKS`.

Templates name columns as ``{column}``; ``{mask}`` is where the answer goes, at the end where it is left out. Those of
SST-2, RTE, BoolQ, COPA and WinoGrande for causal models, and of SST-2, TREC and RTE for masked models, follow the
prompts published with MeZO (Malladi et al., 2023) and ZO-Bench (Zhang et al., 2024).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from string import Formatter
from typing import Any

from fedzo.errors import ConfigError, DataError
from fedzo.registry import nearest
from fedzo.tasks.encoding import Candidate

Example = dict[str, Any]
KINDS = ("causal", "masked", "encoder")


@dataclass(frozen=True)
class Prompt:
    """A template and the answer of each class."""

    template: str
    verbalizers: tuple[str, ...]


@lru_cache
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """The template as (literal text, column after it or None).

    Raises:
        ConfigError: unbalanced braces, or a placeholder that is not a plain column name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write a column as {{name}} and a brace as {{{{") from None
    for _, name, spec, conversion in parts:
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ConfigError(f"template {template!r}: a placeholder must be a plain column name such as {{sentence}}")
    if sum(name == "mask" for _, name, _, _ in parts) > 1:
        raise ConfigError(f"template {template!r} has several {{mask}}; it may have one")
    return tuple((literal, name) for literal, name, _, _ in parts)


def template_columns(template: str) -> tuple[str, ...]:
    """Columns that a template names, in order, each once."""
    return tuple(dict.fromkeys(name for _, name in parse_template(template) if name is not None and name != "mask"))


def render(template: str, example: Mapping[str, Any]) -> tuple[str, str]:
    """The texts before and after ``{mask}``; the latter is empty where the template has none."""
    sides = ["", ""]
    side = 0
    for literal, name in parse_template(template):
        sides[side] += literal
        if name == "mask":
            side = 1
        elif name is not None:
            sides[side] += str(example[name])
    return sides[0], sides[1]


@dataclass(frozen=True)
class TaskSpec:
    """A task without a tokenizer.

    Attributes:
        name: its name in a config.
        columns: text columns that every example must have.
        classes: for each class, the values that name it in a data file, in lower case; () for language modelling.
        label_column: where those values are.
        prompts: by kind ("causal", "masked").
        label_texts: for encoders, a sentence for each class, which initialises its row of the head.
        kind: "causal", "masked" or "encoder"; set by `task_spec`.
        template: for encoders, what replaces the columns as the model's text; set by `task_spec`.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...] = ()
    label_column: str = "label"
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    label_texts: tuple[str, ...] = ()
    kind: str = ""
    template: str = ""

    def kinds(self) -> tuple[str, ...]:
        """The kinds of model that the task can be put to."""
        return (*self.prompts, "encoder") if self.label_texts else tuple(self.prompts)

    def candidates(self, example: Example) -> list[Candidate]:
        """The candidates of an example in the order of the classes (causal and masked)."""
        prompt = self.prompts[self.kind]
        before, after = render(prompt.template, self.fields(example))
        return [Candidate(before, verbalizer, after) for verbalizer in prompt.verbalizers]

    def texts(self, example: Example) -> tuple[str, ...]:
        """The text or text pair that an encoder reads."""
        values = self.fields(example)
        if self.template:
            return ("".join(render(self.template, values)),)
        return tuple(str(values[column]) for column in self.columns)

    def fields(self, example: Example) -> Mapping[str, Any]:
        """The values that templates see."""
        return example

    def label(self, example: Example) -> int:
        """Index of the right class; 0 for language modelling.

        Raises:
            DataError: the value is none of the known labels.
        """
        if not self.classes:
            return 0
        value = example[self.label_column]
        name = _label_name(value)
        for index, names in enumerate(self.classes):
            if name in names:
                return index
        known = ", ".join("/".join(names) for names in self.classes)
        shown = repr(value) if isinstance(value, int | float) else f"a value of type {type(value).__name__}"
        raise DataError(
            f"unknown label ({shown}) in column {self.label_column!r}; task {self.name!r} knows {known}. "
            "Correct the file or choose the task that fits it"
        )

    def check(self, example: Example) -> None:
        """Raises DataError where the example lacks a column, has no text in one, or an unknown label."""
        needed = (*self.columns, self.label_column) if self.classes else self.columns
        for column in needed:
            if column not in example:
                found = ", ".join(map(str, example)) or "none"
                raise DataError(
                    f"column {column!r} is missing, which task {self.name!r} needs; columns found: {found}. Rename the "
                    "column in the file, or set the task's template to one that names your columns"
                )
        for column in self.columns:
            value = example[column]
            if not isinstance(value, str):
                raise DataError(f"column {column!r} must hold text, but holds {type(value).__name__}")
            if not value.strip():
                raise DataError(f"the text in column {column!r} is empty; remove the example or fill it in")
        self.label(example)


def _label_name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


@dataclass(frozen=True)
class Question(TaskSpec):
    """BoolQ: the question gets a capital; templates add the question mark that the data lacks."""

    def fields(self, example: Example) -> Mapping[str, Any]:
        question = str(example["question"]).strip().rstrip("?")
        return {**example, "question": question[:1].upper() + question[1:]}


@dataclass(frozen=True)
class Entailment(TaskSpec):
    """RTE: the masked template puts its own question mark in place of the premise's full stop."""

    def fields(self, example: Example) -> Mapping[str, Any]:
        if self.kind != "masked":
            return example
        return {**example, "premise": str(example["premise"]).strip().rstrip(".")}


@dataclass(frozen=True)
class Choice(TaskSpec):
    """COPA: "premise because/so choice"; the candidates are the example's own two choices."""

    def candidates(self, example: Example) -> list[Candidate]:
        premise = str(example["premise"]).strip().rstrip(".")
        connective = {"cause": "because", "effect": "so"}[str(example["question"]).strip().lower()]
        choices = (str(example[column]).strip() for column in ("choice1", "choice2"))
        lowered = [choice[:1].lower() + choice[1:] for choice in choices]
        if self.kind == "masked":  # the full stop stays outside the masks
            return [Candidate(f"{premise} {connective} ", choice.rstrip("."), ".") for choice in lowered]
        return [Candidate(f"{premise} {connective}", f" {choice}") for choice in lowered]

    def check(self, example: Example) -> None:
        super().check(example)
        if str(example["question"]).strip().lower() not in ("cause", "effect"):
            raise DataError("column 'question' must be 'cause' or 'effect'")


@dataclass(frozen=True)
class Blank(TaskSpec):
    """WinoGrande: an option fills the blank; a causal LM scores what follows the blank, given the option."""

    def candidates(self, example: Example) -> list[Candidate]:
        before, after = str(example["sentence"]).split("_")
        return [Candidate(before, str(example[column]).strip(), after) for column in ("option1", "option2")]

    def check(self, example: Example) -> None:
        super().check(example)
        blanks = str(example["sentence"]).count("_")
        if blanks != 1:
            raise DataError(f"column 'sentence' must have one blank '_', but has {blanks}")


_BINARY = (("0",), ("1",))

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "toy-reviews",
            columns=("sentence",),
            classes=_BINARY,
            prompts={
                "causal": Prompt("{sentence} it was", (" terrible", " great")),
                "masked": Prompt("{sentence} it was {mask} .", ("terrible", "great")),
            },
            label_texts=("it was terrible", "it was great"),
        ),
        TaskSpec(
            "sst2",
            columns=("sentence",),
            classes=(("0", "negative"), ("1", "positive")),
            prompts={
                "causal": Prompt("{sentence} It was", (" terrible", " great")),
                "masked": Prompt("{sentence} It was {mask}.", ("terrible", "great")),
            },
            label_texts=("It was terrible.", "It was great."),
        ),
        # The numbering of the classes is that of the data used with MeZO, not that of the hub's "trec".
        TaskSpec(
            "trec",
            columns=("sentence",),
            classes=(("0", "desc"), ("1", "enty"), ("2", "abbr"), ("3", "hum"), ("4", "loc"), ("5", "num")),
            prompts={
                "causal": Prompt(
                    "Question: {sentence}\nType of answer:",
                    (" Description", " Entity", " Abbreviation", " Person", " Location", " Number"),
                ),
                "masked": Prompt(
                    "{mask}: {sentence}", ("Description", "Entity", "Expression", "Human", "Location", "Number")
                ),
            },
            label_texts=(
                "What is the description or definition of it?",
                "What thing, animal or product is it?",
                "What does the abbreviation stand for?",
                "Who is the person?",
                "Where is the place?",
                "How many are there, or when was it?",
            ),
        ),
        Entailment(
            "rte",
            columns=("premise", "hypothesis"),
            classes=(("0", "entailment"), ("1", "not_entailment")),
            prompts={
                "causal": Prompt('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No")),
                "masked": Prompt("{premise}? {mask}, {hypothesis}", ("Yes", "No")),
            },
            label_texts=("Yes, the second follows from the first.", "No, the second does not follow from the first."),
        ),
        Question(
            "boolq",
            columns=("passage", "question"),
            classes=(("0", "false", "no"), ("1", "true", "yes")),
            prompts={
                "causal": Prompt("{passage} {question}?\n", ("No", "Yes")),
                "masked": Prompt("{passage} {question}? {mask}.", ("No", "Yes")),
            },
            label_texts=("No, that is false.", "Yes, that is true."),
        ),
        Choice(
            "copa",
            columns=("premise", "choice1", "choice2", "question"),
            classes=_BINARY,
            prompts={"causal": Prompt("", ()), "masked": Prompt("", ())},
        ),
        Blank(
            "winogrande",
            columns=("sentence", "option1", "option2"),
            classes=(("1",), ("2",)),
            label_column="answer",
            prompts={"causal": Prompt("", ()), "masked": Prompt("", ())},
        ),
        TaskSpec("lm", columns=("text",), prompts={"causal": Prompt("", ())}),
    )
}


def task_spec(name: str, kind: str, *, template: str = "", verbalizers: Sequence[str] = ()) -> TaskSpec:
    """The task called `name`, put to a model of `kind`, with its template or verbalizers replaced where given.

    `name` is a key of `TASKS`, or "custom", which needs a template and verbalizers: its labels are 0, 1, ... or the
    verbalizers' own words. For an encoder the template is the model's text and the verbalizers are the label texts.

    Raises:
        ConfigError: unknown task or kind, a task that does not fit the kind, or overrides that do not fit the task.
    """
    answers = tuple(verbalizers)
    if kind not in KINDS:
        raise ConfigError(f"model kind {kind!r} is unknown; choose {', '.join(KINDS)}")
    if name == "custom":
        if not template or len(answers) < 2:
            raise ConfigError(
                "task 'custom' needs a template such as \"{text} It was\" and at least two verbalizers; "
                f"found template {template!r} and {len(answers)} verbalizers"
            )
        spec = TaskSpec("custom", columns=(), classes=_custom_classes(answers))
    elif name in TASKS:
        spec = TASKS[name]
        if kind not in spec.kinds():
            raise ConfigError(f"task {name!r} needs a model of kind {' or '.join(spec.kinds())}, but it is {kind!r}")
    else:
        raise ConfigError(f"unknown task {name!r}. {nearest(name, [*TASKS, 'custom'])}")
    spec = dataclasses.replace(spec, kind=kind)
    if not template and not answers:
        return spec
    if name != "custom" and kind != "encoder" and not spec.prompts[kind].template:
        raise ConfigError(f"task {name!r} has no template or verbalizers to replace; leave both empty")
    if answers and len(answers) != len(spec.classes):
        raise ConfigError(f"task {name!r} has {len(spec.classes)} classes, but {len(answers)} verbalizers are given")
    if len(set(answers)) != len(answers) or not all(answer.strip() for answer in answers):
        raise ConfigError(f"verbalizers must be different from each other and not empty; found {list(answers)}")
    if template:
        spec = dataclasses.replace(spec, columns=template_columns(template))
        if not spec.columns:
            raise ConfigError(f'template {template!r} names no column; write one as in "{{sentence}} It was"')
    if kind == "encoder":
        return dataclasses.replace(spec, template=template, label_texts=answers or spec.label_texts)
    given = spec.prompts.get(kind, Prompt("", ()))
    prompt = Prompt(template or given.template, answers or given.verbalizers)
    if kind == "masked" and "mask" not in [name for _, name in parse_template(prompt.template)]:
        raise ConfigError(f"template {prompt.template!r} has no {{mask}}, which a masked model needs")
    return dataclasses.replace(spec, prompts={kind: prompt})


def _custom_classes(verbalizers: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Class i is named by i and by its verbalizer's word, unless that word is itself a class number."""
    numbers = [str(index) for index in range(len(verbalizers))]
    words = [verbalizer.strip().lower() for verbalizer in verbalizers]
    return tuple((number,) if word in numbers else (number, word) for number, word in zip(numbers, words, strict=True))
