"""Metrics of scored examples, scores [n, C] and labels [n] int64, and of generated answers."""

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedzo.evaluation.batch import Batch

# What a model is judged by, the first that it has; each is better when higher, and from 0 to 1.
QUALITY = ("accuracy", "f1")


def quality(metrics: Mapping[str, float]) -> float:
    """The number by which evaluations are compared, higher is better: accuracy, else F1, else minus the loss."""
    return next((metrics[name] for name in QUALITY if name in metrics), -metrics["loss"])


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


def credited(predicted: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """[n] int64: each prediction [n] where it is among the example's right candidates, else the first of those."""
    pairs = zip(predicted.tolist(), right, strict=True)
    return torch.tensor([found if found in allowed else allowed[0] for found, allowed in pairs], dtype=torch.int64)


def normalised(answer: str) -> str:
    """SQuAD's normal form (Rajpurkar et al., arXiv 1606.05250): small letters, no punctuation, no articles."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer equals a reference in normal form, else 0."""
    return float(any(normalised(answer) == normalised(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Largest F1 over the references between their words and the answer's, as bags in normal form."""
    return max(_bag_f1(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _bag_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """2 |both| / (|found| + |wanted|); two empty bags are equal, hence 1."""
    if not found and not wanted:
        return 1.0
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))
