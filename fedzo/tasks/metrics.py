"""Metrics of scored examples. Scores are [n, C], labels [n] int64."""

import math

import torch
from torch import Tensor

from fedzo.evaluation.batch import Batch


def predictions(scores: Tensor) -> Tensor:
    """[n] int64: the best candidate, the first of equals; -1 where a score is NaN, which is never right."""
    return torch.where(scores.isnan().any(1), -1, scores.argmax(1))


def correct(scores: Tensor, labels: Tensor) -> int:
    """How many examples are right."""
    return int((predictions(scores) == labels).sum())


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of examples that are right, 0 to 1; NaN for none."""
    return correct(scores, labels) / len(labels) if len(labels) else math.nan


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """[C, C] int64: how many examples of class i (row) were taken for class j (column); NaN scores are left out."""
    classes = scores.shape[1]
    predicted = predictions(scores)
    valid = predicted >= 0
    return torch.bincount(labels[valid] * classes + predicted[valid], minlength=classes**2).reshape(classes, classes)


def class_f1(scores: Tensor, labels: Tensor) -> list[float]:
    """F1 of each class: 2 TP / (predicted + actual); 0 for a class neither predicted nor present."""
    table = confusion(scores, labels)
    actual = torch.bincount(labels, minlength=scores.shape[1])  # with those left out of the table
    sums = table.sum(0) + actual
    return [2 * int(hit) / int(total) if total else 0.0 for hit, total in zip(table.diagonal(), sums, strict=True)]


def macro_f1(scores: Tensor, labels: Tensor) -> float:
    """Unweighted mean of F1 over the classes that occur among the labels or the predictions; NaN for none."""
    present = {*labels.tolist(), *predictions(scores).tolist()}
    values = [f1 for index, f1 in enumerate(class_f1(scores, labels)) if index in present]
    return sum(values) / len(values) if values else math.nan


def scored_tokens(batch: Batch) -> Tensor:
    """[B, C] int64: number of scored tokens of each candidate, the weight of a block's mean loss.

    Raises:
        ValueError: the batch has no scored tokens (an encoder's).
    """
    if batch.targets is None:
        raise ValueError("an encoder's batch has no scored tokens")
    width = batch.targets.num_candidates
    return torch.bincount(batch.targets.candidates, minlength=len(batch) * width).reshape(len(batch), width)


def mean_loss(losses: Tensor, weights: Tensor | None = None) -> float:
    """Mean of losses [n], weighted where weights [n] are given; NaN for none."""
    if weights is None:
        return float(losses.double().mean())
    return float((losses.double() * weights).sum() / weights.sum())


def perplexity(losses: Tensor, tokens: Tensor) -> float:
    """exp of the mean loss in nats over all tokens: losses [n] are means over blocks of tokens [n] each."""
    loss = mean_loss(losses, tokens)
    return math.exp(loss) if loss < 700 else math.inf
