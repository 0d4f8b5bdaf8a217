"""The commands of `fedzo privacy`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedzo.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Plan, report and check what a private run promises.")


class Mode(StrEnum):
    EXAMPLE_LOCAL = "example-local"
    CLIENT_CENTRAL = "client-central"
    CLIENT_LOCAL = "client-local"
    CLIENT_SECAGG = "client-secagg"


class Noise(StrEnum):
    GAUSSIAN = "gaussian"
    LAPLACE = "laplace"


class Sampling(StrEnum):
    POISSON = "poisson"
    FIXED = "fixed"


Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, and nothing else.")]


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")],
    epsilon: Annotated[float, typer.Option(help="Budget of an example or client.")] = 2.0,
    delta: Annotated[float, typer.Option(help="Chance that it does not hold; 0: never, for laplace.")] = 1e-5,
    sampling_rate: Annotated[
        float, typer.Option(help="Chance of an example (client-central: a client) to take part in a step (round).")
    ] = 1.0,
    mode: Annotated[Mode, typer.Option(help="Who is protected, and where noise is added.")] = Mode.EXAMPLE_LOCAL,
    units: Annotated[int, typer.Option(min=0, help="Examples of a client, or clients; 0: not said.")] = 0,
    local_steps: Annotated[int, typer.Option(min=1, help="K, steps of a client in a round.")] = 1,
    queries: Annotated[int, typer.Option(min=1, help="P, scalars of a step, clipped together.")] = 1,
    clip: Annotated[float, typer.Option(help="Bound on their norm.")] = 1.0,
    mechanism: Annotated[Noise, typer.Option(help="Discrete noise.")] = Noise.GAUSSIAN,
    sampling: Annotated[Sampling, typer.Option(help="Each by chance, or a fixed number.")] = Sampling.POISSON,
    as_json: Json = False,
) -> None:
    """The noise that a budget asks for, and the error that it makes, before there is a run."""
    from fedzo.cli import print_figures
    from fedzo.privacy.accounting import Release, authority, calibrate, cross_check

    _check(epsilon, delta, sampling_rate, clip, units, mode, mechanism, sampling)
    amplified = mode in (Mode.EXAMPLE_LOCAL, Mode.CLIENT_CENTRAL) and sampling_rate < 1.0
    drawn = sampling.value if amplified else "none"
    releases = rounds * (local_steps if mode is Mode.EXAMPLE_LOCAL else 1)
    rate, of = (sampling_rate, units if drawn == "fixed" else 0) if amplified else (1.0, 0)
    release = Release(mechanism.value, 1.0, drawn, rate, of)  # type: ignore[arg-type]
    noise = calibrate(release, releases, epsilon, delta)
    planned = Release(mechanism.value, noise, drawn, rate, of)  # type: ignore[arg-type]
    expected = rate * units if mode in (Mode.EXAMPLE_LOCAL, Mode.CLIENT_CENTRAL) else float(units)
    figures: dict[str, Any] = {
        "noise_multiplier": noise,
        "releases": releases,
        "sampling": drawn,
        "neighbours": planned.relation,
        "noise_of_a_sum": noise * clip * (1.0 if mechanism is Noise.GAUSSIAN else 2.0**0.5),
    }
    if expected:
        per = 1.0 if mode is Mode.CLIENT_LOCAL else expected
        figures["expected_units"] = expected
        figures["scalar_error"] = figures["noise_of_a_sum"] / per
    figures |= {f"epsilon_{name}": found for name, found in cross_check(planned, releases, delta).items()}
    figures["accountant"] = authority(planned, delta).source
    print_figures(figures, as_json)


def _check(
    epsilon: float, delta: float, rate: float, clip: float, units: int, mode: Mode, mechanism: Noise, sampling: Sampling
) -> None:
    least = 0.0 if mechanism is Noise.LAPLACE else None
    if not epsilon > 0.0:
        raise ConfigError(f"--epsilon is {epsilon:g}, wanted a number above 0")
    if not 0.0 < delta < 1.0 and delta != least:
        raise ConfigError(f"--delta is {delta:g}, wanted above 0 and below 1 (0 with --mechanism laplace)")
    if units and delta > 1.0 / units:
        raise ConfigError(
            f"--delta is {delta:g}, above 1 / {units} (--units): it would allow one of them to be published "
            f"whole; wanted "
            f"well below {1.0 / units:g}"
        )
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"--sampling-rate is {rate:g}, wanted above 0 and at most 1")
    if not clip > 0.0:
        raise ConfigError(f"--clip is {clip:g}, wanted a number above 0")
    if rate < 1.0 and mode in (Mode.CLIENT_LOCAL, Mode.CLIENT_SECAGG):
        raise ConfigError(
            f"--sampling-rate is {rate:g}, but with --mode {mode} the server knows who takes part: no "
            f"amplification is to be "
            "had; leave it out, and give as --rounds those that a client takes part in"
        )
    if sampling is Sampling.FIXED and rate < 1.0 and not units:
        raise ConfigError("--sampling fixed needs --units, the number of those that are drawn from")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    budgets: Annotated[
        Path | None, typer.Option(help="Where clients of this machine keep their budgets; none: in the run's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run has spent, of each client or of the run, and a paragraph that says what it means."""
    from dataclasses import asdict

    from fedzo.cli import console, print_figures
    from fedzo.federation.ledger import Ledger
    from fedzo.privacy_report import checks, paragraph, privacy_figures, spent
    from fedzo.run_folder import BUDGETS, RunFolder

    folder = RunFolder.open(run)
    with Ledger(folder.ledger) as ledger:
        where = budgets or folder.path / BUDGETS
        each, figures = spent(ledger, where), privacy_figures(ledger, where)
        figures |= {f"epsilon_{name}": found for name, found in checks(ledger, each).items()}
        if ledger.ended:
            figures["ended"] = ledger.ended
        text = paragraph(ledger, each)
    if as_json:
        from fedzo.run_folder import strict_json

        print(strict_json({**figures, "clients": [asdict(one) for one in each], "statement": text}))
        return
    print_figures(figures, False)
    if len(each) > 1:
        console.print("\nclient  releases      rate   epsilon  counted by")
        for one in each:
            by = "the client" if one.own else "the server"
            console.print(
                f"{one.client:>6}  {one.releases:>8,}  {one.rate:>8.4g}  {one.epsilon:>8.4f}  {by}", highlight=False
            )
    console.print(f"\n{text}", markup=False)


@app.command()
def clip(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, with public data as data.validation.")],
    quantile: Annotated[float, typer.Option(help="Of the norms: what share is to be within the bound.")] = 0.5,
    override: Annotated[
        list[str], typer.Option("--override", "-o", metavar="KEY=VALUE", help="Set a key of the configuration.")
    ] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Suggest privacy.clip, from public data only."""
    from fedzo.cli import console, print_figures
    from fedzo.clip import suggest
    from fedzo.config import load_config
    from fedzo.experiment import Experiment
    from fedzo.run_folder import strict_json

    chosen = load_config(config, override).resolved()
    found = suggest(Experiment(chosen), quantile)
    figures = {
        "clip": found.clip, "clipped": found.clipped, "units": found.units, "examples": found.examples,
        "forwards": found.forwards,
    }  # fmt: skip
    if as_json:
        print(strict_json({**figures, "quantiles": {f"{q:g}": norm for q, norm in found.quantiles.items()}}))
        return
    print_figures(figures, False)
    console.print("\nquantile  norm")
    for q, norm in found.quantiles.items():
        console.print(f"{q:>8.0%}  {norm:.4g}", highlight=False)
    if chosen.privacy.mode != "example-local" and chosen.federation.local_steps > 1:
        console.print(f"All {chosen.federation.local_steps} local steps are taken at the base model.", highlight=False)
