"""The folder of a run: config.toml, ledger.sqlite, metrics.jsonl, TensorBoard and other events, plots, step_size.json.

Clients of a private run that noise what they send keep their budgets in `budgets`, when they run on this machine.
The ledger is the truth; metrics.jsonl and TensorBoard's events are written along for other tools and made anew on
resume. events.jsonl (`fedzo.events`) is appended to.
"""

import fcntl
import importlib.util
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedzo.config import Config, load_config, to_toml
from fedzo.errors import RunError
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.files import strict_json, write_atomically
from fedzo.privacy_report import epsilon_spent
from fedzo.step_size import StepSize

# Of a round, beside what was dropped.
_PLOTTED = (
    "loss", "clip", "accepted", "bytes_up", "bytes_down", "artifact_bytes", "max_scalar", "replies", "seconds",
    "latency_median", "latency_max", "epsilon",
)  # fmt: skip
BUDGETS = "budgets"  # in it a folder by the run's id, in which a file for each client


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def step_size(self) -> Path:
        """Where a learning rate that was "auto" came from; no other run has it."""
        return self.path / "step_size.json"

    @property
    def event_log(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "tensorboard"

    def check_new(self) -> None:
        """Raises RunError where there is a run, or a file in the way."""
        if self.ledger.exists():
            raise RunError(
                f"{self.path} already holds a run; `fedzo resume {self.path}` goes on with it, or choose another --out"
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another --out")

    @staticmethod
    def create(path: Path, config: Config) -> "RunFolder":
        """A new folder with its configuration.

        Raises:
            RunError: the folder already holds a run, or cannot be written.
        """
        folder = RunFolder(path)
        folder.check_new()
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(folder.config, to_toml(config))
        except OSError as error:
            raise RunError(f"cannot write the run folder {path}: {error.strerror}") from error
        return folder

    @staticmethod
    def open(path: Path) -> "RunFolder":
        """An existing run's folder, also by the path of its ledger.

        Raises:
            RunError: there is no run.
        """
        folder = RunFolder(path.parent if path.name == "ledger.sqlite" else path)
        if not folder.config.is_file():
            raise RunError(f"{path} is no run: it has no config.toml")
        return folder

    def load_config(self) -> Config:
        return load_config(self.config)

    def settle(self, config: Config, found: StepSize) -> None:
        """Replaces the configuration by one with the learning rate that was found; keeps how in step_size.json."""
        with _written(self.path):
            write_atomically(self.step_size, strict_json(asdict(found)) + "\n")
            write_atomically(self.config, to_toml(config))

    def settled(self) -> dict[str, Any]:
        """The learning rate that "auto" became and the forward passes that this took; empty where it was given."""
        if not self.step_size.exists():
            return {}
        found = json.loads(self.step_size.read_text(encoding="utf-8"))
        return {"learning_rate": found["learning_rate"], "probe_forwards": found["probe"]["forwards"]}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run for one process.

        Raises:
            RunError: another process runs it, or the folder cannot be written.
        """
        try:
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(f"cannot write the run folder {self.path}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path} is being run by another process") from None
            yield


def new_run_path(config: Config, now: float | None = None) -> Path:
    """runs/NAME, or runs/TASK-DATE-TIME."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return Path("runs") / (config.name or f"{config.task.name}-{stamp}")


class MetricsLog:
    """metrics.jsonl and TensorBoard events: one line a round, one an evaluation.

    Of the rounds of this process they have more than the ledger keeps: seconds, latencies, and of a private run about a
    hundred times the epsilon spent so far.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger) -> None:
        """Opens the log at where the ledger stands: lines that a crash lost or left too much are made right."""
        self._metrics, self._ledger, self._budgets = folder.metrics, ledger, folder.path / BUDGETS
        self._reasons: set[str] = set()
        self._secret = ledger.spec.terms is not None and ledger.spec.terms.secret
        summaries = ledger.summaries()
        evaluations = [
            (split, rounds, metrics)
            for split in ("validation", "test")
            for rounds, metrics in ledger.evaluations(split).items()
        ]
        lines = [_round_line(summary) for summary in summaries]
        lines += [_evaluation_line(rounds, split, metrics) for split, rounds, metrics in evaluations]
        with _written(self._metrics):
            write_atomically(self._metrics, "".join(lines))
            self._file = self._metrics.open("a", encoding="utf-8")
        with _written(folder.events):
            self._events = _Events.open(folder.events)
        for summary in summaries:
            self._plot_round(summary)
        for split, rounds, metrics in evaluations:
            self._plot_evaluation(rounds, split, metrics)

    def round(self, summary: RoundSummary) -> None:
        kept = summary.kept(self._secret) | self._privacy(summary.round + 1)
        self._write(_round_line(kept))
        self._plot_round(kept)

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        self._write(_evaluation_line(rounds, split, metrics))
        self._plot_evaluation(rounds, split, metrics)

    def _privacy(self, rounds: int) -> dict[str, float]:
        """The epsilon of a private run after so many rounds, where it is looked at: accounting takes time."""
        spec = self._ledger.spec
        if spec.terms is None or (rounds % max(1, spec.rounds // 100) and rounds != spec.rounds):
            return {}
        return {"epsilon": epsilon_spent(self._ledger, self._budgets)}

    def _write(self, line: str) -> None:
        with _written(self._metrics):
            self._file.write(line)
            self._file.flush()

    def _plot_round(self, summary: Mapping[str, Any]) -> None:
        values = {name: summary.get(name) for name in _PLOTTED}
        if (dropped := summary["dropped"]) is not None:
            self._reasons |= dropped.keys()  # one that was there before is 0 where it is not
            values["dropped"] = sum(dropped.values())
            values |= {f"dropped/{reason}": dropped.get(reason, 0) for reason in sorted(self._reasons)}
        self._plot({f"round/{name}": value for name, value in values.items()}, summary["round"] + 1)

    def _plot_evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        self._plot({f"{split}/{name}": value for name, value in metrics.items()}, rounds)

    def _plot(self, values: Mapping[str, float | None], step: int) -> None:
        if self._events is not None:
            with _written(self._events.path):
                self._events.add({name: value for name, value in values.items() if value is not None}, step)

    def close(self) -> None:
        # A full disk was told when the line was written; both files are made anew on resume.
        with suppress(OSError):
            self._file.close()
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


class _Events:
    """A TensorBoard event file. (TensorBoard's own writer has a thread, which prints a full disk as a traceback.)"""

    def __init__(self, path: Path) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.path = path
        self._file = path.open("wb")
        self._records = RecordWriter(self._file)
        self._put(file_version="brain.Event:2")

    @staticmethod
    def open(directory: Path) -> "_Events | None":
        """A new event file in the directory, the only one; None where the extra "plots" is not installed."""
        if importlib.util.find_spec("tensorboard") is None:
            return None
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
        return _Events(directory / f"events.out.tfevents.{time.time_ns() // 10**9}.fedzo")

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Values of a step; seen by TensorBoard at once."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step=step, summary=Summary(value=scalars))

    def _put(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turns a failed write into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; committed rounds are intact: free space, then `fedzo resume`"
        ) from error


def _round_line(summary: Mapping[str, Any]) -> str:
    return strict_json({"event": "round", **summary}) + "\n"


def _evaluation_line(rounds: int, split: str, metrics: Mapping[str, float]) -> str:
    return strict_json({"event": "evaluation", "rounds": rounds, "split": split, **metrics}) + "\n"
