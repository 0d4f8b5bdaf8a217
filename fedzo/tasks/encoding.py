"""Text to model input: rows of token ids and, in them, the tokens whose probabilities are scored.

A candidate is tokenised together with its prompt, so that merges across their boundary come out as in running text.
What is scored begins where the tokens of the prompt alone and of prompt plus candidate part ways.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedzo.errors import DataError


@dataclass(frozen=True)
class Candidate:
    """One way to complete an example: ``before + answer + after``.

    A masked LM reads `answer` at mask tokens. A causal LM scores `answer` given `before`; where `after` has text,
    it scores `after` given the rest (partial scoring: candidates share the scored text and differ in the prefix).
    """

    before: str
    answer: str
    after: str = ""


@dataclass(frozen=True)
class Row:
    """One unpadded row of a model's input.

    Attributes:
        tokens: token ids.
        targets: scored tokens as (position whose logits predict, token id, candidate of the example).
    """

    tokens: list[int]
    targets: list[tuple[int, int, int]]


def token_ids(tokenizer: Any, texts: Iterable[str]) -> dict[str, list[int]]:
    """Token ids of each distinct text, without special tokens."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    encoded = tokenizer(
        distinct,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return dict(zip(distinct, encoded["input_ids"], strict=True))


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a single text."""
    for probe in ("a", "0", "."):
        bare = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        framed = list(tokenizer(probe)["input_ids"])
        for begin in range(len(framed) - len(bare) + 1):
            if bare and framed[begin : begin + len(bare)] == bare:
                return framed[:begin], framed[begin + len(bare) :]
    return [], []


def causal_prefix(tokenizer: Any) -> list[int]:
    """What a causal row begins with: what the tokenizer adds itself, else its BOS, else nothing."""
    prefix = special_frame(tokenizer)[0]
    if not prefix and tokenizer.bos_token_id is not None:
        return [int(tokenizer.bos_token_id)]
    return prefix


def pad_token(tokenizer: Any) -> int:
    """Padding id: the tokenizer's pad token, else its EOS, else 0. Padded positions are masked out anyway."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def _too_long(needed: int, max_length: int) -> DataError:
    return DataError(
        f"the text that must be kept needs {needed} tokens, but max_length is {max_length}; set max_length to at "
        f"least {needed} or remove the example"
    )


def _scored_from(pairs: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """For each (prompt, prompt + candidate): the index of the first scored token of the latter."""
    begins = [_common_prefix(prompt, whole) for prompt, whole in pairs]
    for candidate, (begin, (_, whole)) in enumerate(zip(begins, pairs, strict=True)):
        if begin == len(whole):
            raise DataError(f"candidate {candidate} has no tokens; give every candidate some text")
    groups: dict[tuple[int, ...], list[int]] = {}
    for candidate, (prompt, _) in enumerate(pairs):
        groups.setdefault(tuple(prompt), []).append(candidate)
    for prompt_tokens, members in groups.items():
        begin = min(begins[member] for member in members)
        if len(members) > 1:
            # A prompt's last word may be split in another way once a candidate follows. Where all candidates
            # agree on the new split it tells them apart in nothing: it is prompt.
            wholes = [pairs[member][1] for member in members]
            end = min(len(prompt_tokens), *(len(whole) - 1 for whole in wholes))
            while begin < end and len({whole[begin] for whole in wholes}) == 1:
                begin += 1
        for member in members:
            begins[member] = begin
    return begins


def _causal_example(pairs: Sequence[tuple[list[int], list[int]]], prefix: list[int], max_length: int) -> list[Row]:
    begins = _scored_from(pairs)
    if not prefix:
        begins = [max(begin, 1) for begin in begins]  # nothing stands before the first token to predict it
        if any(begin >= len(whole) for begin, (_, whole) in zip(begins, pairs, strict=True)):
            raise DataError("the prompt is empty and the tokenizer has no BOS token; begin the template with some text")
    length = len(prefix) + max(len(whole) for _, whole in pairs) - 1
    cut = max(0, length - max_length)
    spare = min(begins) - (0 if prefix else 1)
    if cut > spare:
        raise _too_long(length - spare, max_length)
    shift = len(prefix) - cut - 1
    rows: list[Row] = []
    # Longest first: a row that begins another one is read off that one, as a causal model sees nothing to the right.
    for candidate in sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1])):
        whole, begin = pairs[candidate][1], begins[candidate]
        tokens = prefix + whole[cut:-1]
        targets = [(begin + step + shift, token, candidate) for step, token in enumerate(whole[begin:])]
        host = next((row for row in rows if row.tokens[: len(tokens)] == tokens), None)
        if host is None:
            rows.append(Row(tokens, targets))
        else:
            host.targets.extend(targets)
    return rows


def _each(function: Callable[[Any], list[Row]], items: Iterable[Any], first: int) -> list[list[Row]]:
    """`function` of each item; an error names the example by its number, `first` being that of the first item."""
    encoded = []
    for number, item in enumerate(items, first):
        try:
            encoded.append(function(item))
        except DataError as error:
            raise DataError(f"example {number} (counted from 0): {error}") from None
    return encoded


def causal_rows(
    examples: Sequence[Sequence[Candidate]], tokenizer: Any, max_length: int, first: int = 0
) -> list[list[Row]]:
    """Rows of a causal LM for each example.

    Rows lack the last token of their candidate, which is only predicted. Candidates of one token that share a prompt
    share one row. A row over `max_length` loses the beginning of its prompt, equally for all candidates of an example.

    Raises:
        DataError: a candidate has no tokens, or does not fit in `max_length`.
    """
    split = [
        [(c.before + c.answer, c.after) if c.after.strip() else (c.before, c.answer) for c in candidates]
        for candidates in examples
    ]
    ids = token_ids(
        tokenizer, (text for pairs in split for prompt, scored in pairs for text in (prompt, prompt + scored))
    )
    prefix = causal_prefix(tokenizer)

    def encode(pairs: Sequence[tuple[str, str]]) -> list[Row]:
        return _causal_example([(ids[prompt], ids[prompt + scored]) for prompt, scored in pairs], prefix, max_length)

    return _each(encode, split, first)


def masked_rows(
    examples: Sequence[Sequence[Candidate]], tokenizer: Any, max_length: int, first: int = 0
) -> list[list[Row]]:
    """Rows of a masked LM for each example: a candidate of n tokens is read at n masks.

    Candidates with equally many tokens share a row where their surroundings are the same. A row over `max_length`
    loses the beginning of the text before the mask, then the end of the text after it.

    Raises:
        DataError: a candidate has no tokens, or its masks do not fit in `max_length`.
    """
    mask, mask_id = str(tokenizer.mask_token), int(tokenizer.mask_token_id)
    prefix, suffix = special_frame(tokenizer)

    def answer(candidate: Candidate) -> str:
        # The space is part of a word's token in byte-level and SentencePiece vocabularies.
        return " " + candidate.answer.strip() if candidate.before.strip() else candidate.answer.strip()

    answers = token_ids(tokenizer, (answer(c) for candidates in examples for c in candidates))
    split = [[(c, c.before + mask * len(answers[answer(c)]) + c.after) for c in group] for group in examples]
    bodies = token_ids(tokenizer, (text for group in split for _, text in group))

    def encode(group: Sequence[tuple[Candidate, str]]) -> list[Row]:
        filled: list[tuple[list[int], list[int], list[int]]] = []
        for number, (candidate, text) in enumerate(group):
            wanted, body = answers[answer(candidate)], bodies[text]
            if not wanted:
                raise DataError(f"candidate {number} has no tokens; give every candidate some text")
            earlier = candidate.before.count(mask)  # masks that the example's own text happens to contain
            places = [place for place, token in enumerate(body) if token == mask_id][earlier : earlier + len(wanted)]
            if len(places) != len(wanted):
                raise DataError(f"candidate {number}: the tokenizer did not keep its {len(wanted)} mask tokens")
            filled.append((body, places, wanted))
        length = len(prefix) + max(len(body) for body, _, _ in filled) + len(suffix)
        excess = max(0, length - max_length)
        cut = min(excess, *(places[0] for _, places, _ in filled))
        rows: list[Row] = []
        for number, (body, places, wanted) in enumerate(filled):
            end = min(len(body), max_length - len(prefix) - len(suffix) + cut)
            if places[-1] >= end:
                raise _too_long(len(prefix) + places[-1] - cut + 1 + len(suffix), max_length)
            tokens = prefix + body[cut:end] + suffix
            targets = [(len(prefix) + place - cut, token, number) for place, token in zip(places, wanted, strict=True)]
            host = next((row for row in rows if row.tokens == tokens), None)
            if host is None:
                rows.append(Row(tokens, targets))
            else:
                host.targets.extend(targets)
        return rows

    return _each(encode, split, first)


def encoder_rows(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int, first: int = 0) -> list[list[Row]]:
    """One row for each text or text pair, with the tokenizer's special tokens; a longer text loses its end."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]

    def check(tokens: list[int]) -> list[Row]:
        if not tokens:
            raise DataError("its text has no tokens; remove it")
        return [Row(list(tokens), [])]

    return _each(check, encoded, first)


def block_rows(blocks: Sequence[Sequence[int]], tokenizer: Any) -> list[list[Row]]:
    """One row for each block of plain text, every token of which is scored (but the first, where there is no BOS)."""
    prefix = causal_prefix(tokenizer)
    wholes = [[*prefix, *block] for block in blocks]
    return [[Row(whole[:-1], [(position, token, 0) for position, token in enumerate(whole[1:])])] for whole in wholes]
