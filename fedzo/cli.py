"""The command line. Every error that a user can cause ends in one message and an exit code that is not 0."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedzo import __version__
from fedzo.errors import ConfigError, FedzoError
from fedzo.runtime import keep_memory

INTERRUPTED = 130

app = typer.Typer(
    name="fedzo",
    help="Federated zeroth-order fine-tuning: forward passes only, seeds and scalars on the wire.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
errors = Console(stderr=True, soft_wrap=True, highlight=False)
console = Console(highlight=False)


class Engine(StrEnum):
    LOCAL = "local"
    FLOWER = "flower"


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, and nothing else.")]
Override = Annotated[
    list[str], typer.Option("--override", "-o", metavar="KEY=VALUE", help="Set a key of the configuration.")
]
Round = Annotated[str, typer.Option("--round", help='After which round: "last", "best" (on validation) or a number.')]


class _Progress:
    """A progress bar with round, loss, accuracy, scalars and bytes."""

    def __init__(self, rounds: int, done: int, clients: int, sent: int) -> None:
        self._clients, self._sent, self._quality, self._before = clients, sent, "", ""
        self.bar = Progress(
            TextColumn("round"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=errors,
        )  # fmt: skip
        self._task = self.bar.add_task("", total=rounds, completed=done, text="")

    def round(self, summary: Any) -> None:
        self._sent += summary.bytes_up
        loss = "no quorum" if summary.loss is None else f"loss {summary.loss:.4f}"
        dropped = f"  dropped {sum(summary.dropped.values())}" if summary.dropped else ""
        text = f"{loss}{self._quality}  {summary.scalars} scalars  {_size(self._sent / self._clients)} sent/client{dropped}"
        self.bar.update(self._task, completed=summary.round + 1, text=text)

    def evaluation(self, rounds: int, split: str, metrics: dict[str, float]) -> None:
        name = next(key for key in (*metrics, "loss") if key != "loss" or len(metrics) == 1)
        shown = f"{metrics[name]:.1%}" if name == "accuracy" else f"{metrics[name]:.3f}"
        if split == "validation":
            self._quality = f"  {name} {shown}"
            if not self.bar.tasks[0].fields["text"]:
                self.bar.update(self._task, text=self._quality.strip())
        self.bar.console.print(f"[dim]after {rounds} rounds: {split} {name} {shown}, loss {metrics['loss']:.4f}[/dim]")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


@contextmanager
def _loading(quiet: bool, text: str) -> Iterator[None]:
    if quiet:
        yield
    else:
        with errors.status(text):
            yield


def _print_figures(figures: dict[str, Any], as_json: bool, title: str = "") -> None:
    if as_json:
        print(json.dumps(figures))
        return
    table = Table(show_header=False, box=None, title=title or None, title_justify="left", pad_edge=False)
    for name, value in figures.items():
        text = name.replace("_", " ")
        if isinstance(value, float) and "accuracy" in name:
            shown = f"{value:.2%}"
        elif "bytes" in name or name.endswith("_up_per_client"):
            shown = f"{value:,} ({_size(value)})"
        elif isinstance(value, float):
            shown = f"{value:.4f}"
        elif isinstance(value, dict):
            shown = ", ".join(f"{key} {n}" for key, n in value.items()) or "none"
        else:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(text, shown)
    console.print(table)


def _go(folder: Any, config: Any, quiet: bool, as_json: bool) -> None:
    """Runs a folder's run to its end in this process and prints its figures."""
    from fedzo import engine
    from fedzo.experiment import Experiment
    from fedzo.federation.ledger import Ledger
    from fedzo.report import plot, summarise

    silent = quiet or as_json
    with _loading(silent, "loading model and data"):
        experiment = Experiment(config)
        done = sent = 0
        if folder.ledger.exists():
            with Ledger(folder.ledger) as ledger:
                done, sent = ledger.rounds, sum(summary["bytes_up"] for summary in ledger.summaries())
    try:
        if silent:
            ledger = engine.run(experiment, folder)
        else:
            progress = _Progress(config.federation.rounds, done, config.data.clients, sent)
            with progress.bar:
                ledger = engine.run(experiment, folder, [progress])
    except KeyboardInterrupt:
        with Ledger(folder.ledger) as ledger:
            done = ledger.rounds
        errors.print(f"interrupted after {done} committed rounds; `fedzo resume {folder.path}` goes on")
        raise typer.Exit(INTERRUPTED) from None
    with ledger:
        _finish(folder, ledger, as_json, plot, summarise)


def _finish(folder: Any, ledger: Any, as_json: bool, plot: Any, summarise: Any) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib"):
        plot(ledger, folder.path)
    _print_figures({"run": str(folder.path), **summarise(ledger)}, as_json)


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; none: the embedded default.")
    ] = None,
    override: Override = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; none: runs/TASK-DATE-TIME.")] = None,
    engine: Annotated[Engine, typer.Option(help="One process, or Flower's simulation with Ray.")] = Engine.LOCAL,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model across clients."""
    from fedzo.config import load_config
    from fedzo.run_folder import RunFolder, new_run_path

    checked = load_config(config, override).resolved()
    path = out or new_run_path(checked)
    if engine is Engine.FLOWER:
        from fedzo.federation.ledger import Ledger
        from fedzo.flower import run_flower
        from fedzo.report import plot, summarise

        if (path / "ledger.sqlite").exists():
            raise ConfigError(f"{path} already holds a run; choose another --out")
        run_flower(checked, path, quiet=quiet or as_json)
        with Ledger(path / "ledger.sqlite") as ledger:
            _finish(RunFolder.open(path), ledger, as_json, plot, summarise)
        return
    _go(RunFolder.create(path, checked), checked, quiet, as_json)


@app.command()
def resume(run: RunPath, quiet: Quiet = False, as_json: Json = False) -> None:
    """Go on with a run that was interrupted."""
    from fedzo.run_folder import RunFolder

    folder = RunFolder.open(run)
    _go(folder, folder.load_config(), quiet, as_json)


@app.command()
def replay(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="Directory for the fine-tuned model; must not exist.")],
    round_: Round = "last",
    as_json: Json = False,
) -> None:
    """Rebuild the fine-tuned model from base model and ledger, for `from_pretrained` (adapters: PeftModel)."""
    from fedzo import engine
    from fedzo.experiment import Experiment

    if out.exists():
        raise ConfigError(f"{out} exists; give a directory that does not")
    folder, ledger = _open(run)
    with ledger:
        rounds = engine.choose_round(ledger, round_)
        with _loading(as_json, "replaying"):
            experiment = Experiment(folder.load_config())
            engine.check_same(ledger, experiment)
            digest = engine.export(experiment, ledger, rounds, out)
    _print_figures({"model": str(out), "rounds": rounds, "theta_digest": digest}, as_json)


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help='"validation" or "test".')] = "test",
    round_: Round = "last",
    as_json: Json = False,
) -> None:
    """Evaluate a run's model after a round, by replaying its ledger."""
    from fedzo import engine
    from fedzo.experiment import Experiment
    from fedzo.federation.coordinator import replay as replay_ledger

    if split not in ("validation", "test"):
        raise ConfigError(f'--split is "{split}"; wanted "validation" or "test"')
    folder, ledger = _open(run)
    with ledger:
        rounds = engine.choose_round(ledger, round_)
        with _loading(as_json, "replaying and evaluating"):
            experiment = Experiment(folder.load_config())
            engine.check_same(ledger, experiment)
            replica = experiment.replica(ledger.spec)
            replay_ledger(ledger, replica, rounds)
            data = experiment.validation if split == "validation" else experiment.test
            if data is None:
                raise ConfigError("the run has no test data: set data.test, or --split validation")
            metrics = experiment.evaluate(replica.theta, data)
    figures = {"split": split, "rounds": rounds, "examples": len(data), **metrics}
    figures["theta_digest"] = replica.digest().hex()
    _print_figures(figures, as_json)


@app.command()
def inspect(run: RunPath, as_json: Json = False) -> None:
    """What a run is: configuration, rounds, records, bytes up and down a client, accuracy."""
    from fedzo.config import Config, flatten
    from fedzo.report import summarise

    folder, ledger = _open(run)
    with ledger:
        config, figures = folder.load_config(), summarise(ledger)
    default = flatten(Config())
    changed = {key: value for key, value in flatten(config).items() if value != default[key]}
    if as_json:
        print(json.dumps({"run": str(folder.path), "config": flatten(config), **figures}))
        return
    _print_figures({"run": str(folder.path), **figures}, False)
    console.print("\nconfiguration (what differs from the default):")
    for key, value in changed.items():
        console.print(f"  {key} = {value!r}", markup=False)


@app.command()
def verify(
    run: RunPath,
    chain_only: Annotated[bool, typer.Option("--chain-only", help="Re-hash without loading the base model.")] = False,
    as_json: Json = False,
) -> None:
    """Re-hash a ledger and re-replay it; says the first bad round."""
    from fedzo.engine import check_same
    from fedzo.experiment import Experiment
    from fedzo.report import verify as verify_ledger

    folder, ledger = _open(run)
    with ledger:
        with _loading(as_json, "verifying"):
            experiment = None if chain_only else Experiment(folder.load_config())
            if experiment is not None:
                check_same(ledger, experiment)
            compared = verify_ledger(ledger, experiment)
        figures = {"rounds_verified": ledger.rounds, "digests_compared": compared, "ledger_hash": ledger.head.hex()}
        _print_figures({**figures, "complete": ledger.rounds == ledger.spec.rounds}, as_json)


@app.command()
def plot(run: RunPath) -> None:
    """Draw a run's loss, accuracy and bytes as PNG files in its folder."""
    from fedzo.report import plot as draw

    folder, ledger = _open(run)
    with ledger:
        for path in draw(ledger, folder.path):
            console.print(str(path), markup=False)


@app.command("config")
def show_config() -> None:
    """Print every key with its default and meaning, as a TOML file to start from."""
    from fedzo.config import describe

    print(describe())


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
    """Entry point: turns errors into one message and an exit code (2 configuration, 1 other, 130 interrupted)."""
    keep_memory()
    try:
        app()
    except FedzoError as error:
        errors.print("[bold red]error:[/bold red] ", end="")
        errors.print(str(error), markup=False)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(INTERRUPTED)
