"""Examples tokenised once, and batches of them."""

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedzo.evaluation.batch import Batch, TokenTargets
from fedzo.tasks.prompts import Example
from fedzo.tasks.tasks import Task

Ints = npt.NDArray[np.int64]
_CHUNK = 4096  # examples tokenised at a time: bounds memory, still lets a fast tokenizer use its threads


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ..., start + length - 1 of each pair, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


class EncodedDataset:
    """Examples as flat arrays of tokens, so that a batch is a gather and a pad.

    The items are ``task.prepare(examples)``: one for each example but for language modelling, where an item is a
    block of text. To partition text, prepare it first, partition the blocks and encode them.

    Attributes:
        items: what is encoded.
        labels: [n] int64: right candidate or class of each item; 0 where there is one candidate only.
    """

    items: list[Example]
    labels: Ints

    def __init__(self, task: Task, examples: Sequence[Example]) -> None:
        """Tokenises; raises DataError as `Task.encode`, and as `TaskSpec.label` for an unknown label."""
        self.items = items = task.prepare(examples)
        self.labels = np.array([task.spec.label(item) for item in items], dtype=np.int64)
        self._pad = task.pad_token_id
        self._scored = task.kind != "encoder"
        self._features: Tensor | None = None
        tokens: list[npt.NDArray[np.int32]] = []
        targets: list[Ints] = []
        rows_of: list[int] = []
        tokens_of: list[int] = []
        targets_of: list[int] = []
        for first in range(0, len(items), _CHUNK):
            encoded = task.encode(items[first : first + _CHUNK], first)
            rows = [row for group in encoded for row in group]
            rows_of.extend(map(len, encoded))
            tokens_of.extend(len(row.tokens) for row in rows)
            targets_of.extend(len(row.targets) for row in rows)
            tokens.append(np.array([token for row in rows for token in row.tokens], dtype=np.int32))
            targets.append(np.array([t for row in rows for t in row.targets], dtype=np.int64).reshape(-1, 3))
        self._tokens = np.concatenate([np.zeros(0, np.int32), *tokens])
        self._targets = np.concatenate([np.zeros((0, 3), np.int64), *targets])
        self._rows_of = np.array(rows_of, dtype=np.int64)
        self._tokens_of = np.array(tokens_of, dtype=np.int64)
        self._targets_of = np.array(targets_of, dtype=np.int64)
        self._first_row = np.cumsum(self._rows_of) - self._rows_of
        self._first_token = np.cumsum(self._tokens_of) - self._tokens_of
        self._first_target = np.cumsum(self._targets_of) - self._targets_of

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Ints) -> Batch:
        """The items at `indices`, in that order, right-padded to the longest of their rows.

        Raises:
            ValueError: no indices.
            IndexError: an index out of range.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) == 0:
            raise ValueError("a batch needs at least one example")
        labels = torch.from_numpy(self.labels[chosen])
        if self._features is not None:
            return Batch({"features": self._features[torch.from_numpy(chosen)]}, labels)
        rows = _ranges(self._first_row[chosen], self._rows_of[chosen])
        lengths = self._tokens_of[rows]
        filled = np.arange(int(lengths.max())) < lengths[:, None]
        ids = np.full(filled.shape, self._pad, dtype=np.int64)
        ids[filled] = self._tokens[_ranges(self._first_token[rows], lengths)]
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(filled.astype(np.int64))}
        return Batch(inputs, labels, self._token_targets(chosen, rows) if self._scored else None)

    def by_length(self, size: int) -> list[Ints]:
        """All items in batches of at most `size`, items of like length together: little padding, a fixed order."""
        longest = np.maximum.reduceat(self._tokens_of, self._first_row) if len(self) else np.zeros(0, np.int64)
        order = np.argsort(longest, kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]

    def _token_targets(self, chosen: Ints, rows: Ints) -> TokenTargets:
        counts = self._targets_of[rows]
        position, token, candidate = self._targets[_ranges(self._first_target[rows], counts)].T
        row = np.repeat(np.arange(len(rows)), counts)
        example = np.repeat(np.arange(len(chosen)), self._rows_of[chosen])[row]
        width = int(candidate.max()) + 1
        return TokenTargets(
            rows=torch.from_numpy(row),
            positions=torch.from_numpy(position.copy()),
            tokens=torch.from_numpy(token.copy()),
            candidates=torch.from_numpy(example * width + candidate),
            num_candidates=width,
        )

    def with_features(self, features: Tensor) -> "EncodedDataset":
        """The same items with precomputed features [n, d]: a batch's input is then {"features": [B, d]}, no tokens.

        Raises:
            ValueError: features of another number of items.
        """
        if features.ndim != 2 or len(features) != len(self):
            raise ValueError(f"features must be [{len(self)}, d], but are {list(features.shape)}")
        other = copy.copy(self)
        other._features = features
        return other
