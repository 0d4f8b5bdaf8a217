"""What a model is evaluated on: padded inputs, labels, and the tokens whose probabilities make the scores."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenTargets:
    """The N scored tokens of a batch; every tensor is int64 of shape [N].

    Attributes:
        rows: row of the model's input.
        positions: position in the padded row whose logits predict the token (a causal LM: the token before it; a
            masked LM: the mask's own position).
        tokens: token id to score.
        candidates: flat candidate index, ``example * num_candidates + candidate``.
        num_candidates: C, the largest number of candidates of an example; 1 for language modelling.
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    candidates: Tensor
    num_candidates: int

    def to(self, device: torch.device | str) -> "TokenTargets":
        return TokenTargets(
            self.rows.to(device),
            self.positions.to(device),
            self.tokens.to(device),
            self.candidates.to(device),
            self.num_candidates,
        )


@dataclass(frozen=True)
class Batch:
    """B examples ready for a model.

    Attributes:
        inputs: keyword arguments of the model: input_ids [R, T] and attention_mask [R, T], right-padded, or
            features [B, d]. R need not equal B: candidates of one token share their prompt's row.
        labels: [B] int64, index of the right candidate or class; 0 for language modelling.
        targets: the scored tokens; None when the model itself returns class logits [B, C].
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    targets: TokenTargets | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str) -> "Batch":
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), None if self.targets is None else self.targets.to(device))
