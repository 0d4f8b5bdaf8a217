"""What a task is, before any tokenizer: columns, classes, prompts.

Templates name columns as ``{column}``; ``{mask}`` is where the answer goes, at the end where it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from string import Formatter
from typing import Any, Literal

from fedzo.errors import ConfigError, DataError
from fedzo.tasks.encoding import Candidate

Example = dict[str, Any]


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
        classes: for each class, the values that name it in a data file, in lower case; () where there are none.
        label_column: where those values, or the reference answers, are.
        prompts: by kind ("causal", "masked").
        label_texts: for encoders, a sentence for each class, which initialises its row of the head.
        kind: "causal", "masked" or "encoder"; set by `task_spec`.
        template: for encoders, what replaces the columns as the model's text.
        form: "classes" (the same in every example), "choices" (an example's own candidates), "answer" (a text that the
            model generates) or "text" (language modelling).
        aliases: for a column, its name in other published data of the task.
        unlabelled: label values of examples that annotators did not agree on, which are left out.
    """

    name: str
    columns: tuple[str, ...]
    classes: tuple[tuple[str, ...], ...] = ()
    label_column: str = "label"
    prompts: Mapping[str, Prompt] = field(default_factory=dict)
    label_texts: tuple[str, ...] = ()
    kind: str = ""
    template: str = ""
    form: Literal["classes", "choices", "answer", "text"] = "classes"
    aliases: Mapping[str, str] = field(default_factory=dict)
    unlabelled: tuple[str, ...] = ()

    def kinds(self) -> tuple[str, ...]:
        """The kinds of model that the task can be put to."""
        return (*self.prompts, "encoder") if self.label_texts else tuple(self.prompts)

    def candidates(self, example: Example) -> list[Candidate]:
        """The candidates of an example in the order of the classes (causal and masked)."""
        before, after = self.render(example)
        return [Candidate(before, verbalizer, after) for verbalizer in self.prompts[self.kind].verbalizers]

    def render(self, example: Example) -> tuple[str, str]:
        """The kind's template with the example's values: the texts before and after the answer."""
        return render(self.prompts[self.kind].template, self.fields(example))

    def texts(self, example: Example) -> tuple[str, ...]:
        """The text or text pair that an encoder reads."""
        values = self.fields(example)
        if self.template:
            return ("".join(render(self.template, values)),)
        return tuple(str(values[column]) for column in self.columns)

    def fields(self, example: Example) -> Mapping[str, Any]:
        """The values that templates see."""
        return example

    def adapt(self, example: Example) -> Example:
        """The example with the task's own columns, where it has them under an alias."""
        renamed = {name: example[alias] for name, alias in self.aliases.items() if alias in example}
        return {**renamed, **example}

    def labelled(self, example: Example) -> bool:
        """Whether the annotators agreed on a label."""
        return not self.unlabelled or _label_name(example.get(self.label_column)) not in self.unlabelled

    def right(self, example: Example) -> tuple[int, ...]:
        """Indices of the right candidates; the first is the one that is trained."""
        return (self.label(example),)

    def label(self, example: Example) -> int:
        """Index of the right class or candidate; 0 where there is one candidate only (generation, plain text).

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
        hidden = "The hub's test splits of GLUE and SuperGLUE have -1: their labels are secret, report on validation. "
        raise DataError(
            f"unknown label ({shown}) in column {self.label_column!r}; task {self.name!r} knows {known}. "
            f"{hidden if name == '-1' else ''}Correct the file or choose the task that fits it"
        )

    def check(self, example: Example) -> None:
        """Raises DataError where the example lacks a column, has no text in one, or an unknown label."""
        needed = (*self.columns, self.label_column) if self.classes else self.columns
        for column in needed:
            if column not in example:
                found = ", ".join(map(str, example)) or "none"
                other = f" (or {self.aliases[column]!r})" if column in self.aliases else ""
                raise DataError(
                    f"column {column!r}{other} is missing, which task {self.name!r} needs; columns found: {found}. "
                    "Rename the column in the file, or set the task's template to one that names your columns"
                )
        for column in self.columns:
            value = example[column]
            if not isinstance(value, str):
                raise DataError(f"column {column!r} must hold text, but holds {type(value).__name__}")
            if not value.strip():
                raise DataError(f"the text in column {column!r} is empty; remove the example or fill it in")
        self.label(example)


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts of a list, or the one text; those that are blank or no text are left out."""
    values = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    return tuple(text for text in values if isinstance(text, str) and text.strip())


def _label_name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()
