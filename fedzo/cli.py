"""The command line. Every error that a user can cause ends in one message and an exit code that is not 0."""

import errno
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from fedzo import __version__
from fedzo.cli_deploy import client, deploy
from fedzo.cli_privacy import app as privacy
from fedzo.errors import ConfigError, FedzoError, RunError
from fedzo.runtime import keep_memory
from fedzo.terminal import (
    Json,
    Override,
    Quiet,
    console,
    errors,
    human_bytes,
    print_figures,
    print_table,
    shown_event,
    shown_quality,
)

INTERRUPTED = 130
_MASK_ROWS = 16


class _Commands(TyperGroup):
    """The commands, with errors turned into one message and an exit code: 2 configuration, 130 Ctrl-C, 1 other."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FedzoError as error:
            raise _failed(str(error), 2 if isinstance(error, ConfigError) else 1) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # `fedzo inspect RUN | head` is no error
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise _failed(f"{where}{error.strerror or error}", 1) from None
        except KeyboardInterrupt:
            errors.print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _failed(message: str, code: int) -> typer.Exit:
    errors.print("[bold red]error:[/bold red] ", end="")
    errors.print(message, markup=False)
    return typer.Exit(code)


app = typer.Typer(
    name="fedzo",
    cls=_Commands,
    help="Federated zeroth-order fine-tuning: forward passes only, seeds and scalars on the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.add_typer(privacy, name="privacy")
app.add_typer(deploy, name="deploy")
app.add_typer(client, name="client")


class Engine(StrEnum):
    LOCAL = "local"
    FLOWER = "flower"


class Method(StrEnum):
    SENSITIVE = "sensitive"
    FORWARD = "forward"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


class Kind(StrEnum):
    CAUSAL = "causal"
    MASKED = "masked"
    ENCODER = "encoder"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Round = Annotated[str, typer.Option("--round", help='After which round: "last", "best" (on validation) or a number.')]


class _Progress(Progress):
    """A progress bar, with loss, accuracy, scalars and bytes on a line of their own, so that nothing is cut."""

    def __init__(self, rounds: int, done: int, clients: int, sent: int, secret: bool) -> None:
        """`secret`: who takes part is nobody's to know."""
        self._clients, self._sent, self._secret, self._round, self._quality = clients, sent, secret, "", ""
        super().__init__(
            TextColumn("round"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=errors,
        )  # fmt: skip
        self._task = self.add_task("", total=rounds, completed=done)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if text := "  ".join(part for part in (self._quality, self._round) if part):
            yield Text(text, no_wrap=True, overflow="ellipsis")

    def round(self, summary: Any) -> None:
        parts = [summary.told, f"{summary.scalars} scalars"]
        if not self._secret:
            self._sent += summary.bytes_up
            parts.append(f"{human_bytes(self._sent / self._clients)} sent by a client")
            parts += [f"dropped {sum(summary.dropped.values())}"] if summary.dropped else []
        self._round = "  ".join(parts)
        self.update(self._task, completed=summary.round + 1)

    def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None:
        shown = shown_quality(metrics)
        if split == "validation":
            self._quality = shown
        self.console.print(f"[dim]after {rounds} rounds: {split} {shown}, loss {metrics['loss']:.4f}[/dim]")


@contextmanager
def _loading(quiet: bool, text: str) -> Iterator[None]:
    if quiet:
        yield
    else:
        with errors.status(text):
            yield


def _go(folder: Any, config: Any, quiet: bool, as_json: bool, new: bool = False) -> None:
    """Runs a folder's run to its end in this process and prints its figures; `new`: makes the folder first."""
    from fedzo import engine
    from fedzo.experiment import Experiment, open_experiment
    from fedzo.federation.ledger import Ledger
    from fedzo.run_folder import RunFolder

    silent = quiet or as_json
    with _loading(silent, "loading model and data"):
        done = sent = 0
        if folder.ledger.exists():
            with Ledger(folder.ledger) as ledger:
                experiment = open_experiment(config, ledger)
                done, sent = ledger.rounds, sum(summary["bytes_up"] or 0 for summary in ledger.summaries())
        else:
            experiment = Experiment(config)
        experiment.spec()
        if experiment.config.method.learning_rate == "auto" and not silent:
            errors.print(str(experiment.step_size), markup=False)
        if new:  # not before model, data and partition are there: a mistake in them leaves no folder
            folder = RunFolder.create(folder.path, config)
    with _stopped(folder):
        if silent:
            ledger = engine.run(experiment, folder)
        else:
            _warn_of_data(experiment.splits)
            terms = experiment.terms
            secret = terms is not None and terms.secret
            with _Progress(config.federation.rounds, done, config.data.clients, sent, secret) as progress:
                ledger = engine.run(experiment, folder, [progress])
    with ledger:
        _finish(folder, ledger, as_json)


@contextmanager
def _stopped(folder: Any) -> Iterator[None]:
    """A run that does not come to its end: Ctrl-C, or an error such as divergence, of which the plots are drawn."""
    from fedzo.federation.ledger import Ledger

    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted(folder) from None
    except RunError:
        if folder.ledger.exists():
            with Ledger(folder.ledger) as ledger:
                _draw(folder, ledger)
        raise


def _interrupted(folder: Any) -> typer.Exit:
    from fedzo.federation.ledger import Ledger

    done = 0
    if folder.ledger.exists():
        with Ledger(folder.ledger) as ledger:
            done = ledger.rounds
    command = f"fedzo resume {shlex.quote(str(folder.path))}"
    errors.print(f"interrupted after {done} committed rounds; `{command}` goes on", markup=False)
    return typer.Exit(INTERRUPTED)


def _warn_of_data(splits: Any) -> None:
    if splits.unlabelled:
        errors.print(
            f"[yellow]warning:[/yellow] {splits.unlabelled} examples without an agreed label were left out of the data"
        )
    for count, part, other in (
        (splits.train_in_test, "training", "test"),
        (splits.validation_in_test, "validation", "test"),
        (splits.train_in_validation, "training", "validation"),
    ):
        if count:
            errors.print(
                f"[yellow]warning:[/yellow] {count} {part} examples are also in the {other} data; they are kept"
            )


def _draw(folder: Any, ledger: Any) -> None:
    import importlib.util

    from fedzo.report import plot

    if importlib.util.find_spec("matplotlib") and ledger.rounds:
        plot(ledger, folder.path)


def _finish(folder: Any, ledger: Any, as_json: bool) -> None:
    from fedzo.report import summarise

    _draw(folder, ledger)
    print_figures(
        {"run": str(folder.path), **folder.settled(), **summarise(ledger), **_privacy(folder, ledger)}, as_json
    )


def _privacy(folder: Any, ledger: Any) -> dict[str, Any]:
    from fedzo.privacy_report import privacy_figures, spent
    from fedzo.run_folder import BUDGETS

    ended = {"ended": ledger.ended} if ledger.ended else {}
    return privacy_figures(ledger, spent(ledger, folder.path / BUDGETS)) | ended


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; none: the embedded default.")
    ] = None,
    override: Override = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; none: runs/TASK-DATE-TIME.")] = None,
    engine: Annotated[Engine, typer.Option(help="One process, or Flower's simulation with Ray.")] = Engine.LOCAL,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model across clients."""
    from fedzo.config import load_config
    from fedzo.run_folder import RunFolder, new_run_path

    checked = load_config(config, override or ()).resolved()
    folder = RunFolder(out or new_run_path(checked))
    folder.check_new()
    if engine is Engine.LOCAL:
        _go(folder, checked, quiet, as_json, new=True)
        return
    from fedzo.federation.ledger import Ledger
    from fedzo.flower import run_flower

    with _stopped(folder):
        run_flower(checked, folder.path, quiet=quiet or as_json)
    with Ledger(folder.ledger) as ledger:
        _finish(folder, ledger, as_json)


@app.command()
def resume(run: RunPath, quiet: Quiet = False, as_json: Json = False) -> None:
    """Go on with a run that was interrupted."""
    from fedzo.run_folder import RunFolder

    folder = RunFolder.open(run)
    _go(folder, folder.load_config(), quiet, as_json)


@app.command("plan-rounds")
def plan_rounds(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; none: the embedded default.")
    ] = None,
    override: Override = None,
    measuring: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Take a local step, to tell the time that a run takes.")
    ] = True,
    step_seconds: Annotated[
        float, typer.Option(help="Seconds that a client's local step takes, instead of measuring them here.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tell what a run will cost, before it starts: bytes, forward passes, seconds."""
    from fedzo import cost
    from fedzo.config import load_config
    from fedzo.experiment import Experiment

    if not 0.0 <= step_seconds < float("inf"):
        raise ConfigError(f"--step-seconds is {step_seconds:g}, wanted a number above 0")
    checked = load_config(config, override or ()).resolved()
    with _loading(quiet or as_json, "loading model and data"):
        experiment = Experiment(checked)

        def speed(spec: Any) -> cost.Speed | None:
            if step_seconds:
                return cost.Speed(step_seconds)
            return cost.measure(experiment, spec) if measuring else None

        figures = cost.plan_rounds(experiment, speed=speed)
    print_figures(figures, as_json)


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file.")],
    budget: Annotated[int, typer.Option(min=1, help="Whole runs that all trials together may take.")],
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--tune",
            metavar="KEY=LOW:HIGH[:log]",
            help="Look for a key's value there; repeatable. The learning rate "
            'is looked for within a factor of 10 of "auto" unless given.',
        ),
    ] = None,
    override: Override = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for what was found; none: CONFIG-tuned.toml.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder of the trials; none: runs/tune-CONFIG.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Look for the learning rate, and other numbers, on validation data; the same command goes on after Ctrl-C."""
    from fedzo.config import flatten, from_flat, load_config, to_toml
    from fedzo.files import write_atomically
    from fedzo.tune import parse_range, search

    base = load_config(config, override or ())
    target, trials = (
        out or config.with_name(f"{config.stem}-tuned.toml"),
        folder or Path("runs") / f"tune-{config.stem}",
    )
    if target.exists() or not target.parent.is_dir():
        state = "exists; give a file that does not" if target.exists() else "is in a directory that does not exist"
        raise ConfigError(f"--out {target} {state}")
    wanted = [parse_range(text, base) for text in ranges or ()]
    silent = quiet or as_json
    with _loading(silent, "trials run"):
        found = search(base.resolved(), wanted, budget, trials, (lambda _: None) if silent else _tell)
    best = found.best
    why = (
        f"# {config.name} as `fedzo tune` found it: the best of {len(found.trials)} trials with {best.loss:.4f} after "
        f"{best.rounds} rounds, by validation loss.\n"
    )
    write_atomically(target, why + to_toml(from_flat({**flatten(base), **best.values})))
    _print_search(found, target, trials, as_json)


def _tell(trial: Any) -> None:
    values = ", ".join(f"{key} {value:g}" for key, value in trial.values.items())
    errors.print(
        f"trial {trial.number}: {values}: {trial.state} after {trial.rounds} rounds, validation loss {trial.loss:.4f}",
        markup=False,
    )


def _print_search(found: Any, target: Path, folder: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from fedzo.files import strict_json

    total: dict[str, Any] = {
        "config": str(target),
        "folder": str(folder),
        "trials": len(found.trials),
        "best_trial": found.best.number,
        **{key.replace("method.", ""): value for key, value in found.best.values.items()},
        "validation_loss": found.best.loss,
        "rounds": sum(trial.rounds for trial in found.trials),
        "forwards": round(sum(trial.forwards for trial in found.trials)),
        "validation_forwards": sum(trial.validation_forwards for trial in found.trials),
        "probe_forwards": found.probe_forwards,
    }
    if as_json:
        print(strict_json({**total, "table": [asdict(trial) for trial in found.trials]}))
        return
    columns = ["trial", *found.best.values, "state", "rounds", "validation loss", "forwards", "validation forwards"]
    rows = [
        [str(t.number), *(f"{value:g}" for value in t.values.values()), t.state, str(t.rounds), f"{t.loss:.4f}",
         f"{t.forwards:,.0f}", f"{t.validation_forwards:,}"]
        for t in found.trials
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:
        console.print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)), markup=False)
    console.print()
    print_figures(total, False)


@app.command()
def replay(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="Directory for the export; must not exist.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="FORMAT", help="merged, delta, peft or shira; none: peft for an adapter, else merged."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of a merged model: float32 (the default), float16 or bfloat16.")
    ] = None,
    round_: Round = "last",
    as_json: Json = False,
) -> None:
    """Rebuild the fine-tuned model from base model and ledger: for `from_pretrained`, PEFT, or as a sparse delta."""
    from fedzo.engine import choose_round
    from fedzo.export import default_form, export

    folder, ledger = _open(run)
    with ledger:
        rounds, config = choose_round(ledger, round_), folder.load_config()
        form = form or default_form(config)
        with _loading(as_json, "replaying"):
            digest = export(config, ledger, rounds, out, form=form, dtype=dtype)
    print_figures({"model": str(out), "format": form, "rounds": rounds, "theta_digest": digest}, as_json)


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help='"validation" or "test".')] = "test",
    round_: Round = "last",
    as_json: Json = False,
) -> None:
    """Evaluate a run's model after a round, by replaying its ledger."""
    from fedzo import engine
    from fedzo.experiment import open_experiment
    from fedzo.federation.coordinator import replay as replay_ledger

    if split not in ("validation", "test"):
        raise ConfigError(f'--split is "{split}"; wanted "validation" or "test"')
    folder, ledger = _open(run)
    with ledger:
        rounds = engine.choose_round(ledger, round_)
        with _loading(as_json, "replaying and evaluating"):
            experiment = open_experiment(folder.load_config(), ledger)
            engine.check_same(ledger, experiment)
            replica = experiment.replica(ledger.spec)
            replay_ledger(ledger, replica, rounds)
            data = experiment.validation if split == "validation" else experiment.test
            if data is None:
                raise ConfigError("the run has no test data: set data.test, or --split validation")
            metrics = experiment.evaluate(replica.theta, data)
    figures = {"split": split, "rounds": rounds, "examples": len(data), **metrics}
    figures["theta_digest"] = replica.digest().hex()
    print_figures(figures, as_json)


@app.command()
def inspect(
    run: RunPath,
    following: Annotated[
        bool, typer.Option("--follow", "-f", help="First show rounds and evaluations, until the run has ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """What a run is: configuration, rounds, records, bytes up and down a client, accuracy."""
    from fedzo.config import Config, flatten
    from fedzo.files import strict_json
    from fedzo.report import summarise

    if following:
        _follow(run, as_json)
    folder, ledger = _open(run)
    with ledger:
        config, figures = folder.load_config(), folder.settled() | summarise(ledger) | _privacy(folder, ledger)
    default = flatten(Config())
    changed = {key: value for key, value in flatten(config).items() if value != default[key]}
    if as_json:
        print(strict_json({"run": str(folder.path), "config": flatten(config), **figures}))
        return
    print_figures({"run": str(folder.path), **figures}, False)
    console.print("\nconfiguration (what differs from the default):")
    for key, value in changed.items():
        console.print(f"  {key} = {value!r}", markup=False)


def _follow(run: Path, as_json: bool) -> None:
    """Prints a run's rounds and evaluations until it has ended; with JSON a line each."""
    from fedzo.federation.ledger import Ledger
    from fedzo.files import strict_json
    from fedzo.report import follow
    from fedzo.run_folder import RunFolder

    folder = RunFolder(run.parent if run.name == "ledger.sqlite" else run)
    if not folder.path.is_dir():
        raise RunError(f"there is no folder {folder.path}; give the one that `fedzo run --out` is given")
    if not (as_json or folder.ledger.exists()):
        errors.print(f"waiting for the run in {folder.path} to begin", markup=False)
    rounds = 0
    for event in follow(folder):
        if not rounds:
            with Ledger(folder.ledger) as ledger:
                rounds = ledger.spec.rounds
        print(strict_json(event) if as_json else shown_event(event, rounds), flush=True)
    if not as_json:
        print()


@app.command()
def verify(
    run: RunPath,
    chain_only: Annotated[bool, typer.Option("--chain-only", help="Re-hash without loading the base model.")] = False,
    as_json: Json = False,
) -> None:
    """Re-hash a ledger and re-replay it; says the first bad round."""
    from fedzo.engine import check_same
    from fedzo.experiment import open_experiment
    from fedzo.report import verify as verify_ledger

    folder, ledger = _open(run)
    with ledger:
        with _loading(as_json, "verifying"):
            experiment = None if chain_only else open_experiment(folder.load_config(), ledger)
            if experiment is not None:
                check_same(ledger, experiment)
            compared = verify_ledger(ledger, experiment)
        figures = {"rounds_verified": ledger.rounds, "digests_compared": compared, "ledger_hash": ledger.head.hex()}
        print_figures({**figures, "complete": ledger.rounds == ledger.spec.rounds}, as_json)


@app.command()
def plot(run: RunPath) -> None:
    """Draw a run's loss, accuracy and bytes as PNG files in its folder."""
    from fedzo.report import plot as draw

    folder, ledger = _open(run)
    with ledger:
        for path in draw(ledger, folder.path):
            console.print(str(path), markup=False)


@app.command()
def mask(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='Directory, hub name, or "embedded".')],
    density: Annotated[
        float, typer.Option(help="Share of the entries of all matrices to take, above 0, at most 1.")
    ] = 0.001,
    method: Annotated[
        Method, typer.Option(help="Squared gradients by backward, their estimate by forwards, weights, or a draw.")
    ] = Method.SENSITIVE,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on, for sensitive and forward.")] = None,
    task: Annotated[str, typer.Option(help="Calibrate on a task's training data instead of text.")] = "",
    data: Annotated[str, typer.Option(help="Directory or hub name of the task's data.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="File; none: mask-METHOD-HASH.safetensors.")] = None,
    kind: Annotated[Kind, typer.Option(help="What the model serves as, in the run too.")] = Kind.CAUSAL,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "",
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence, at most.")] = 128,
    examples: Annotated[int, typer.Option(help="Calibration sequences or examples.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides the draw and the calibration examples.")] = 0,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of parameter names, repeatable; none: all.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of names to leave out; repeatable.")] = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="The same share of each matrix.")] = False,
    compare: Annotated[Path | None, typer.Option(help="Another mask: show the overlap.")] = None,
    device: Annotated[str, typer.Option(help='"auto", "cpu" or "cuda".')] = "auto",
    as_json: Json = False,
) -> None:
    """Choose the entries of a base model to train, and write them as one artifact that its hash names."""
    from fedzo.config import from_flat
    from fedzo.experiment import Experiment
    from fedzo.spaces import Mask

    if method in (Method.SENSITIVE, Method.FORWARD) and (calibration is None) != bool(task):
        raise ConfigError(
            f"--method {method} needs data to calibrate on: give either --calibration TEXT, or --task with --data"
        )
    if bool(task) != bool(data):
        raise ConfigError("--task and --data belong together: the task's name and where its training data is")
    if out is not None and (out.exists() or not out.parent.is_dir()):
        state = "exists; give a file that does not" if out.exists() else "is in a directory that does not exist"
        raise ConfigError(f"--out {out} {state}")
    other = None if compare is None else Mask.load(compare)
    keys = {
        "seed": seed, "model.source": model, "model.kind": kind.value, "model.revision": revision,
        "model.max_length": length, "space.kind": "sparse", "space.mask": method.value, "space.density": density,
        "space.include": include or ["*"], "space.exclude": exclude or [], "space.per_tensor": per_tensor,
        "space.calibration": "" if calibration is None or task else str(calibration),
        "space.calibration_examples": examples, "runtime.device": device,
    }  # fmt: skip
    if task:
        keys |= {"task.name": task, "data.source": data, "data.test": ""}
    with _loading(as_json, "making the mask"):
        experiment = Experiment(from_flat(keys, "fedzo mask"))
        made = experiment.mask
        assert made is not None  # the space is sparse
        if other is not None:
            other.check(experiment.loaded.model, experiment.loaded.fingerprint)
        path = out or Path(f"mask-{method}-{made.hash[:12]}.safetensors")
        made.save(path)
    _print_mask(made, path, other, as_json)


def _print_mask(made: Any, path: Path, other: Any, as_json: bool) -> None:
    from math import prod

    from fedzo.files import strict_json
    from fedzo.spaces import overlap

    rows = sorted(((e.indices.numel(), e.name, prod(e.shape)) for e in made.entries), key=lambda row: (-row[0], row[1]))
    figures: dict[str, Any] = {
        "mask": str(path),
        "hash": made.hash,
        "method": made.method,
        "entries": made.size,
        "tensors": len(rows),
        "file_bytes": path.stat().st_size,
        "bytes_per_index": made.index_bytes / made.size,
    }
    if other is not None:
        common = overlap(made, other)
        figures |= {
            "overlap": common,
            "overlap_share": common / made.size,
            "overlap_share_of_other": common / other.size,
            "overlap_jaccard": common / (made.size + other.size - common),
        }
    if as_json:
        held = [
            {"tensor": name, "entries": count, "share": count / made.size, "density": count / size}
            for count, name, size in rows
        ]
        print(strict_json({**figures, "held": held}))
        return
    print_figures(figures, False)
    shown = rows[:_MASK_ROWS]
    width = max(len(name) for _, name, _ in shown)
    console.print(f"\n{'tensor':{width}}  {'entries':>10}  share of mask  own density", markup=False)
    for count, name, size in shown:
        console.print(f"{name:{width}}  {count:>10,}  {count / made.size:>13.2%}  {count / size:>11.4%}", markup=False)
    if rest := rows[_MASK_ROWS:]:
        count = sum(row[0] for row in rest)
        console.print(f"{f'{len(rest)} more':{width}}  {count:>10,}  {count / made.size:>13.2%}", markup=False)


@app.command("config")
def show_config() -> None:
    """Print every key with its default and meaning, as a TOML file to start from."""
    from fedzo.config import describe

    print(describe())


@app.command("methods")
def show_methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method; none: all, in a table.")] = None,
    as_json: Json = False,
) -> None:
    """The methods that method.name knows: what they are made of, cost, and are valid under."""
    from dataclasses import asdict

    from fedzo.files import strict_json
    from fedzo.method_facts import facts, row
    from fedzo.methods import METHODS

    found = [facts(chosen) for chosen in ([name] if name else METHODS)]
    if as_json:
        print(strict_json(asdict(found[0]) if name else [asdict(one) for one in found]))
        return
    if not name:
        print_table([row(one) for one in found])
        return
    (one,) = found
    print_figures(row(one) | {"title": one.title} | ({"paper": one.paper} if one.paper else {}), False)
    for part in one.parts:
        console.print(f"\n{part.kind} {part.name}: {part.source}", markup=False)
        for paragraph in (part.formula, *part.remarks):
            console.print(f"  {paragraph}", markup=False)
    console.print("\nneeds:")
    for limit in one.limits:
        console.print(f"  {limit.wanted}: {limit.because}", markup=False)


def _open(run: Path) -> tuple[Any, Any]:
    from fedzo.federation.ledger import Ledger
    from fedzo.run_folder import RunFolder

    folder = RunFolder.open(run)
    return folder, Ledger(folder.ledger)


def _version(show: bool) -> None:
    if show:
        print(f"fedzo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """fedzo."""


def main() -> None:
    """Entry point of the console script."""
    keep_memory()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries are told once, by the error that they end in
    app()
