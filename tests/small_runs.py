"""Runs of a second or two: the embedded model on a few of its examples, and the command line within this process."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from fedzo import engine
from fedzo.cli import main
from fedzo.config import Config, from_flat
from fedzo.embedded import DATA
from fedzo.experiment import Experiment
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder


class Answer(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def fedzo(*arguments: object) -> Answer:
    """A command, as the console script runs it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", ["fedzo", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


def make_data(folder: Path, train: int = 36, test: int = 12) -> Path:
    """A folder with the first embedded examples as train.jsonl, validation.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("validation", test), ("test", test)):
        lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    """Dotted keys of a small run: 3 rounds, 3 clients; a change is named section__key."""
    chosen = {
        "data.source": str(data),
        "data.validation": "validation",
        "data.partition": "iid",
        "data.clients": 3,
        "method.queries": 2,
        "method.batch_size": 4,
        "method.schedule": "constant",
        "federation.rounds": 3,
        "evaluation.every": 2,
        "runtime.threads": 1,
        "runtime.device": "cpu",
    }
    return chosen | {key.replace("__", "."): value for key, value in changes.items()}


def options(data: Path, **changes: Any) -> list[str]:
    """`settings` as -o options."""
    flat = settings(data, **changes)
    return [part for key, value in flat.items() for part in ("-o", f"{key}={json.dumps(value)}")]


def config(data: Path, **changes: Any) -> Config:
    """`settings`, checked."""
    return from_flat(settings(data, **changes))


def run(path: Path, chosen: Config) -> Ledger:
    """A run by the engine, to its end; its ledger is open."""
    threads = torch.get_num_threads()
    try:
        folder = RunFolder.create(path, chosen)
        return engine.run(Experiment(chosen), folder)
    finally:
        torch.set_num_threads(threads)
