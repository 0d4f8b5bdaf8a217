"""A task with its tokenizer: examples in, rows of tokens and labels out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fedzo.errors import ConfigError, DataError
from fedzo.tasks import encoding
from fedzo.tasks.catalogue import Reading, task_spec
from fedzo.tasks.prompts import Example, TaskSpec


@dataclass(frozen=True)
class Task:
    """A task, ready to encode examples for one tokenizer.

    Attributes:
        spec: columns, classes and prompts.
        tokenizer: a transformers tokenizer.
        max_length: most tokens in a row of the model's input, special tokens included.
    """

    spec: TaskSpec
    tokenizer: Any
    max_length: int

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        """ "causal", "masked" or "encoder"."""
        return self.spec.kind

    @property
    def num_labels(self) -> int | None:
        """Number of classes; None where the task has no classes."""
        return len(self.spec.classes) or None

    @property
    def label_texts(self) -> tuple[str, ...]:
        """A sentence for each class, to initialise an encoder's head with."""
        return self.spec.label_texts

    @property
    def pad_token_id(self) -> int:
        return encoding.pad_token(self.tokenizer)

    def prepare(self, examples: Sequence[Example], column: str = "") -> list[Example]:
        """What is partitioned and encoded: for language modelling blocks of text, else the examples themselves.

        Documents that follow each other are joined, each ended by the tokenizer's EOS where it has one, and cut into
        blocks of at most `max_length` tokens (BOS included). With `column` (natural ids) only documents with the same
        value there are joined, and blocks keep it, so that no block holds the text of two clients. A block is
        an example with "tokens"; blocks are left as they are.
        """
        if self.spec.form != "text":
            return list(examples)
        if column and any(column not in example for example in examples):
            raise DataError(f"column {column!r} is missing in some documents; it must name the client of each")
        prefix = len(encoding.causal_prefix(self.tokenizer))
        room = max(1, self.max_length + 1 - max(1, prefix))
        fewest = 1 if prefix else 2  # a block must have a token that another one predicts
        end = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        blocks: list[Example] = []
        for (whole, identity), documents in groupby(
            examples, lambda example: ("tokens" in example, example[column] if column else None)
        ):
            if whole:
                blocks.extend(documents)
                continue
            texts = [str(document["text"]) for document in documents]
            ids = encoding.token_ids(self.tokenizer, texts)
            stream = [token for text in texts for token in (*ids[text], *end)]
            kept = {column: identity} if column else {}
            cut = (stream[start : start + room] for start in range(0, len(stream), room))
            blocks.extend({**kept, "tokens": block} for block in cut if len(block) >= fewest)
        return blocks

    def encode(self, examples: Sequence[Example], first: int = 0) -> list[list[encoding.Row]]:
        """Rows of each prepared example; `first` is the number of the first one, for error messages.

        Raises:
            DataError: a text or candidate is empty or does not fit; names the example by its number.
        """
        if self.spec.form == "text":
            return encoding.block_rows([example["tokens"] for example in examples], self.tokenizer)
        if self.kind == "encoder":
            texts = [self.spec.texts(example) for example in examples]
            return encoding.encoder_rows(texts, self.tokenizer, self.max_length, first)
        candidates = [self.spec.candidates(example) for example in examples]
        encode = encoding.causal_rows if self.kind == "causal" else encoding.masked_rows
        return encode(candidates, self.tokenizer, self.max_length, first)

    def prompts(self, items: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        """Token ids that the answer to each item is generated from; a long prompt loses its beginning.

        With the new tokens they are at most `max_length`.

        Raises:
            ConfigError: the new tokens leave no room for a prompt.
        """
        assert isinstance(self.spec, Reading)
        prefix = encoding.causal_prefix(self.tokenizer)
        room = self.max_length - max_new_tokens - len(prefix)
        if room < 1:
            raise ConfigError(
                f"evaluation.max_new_tokens is {max_new_tokens} and model.max_length {self.max_length}, which leaves "
                "no room for a prompt; raise model.max_length or lower evaluation.max_new_tokens"
            )
        texts = [self.spec.prompt(item) for item in items]
        ids = encoding.token_ids(self.tokenizer, texts)
        return [prefix + ids[text][-room:] for text in texts]


def build_task(
    name: str,
    kind: str,
    tokenizer: Any,
    *,
    max_length: int,
    template: str = "",
    verbalizers: Sequence[str] = (),
) -> Task:
    """The task called `name` for a model of `kind` with this tokenizer; see `task_spec` for the overrides.

    Raises:
        ConfigError: as `task_spec`; or a max_length below 2 or beyond the tokenizer's limit, or no mask token.
    """
    spec = task_spec(name, kind, template=template, verbalizers=verbalizers)
    limit = tokenizer.model_max_length
    if not 2 <= max_length <= limit:
        raise ConfigError(f"max_length is {max_length}; with this tokenizer it must be from 2 to {limit}")
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise ConfigError("this tokenizer has no mask token, which kind 'masked' needs; choose 'causal' or 'encoder'")
    return Task(spec, tokenizer, max_length)
