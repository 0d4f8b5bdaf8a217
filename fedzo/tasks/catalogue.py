"""The tasks: columns, labels and prompts of published benchmarks. A new task is one entry of `TASKS`.

For causal models the prompts are those published with MeZO (Malladi et al., arXiv 2305.17333; for SuperGLUE after
PromptSource) for SST-2, RTE, CB, BoolQ, WSC, WiC, MultiRC, COPA, ReCoRD, WinoGrande, SQuAD and DROP; for masked models
those that it took from LM-BFF (Gao et al., arXiv 2012.15723) for SST-2, SST-5, TREC, RTE, SNLI and MNLI. The masked
forms of WiC and MultiRC follow PET (Schick and Schuetze, arXiv 2009.07118). The rest are our own, or those of a task
that is like them: docs/tasks.md says which. Columns, label values and the order of labels are those of the data sets on
the Hugging Face hub.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedzo.errors import ConfigError, DataError
from fedzo.registry import nearest
from fedzo.tasks.encoding import Candidate
from fedzo.tasks.prompts import Example, Prompt, TaskSpec, parse_template, template_columns, texts_in

KINDS = ("causal", "masked", "encoder")


@dataclass(frozen=True)
class Question(TaskSpec):
    """BoolQ: the question gets a capital; templates add the question mark that the data lacks."""

    def fields(self, example: Example) -> Mapping[str, Any]:
        question = str(example["question"]).strip().rstrip("?")
        return {**example, "question": question[:1].upper() + question[1:]}


@dataclass(frozen=True)
class Entailment(TaskSpec):
    """RTE, CB, SNLI, MNLI. In the masked template a question mark takes the place of the premise's last punctuation
    mark, and the hypothesis goes on with a small letter."""

    def fields(self, example: Example) -> Mapping[str, Any]:
        if self.kind != "masked":
            return example
        premise, hypothesis = (str(example[column]).strip() for column in ("premise", "hypothesis"))
        premise = premise[:-1] if premise[-1:] in (".", ",", ";", ":", "!", "?") else premise
        return {**example, "premise": premise, "hypothesis": hypothesis[:1].lower() + hypothesis[1:]}


@dataclass(frozen=True)
class Pronoun(TaskSpec):
    """WSC: does the pronoun, span 2, refer to span 1?"""

    def fields(self, example: Example) -> Mapping[str, Any]:
        return {**example, "span2_text": str(example["span2_text"]).lower()}


@dataclass(frozen=True)
class Questions(TaskSpec):
    """TREC: the hub's own data set numbers the classes in another way, in a column of another name."""

    def adapt(self, example: Example) -> Example:
        adapted = super().adapt(example)
        if "label" not in adapted and "coarse_label" in adapted:
            coarse = adapted["coarse_label"]
            names = {0: "abbr", 1: "enty", 2: "desc", 3: "hum", 4: "loc", 5: "num"}
            adapted["label"] = names.get(coarse, coarse) if isinstance(coarse, int) else coarse
        return adapted


@dataclass(frozen=True)
class Choice(TaskSpec):
    """COPA: "premise because/so choice"; the candidates are the example's own two choices."""

    def candidates(self, example: Example) -> list[Candidate]:
        premise = str(example["premise"]).strip().removesuffix(".")
        connective = {"cause": "because", "effect": "so"}[str(example["question"]).strip().lower()]
        choices = (str(example[column]).strip() for column in ("choice1", "choice2"))
        lowered = [_small_first_word(choice) for choice in choices]
        if self.kind == "masked":  # the full stop stays outside the masks
            return [Candidate(f"{premise} {connective} ", choice.rstrip("."), ".") for choice in lowered]
        return [Candidate(f"{premise} {connective}", f" {choice}") for choice in lowered]

    def check(self, example: Example) -> None:
        super().check(example)
        if str(example["question"]).strip().lower() not in ("cause", "effect"):
            raise DataError("column 'question' must be 'cause' or 'effect'")


def _small_first_word(text: str) -> str:
    first, space, rest = text.partition(" ")
    return text if first == "I" or first.startswith("I'") else first.lower() + space + rest


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


@dataclass(frozen=True)
class Entity(TaskSpec):
    """ReCoRD: one of the passage's entities stands at @placeholder in the query; several may be right.

    A causal LM scores the whole query with each entity in it, a masked LM the entity at the masks. The first right
    entity is trained; each right one counts as correct.
    """

    def candidates(self, example: Example) -> list[Candidate]:
        before = str(example["passage"]).replace("@highlight\n", "- ") + "\n-"
        query, entities = str(example["query"]), _entities(example)
        if self.kind == "masked":
            left, _, right = query.partition("@placeholder")
            return [Candidate(f"{before} {left}", entity, right) for entity in entities]
        return [Candidate(before, " " + query.replace("@placeholder", entity)) for entity in entities]

    def right(self, example: Example) -> tuple[int, ...]:
        entities = _entities(example)
        return tuple(entities.index(answer) for answer in dict.fromkeys(texts_in(example["answers"])))

    def label(self, example: Example) -> int:
        return self.right(example)[0]

    def check(self, example: Example) -> None:
        for column in ("entities", "answers"):
            if not texts_in(example.get(column)):
                raise DataError(
                    f"column {column!r} must hold a list of texts, at least one; the hub's test split has no answers, "
                    "report on validation"
                )
        missing = set(texts_in(example["answers"])) - set(_entities(example))
        if missing:
            raise DataError(f"column 'answers' has {len(missing)} answers that are not in column 'entities'; add them")
        if "@placeholder" not in str(example.get("query", "@placeholder")):
            raise DataError("column 'query' must have @placeholder where the entity is to be put")
        super().check(example)


def _entities(example: Example) -> list[str]:
    return list(dict.fromkeys(texts_in(example["entities"])))


@dataclass(frozen=True)
class Reading(TaskSpec):
    """SQuAD, DROP: the model generates the answer to a question about a text.

    What is trained is the mean negative log-likelihood of the first reference answer and the end of its line.
    """

    def candidates(self, example: Example) -> list[Candidate]:
        return [Candidate(self.prompt(example), f" {self.references(example)[0].strip()}\n")]

    def prompt(self, example: Example) -> str:
        """What the model goes on from."""
        return "".join(self.render(example))

    def fields(self, example: Example) -> Mapping[str, Any]:
        return {**example, "question": str(example["question"]).strip()} if "question" in example else example

    def references(self, example: Example) -> tuple[str, ...]:
        """The right answers, each once: a text, a list of texts, or the hub's {"text": [...]} and {"spans": [...]}."""
        value = example.get(self.label_column)
        if isinstance(value, Mapping):
            value = value.get("text", value.get("spans"))
        return tuple(dict.fromkeys(texts_in(value)))

    def check(self, example: Example) -> None:
        super().check(example)
        if not self.references(example):
            raise DataError(
                f"column {self.label_column!r} must hold an answer: a text, a list of texts, or an object with such a "
                'list as "text" or "spans"; leave questions without an answer out'
            )


_BINARY = (("0",), ("1",))
_NO_YES = (("0", "false", "no"), ("1", "true", "yes"))
_THREE_WAY = (("0", "entailment"), ("1", "neutral"), ("2", "contradiction"))
_PAIR = {"premise": "sentence1", "hypothesis": "sentence2"}
_SUPPOSE = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_FOLLOWS = "Yes, the second follows from the first."
_MAYBE = "Maybe, the second may be true or not."
_CONTRADICTS = "No, the second contradicts the first."
_YES_NO_TEXTS = ("No, that is false.", "Yes, that is true.")

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
            aliases={"sentence": "text"},
        ),
        TaskSpec(
            "sst5",
            columns=("text",),
            classes=(
                ("0", "very negative"),
                ("1", "negative"),
                ("2", "neutral"),
                ("3", "positive"),
                ("4", "very positive"),
            ),
            prompts={
                "causal": Prompt("{text} It was", (" terrible", " bad", " okay", " good", " great")),
                "masked": Prompt("{text} It was {mask}.", ("terrible", "bad", "okay", "good", "great")),
            },
            label_texts=("It was terrible.", "It was bad.", "It was okay.", "It was good.", "It was great."),
            aliases={"text": "sentence"},
        ),
        # The numbering of the classes is that of the data used with MeZO, not that of the hub's "trec".
        Questions(
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
            aliases={"sentence": "text"},
        ),
        Entailment(
            "rte",
            columns=("premise", "hypothesis"),
            classes=(("0", "entailment"), ("1", "not_entailment")),
            prompts={
                "causal": Prompt('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No")),
                "masked": Prompt("{premise}? {mask}, {hypothesis}", ("Yes", "No")),
            },
            label_texts=(_FOLLOWS, "No, the second does not follow from the first."),
            aliases=_PAIR,
        ),
        Entailment(
            "cb",
            columns=("premise", "hypothesis"),
            classes=(("0", "entailment"), ("1", "contradiction"), ("2", "neutral")),
            prompts={
                "causal": Prompt(_SUPPOSE, ("Yes", "No", "Maybe")),
                "masked": Prompt("{premise}? {mask}, {hypothesis}", ("Yes", "No", "Maybe")),
            },
            label_texts=(_FOLLOWS, _CONTRADICTS, _MAYBE),
        ),
        *(
            Entailment(
                name,
                columns=("premise", "hypothesis"),
                classes=_THREE_WAY,
                prompts={
                    "causal": Prompt(_SUPPOSE, ("Yes", "Maybe", "No")),
                    "masked": Prompt("{premise}? {mask}, {hypothesis}", ("Yes", "Maybe", "No")),
                },
                label_texts=(_FOLLOWS, _MAYBE, _CONTRADICTS),
                aliases={**_PAIR, "label": "gold_label"},
                unlabelled=("-1", "-"),
            )
            for name in ("snli", "mnli")
        ),
        Question(
            "boolq",
            columns=("passage", "question"),
            classes=_NO_YES,
            prompts={
                "causal": Prompt("{passage} {question}?\n", ("No", "Yes")),
                "masked": Prompt("{passage} {question}? {mask}.", ("No", "Yes")),
            },
            label_texts=_YES_NO_TEXTS,
            aliases={"label": "answer"},
        ),
        Pronoun(
            "wsc",
            columns=("text", "span1_text", "span2_text"),
            classes=_NO_YES,
            prompts={
                "causal": Prompt(
                    '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? '
                    "Yes or No?\n",
                    ("No", "Yes"),
                ),
                "masked": Prompt(
                    '{text} In the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? {mask}.',
                    ("No", "Yes"),
                ),
            },
            label_texts=_YES_NO_TEXTS,
            template='{text} The pronoun "{span2_text}" refers to {span1_text}.',
        ),
        TaskSpec(
            "wic",
            columns=("word", "sentence1", "sentence2"),
            classes=_NO_YES,
            prompts={
                "causal": Prompt(
                    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n'
                    "{sentence2}\n",
                    ("No", "Yes"),
                ),
                "masked": Prompt(
                    '"{sentence1}" / "{sentence2}" Similar sense of "{word}"? {mask}.',
                    ("No", "Yes"),
                ),
            },
            label_texts=_YES_NO_TEXTS,
            template='The word "{word}" has the same meaning in: {sentence1} / {sentence2}',
        ),
        TaskSpec(
            "multirc",
            columns=("paragraph", "question", "answer"),
            classes=_NO_YES,
            prompts={
                "causal": Prompt(
                    '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
                    ("No", "Yes"),
                ),
                "masked": Prompt('{paragraph} Question: {question} Is it "{answer}"? {mask}.', ("No", "Yes")),
            },
            label_texts=_YES_NO_TEXTS,
            template="{question} {answer} {paragraph}",
        ),
        Choice(
            "copa",
            columns=("premise", "choice1", "choice2", "question"),
            classes=_BINARY,
            prompts={"causal": Prompt("", ()), "masked": Prompt("", ())},
            form="choices",
        ),
        Entity(
            "record",
            columns=("passage", "query"),
            label_column="answers",
            prompts={"causal": Prompt("", ()), "masked": Prompt("", ())},
            form="choices",
        ),
        Blank(
            "winogrande",
            columns=("sentence", "option1", "option2"),
            classes=(("1",), ("2",)),
            label_column="answer",
            prompts={"causal": Prompt("", ()), "masked": Prompt("", ())},
            form="choices",
        ),
        Reading(
            "squad",
            columns=("title", "context", "question"),
            label_column="answers",
            prompts={"causal": Prompt("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", ())},
            form="answer",
        ),
        Reading(
            "drop",
            columns=("passage", "question"),
            label_column="answers_spans",
            prompts={"causal": Prompt("Passage: {passage}\nQuestion: {question}\nAnswer:", ())},
            form="answer",
            aliases={"answers_spans": "answers"},
        ),
        TaskSpec("lm", columns=("text",), prompts={"causal": Prompt("", ())}, form="text"),
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
        return dataclasses.replace(spec, template=template or spec.template, label_texts=answers or spec.label_texts)
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
