"""Looks for the settings of a run by trials on validation data, the worse ones stopped early. docs/step-size.md.

A trial is a run in a folder of its own. The search itself is kept nowhere: it is a function of the configuration and
of the trials' ledgers, so what was stopped is gone through again, at no cost, and goes on where it was.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedzo import engine
from fedzo.config import KEYS, Config, flatten, from_flat
from fedzo.divergence import Watch
from fedzo.errors import ConfigError, DivergedError, RunError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.federation.randomness import derive
from fedzo.files import strict_json, write_atomically
from fedzo.registry import nearest
from fedzo.run_folder import RunFolder

if TYPE_CHECKING:
    import optuna

RATE = "method.learning_rate"
AROUND = 10.0  # the learning rate is looked for within this factor of "auto"
CHECKPOINTS = 9  # evaluations of a trial
KEPT = 3  # successive halving: one of so many trials goes on from a ninth of its rounds, and again from a third
_EVENLY = 4  # trials whose values are drawn evenly, before they are drawn near good ones
_TUNABLE = ("model", "space", "method", "federation")

_DEFAULTS = flatten(Config())
Value = int | float


@dataclass(frozen=True)
class Range:
    """Where the value of a key is looked for: [low, high], evenly or, for `log`, evenly in its logarithm.

    Attributes:
        start: the value of the first trial.
    """

    key: str
    low: float
    high: float
    log: bool
    start: float

    def value(self, drawn: float) -> Value:
        """What a run takes for a drawn value: three digits, of a key of whole numbers the nearest."""
        return round(drawn) if isinstance(_DEFAULTS[self.key], int) else float(f"{drawn:.3g}")


@dataclass(frozen=True)
class Trial:
    """What a trial did.

    Attributes:
        values: of the keys that are looked for.
        state: "done", "stopped" (others were better at the same round) or "diverged".
        rounds: that it took.
        loss: on validation data, at its last evaluation.
        forwards: passes over a client's batch.
        validation_forwards: passes over a batch of validation data.
    """

    number: int
    values: Mapping[str, Value]
    state: str
    rounds: int
    loss: float
    forwards: float
    validation_forwards: int


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        trials: all, in order.
        best: of those that came to their end that with the lowest validation loss, the first of equals.
        probe_forwards: passes that the first learning rate took; 0 where its range was given.
    """

    trials: Sequence[Trial]
    best: Trial
    probe_forwards: int


def parse_range(text: str, config: Config) -> Range:
    """`KEY=LOW:HIGH` or `KEY=LOW:HIGH:log` of the command line; the first trial has the configuration's own value.

    Raises:
        ConfigError: an unknown key, one that is no number or decides what trials are compared by, or no range.
    """
    key, _, rest = text.partition("=")
    low, _, rest = rest.partition(":")
    high, _, scale = rest.partition(":")
    if key not in KEYS:
        raise ConfigError(f"--tune {text}: unknown key {key!r}. {nearest(key, KEYS)}")
    if isinstance(_DEFAULTS[key], bool | str) or key.partition(".")[0] not in _TUNABLE or key == "federation.rounds":
        raise ConfigError(
            f"--tune {text}: {key} cannot be looked for; wanted a number of the sections {', '.join(_TUNABLE)}, but "
            "not federation.rounds, in which the budget is counted"
        )
    wanted = f"--tune {text}: wanted KEY=LOW:HIGH with LOW < HIGH, or KEY=LOW:HIGH:log with 0 < LOW < HIGH"
    try:
        least, most, log = float(low), float(high), scale == "log"
    except ValueError:
        raise ConfigError(wanted) from None
    if scale not in ("", "log") or not (0.0 if log else -math.inf) < least < most < math.inf:
        raise ConfigError(wanted)
    own = flatten(config)[key]
    middle = math.sqrt(least * most) if log else (least + most) / 2.0
    return Range(key, least, most, log, middle if isinstance(own, str) else min(max(own, least), most))


def search(
    config: Config, ranges: Sequence[Range], budget: int, folder: Path, tell: Callable[[Trial], None] = lambda _: None
) -> Search:
    """Looks for the values with the lowest validation loss at the end of a run. No trial sees test data.

    Args:
        ranges: of the keys to look for; without the learning rate, that is looked for around "auto".
        budget: whole runs: a trial begins while what all took leaves enough rounds for it to come to its end.
        folder: of the trials; one that another call has begun with the same configuration goes on.
        tell: is told of each trial.

    Raises:
        ConfigError: the folder holds another search, or a value in the ranges is impossible.
        RunError: Optuna is not installed, or no trial came to its end.
    """
    if config.privacy.mode != "none":
        raise ConfigError(
            f'privacy.mode is "{config.privacy.mode}": every trial would spend a budget of its own on the same data, '
            'and the choice among them tells of it too. Tune with privacy.mode = "none" on public data'
        )
    if importlib.util.find_spec("optuna") is None:
        raise RunError('`fedzo tune` needs optuna, which is not installed: pip install "fedzo[tune]"')
    folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).locked():
        trials, found, spent = _Trials(config, ranges, folder), list[Trial](), 0
        study = _study(trials.ranges)
        while spent + config.federation.rounds <= budget * config.federation.rounds:
            found.append(_next(study, trials, derive(config.seed, "tune", len(found)) % 2**32))
            spent += found[-1].rounds
            tell(found[-1])
    done = [trial for trial in found if trial.state == "done"]
    if not done:
        raise RunError(
            f"none of {len(found)} trials came to its end; the last one {found[-1].state}. Look for a lower learning "
            f"rate with --tune {RATE}=LOW:HIGH:log"
        )
    return Search(found, min(done, key=lambda trial: trial.loss), trials.probe_forwards)


def _study(ranges: Sequence[Range]) -> "optuna.Study":
    """Optuna's side of a search, in memory; the first trial is set."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=KEPT)
    study = optuna.create_study(direction="minimize", pruner=pruner)
    study.enqueue_trial({each.key: each.start for each in ranges})
    return study


def _next(study: "optuna.Study", trials: "_Trials", seed: int) -> Trial:
    """Draws the values of a trial and plays it."""
    import optuna

    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_EVENLY)
    drawn = study.ask({r.key: optuna.distributions.FloatDistribution(r.low, r.high, log=r.log) for r in trials.ranges})

    def report(checkpoint: int, loss: float) -> None:
        drawn.report(loss, checkpoint)
        if checkpoint < trials.checkpoints and drawn.should_prune():
            raise _StopError

    trial = trials.play(drawn.number, {r.key: r.value(drawn.params[r.key]) for r in trials.ranges}, report)
    if trial.state == "done":
        study.tell(drawn, trial.loss)
    else:
        study.tell(drawn, state=optuna.trial.TrialState.PRUNED)
    return trial


class _StopError(Exception):
    """A trial is not worth going on with."""


class _Checkpoints:
    """An observer that reports the validation losses at a trial's checkpoints, each once."""

    def __init__(self, every: int, last: int, report: Callable[[int, float], None]) -> None:
        self._every, self._last, self._report, self._seen = every, last, report, 0

    def round(self, summary: RoundSummary) -> None:
        pass

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        if split == "validation" and rounds > self._seen and (rounds % self._every == 0 or rounds == self._last):
            self._seen = rounds
            self._report(-(-rounds // self._every), metrics["loss"])


class _Trials:
    """Plays trials, over one model and data where what they change is not part of them.

    Args:
        config: that the trials change.
        given: ranges of the keys to look for.
        folder: where the runs are kept, and in search.json what they belong to.
    """

    def __init__(self, config: Config, given: Sequence[Range], folder: Path) -> None:
        rounds = config.federation.rounds
        self._every = -(-rounds // CHECKPOINTS)
        self.checkpoints = -(-rounds // self._every)
        fixed = {"name": "", "data.test": "", "evaluation.every": self._every}
        self._flat, self._folder = flatten(config) | fixed, folder
        self._experiment: Experiment | None = None
        path = folder / "search.json"
        asked = {"config": self._flat, "given": [asdict(each) for each in given]}
        if not path.exists():
            write_atomically(path, strict_json({**asked, **self._prepare(given)}) + "\n")
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {key: kept[key] for key in asked} != json.loads(strict_json(asked)):
            raise ConfigError(f"{folder} holds the trials of another search: choose another --folder")
        self.ranges = [Range(**each) for each in kept["ranges"]]
        self.probe_forwards: int = kept["probe_forwards"]
        self._validation_batches: int = kept["validation_batches"]

    def _prepare(self, given: Sequence[Range]) -> dict[str, Any]:
        """What is found out once, with the model."""
        base = from_flat(self._flat if any(each.key == RATE for each in given) else self._flat | {RATE: "auto"})
        experiment, ranges, forwards = self._on(base), list(given), 0
        if base.method.learning_rate == "auto":
            rate, forwards = experiment.step_size.learning_rate, experiment.probe.forwards
            ranges.insert(0, Range(RATE, rate / AROUND, rate * AROUND, True, rate))
        batches = -(-len(experiment.validation) // base.evaluation.batch_size)
        return {
            "ranges": [asdict(each) for each in ranges], "probe_forwards": forwards, "validation_batches": batches
        }  # fmt: skip

    def play(self, number: int, values: Mapping[str, Value], report: Callable[[int, float], None]) -> Trial:
        """A trial, to its end or until `report` raises _StopError.

        Args:
            report: is told (checkpoint, validation loss), also of what an earlier call has reached.

        Raises:
            ConfigError: a value is impossible, or the trial of this number had others.
        """
        config = from_flat({**self._flat, **values}, f"trial {number}")
        path = self._folder / f"trial-{number:03d}"
        folder = RunFolder.open(path) if (path / "config.toml").is_file() else RunFolder.create(path, config)
        if folder.load_config() != config:
            raise ConfigError(f"{path} has other values than this version of Optuna draws: choose another --folder")
        total, done, state = config.federation.rounds, 0, "done"
        watch = _Checkpoints(self._every, total, report)
        try:
            if folder.ledger.exists():
                with Ledger(folder.ledger) as ledger:
                    evaluations = ledger.evaluations("validation")
                    for done in sorted(evaluations):
                        watch.evaluation(done, "validation", evaluations[done])
                    Watch(ledger, config.evaluation.divergence).check()
            if done < total:
                engine.run(self._on(config), folder, [watch]).close()
        except _StopError:
            state = "stopped"
        except DivergedError:
            state = "diverged"
        with Ledger(folder.ledger) as ledger:
            evaluations, summaries = ledger.evaluations("validation"), ledger.summaries()
        answered = sum(summary["sampled"] - summary["dropped"].get("no-reply", 0) for summary in summaries)
        loss = evaluations[max(evaluations)]["loss"]
        return Trial(
            number=number,
            values=values,
            state=state if math.isfinite(loss) else "diverged",
            rounds=len(summaries),
            loss=loss,
            forwards=answered * config.federation.local_steps * config.step_forwards,
            validation_forwards=len(evaluations) * self._validation_batches,
        )

    def _on(self, config: Config) -> Experiment:
        """The experiment of a trial: that of the one before, where only method and federation differ."""
        kept, made = self._experiment, {"method", "federation"}
        if kept is None or kept.config.model_dump(exclude=made) != config.model_dump(exclude=made):
            self._experiment = kept = None  # two models may not fit
            self._experiment = kept = Experiment(config)
        kept.config = config
        return kept
