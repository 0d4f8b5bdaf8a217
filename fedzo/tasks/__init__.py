"""Tasks: prompts and verbalisers, encoded data sets, data loading, partitions, metrics."""

from fedzo.tasks.catalogue import TASKS, Reading, task_spec
from fedzo.tasks.data import Splits, load_file, load_splits
from fedzo.tasks.dataset import EncodedDataset
from fedzo.tasks.metrics import (
    accuracy,
    class_f1,
    confusion,
    correct,
    exact_match,
    macro_f1,
    mean_loss,
    perplexity,
    predictions,
    scored_tokens,
    token_f1,
)
from fedzo.tasks.partition import OWN, PARTITIONERS, partition
from fedzo.tasks.prompts import Example, TaskSpec
from fedzo.tasks.tasks import Task, build_task

__all__ = [
    "OWN",
    "PARTITIONERS",
    "TASKS",
    "EncodedDataset",
    "Example",
    "Reading",
    "Splits",
    "Task",
    "TaskSpec",
    "accuracy",
    "build_task",
    "class_f1",
    "confusion",
    "correct",
    "exact_match",
    "load_file",
    "load_splits",
    "macro_f1",
    "mean_loss",
    "partition",
    "perplexity",
    "predictions",
    "scored_tokens",
    "task_spec",
    "token_f1",
]
