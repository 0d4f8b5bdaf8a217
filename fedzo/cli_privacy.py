"""The commands of `fedzo privacy`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fedzo.errors import ConfigError
from fedzo.limits import PrivacyMode
from fedzo.privacy.accounting import Law, Release, Sampling
from fedzo.terminal import Json, Override, console, print_figures

Draw = Literal["poisson", "fixed"]

app = typer.Typer(no_args_is_help=True, help="Plan, report and check what a private run promises.")


@app.command()
def plan(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")],
    epsilon: Annotated[float, typer.Option(help="Budget of an example or client.")] = 2.0,
    delta: Annotated[float, typer.Option(help="Chance that it does not hold; 0: never, for laplace.")] = 1e-5,
    sampling_rate: Annotated[
        float, typer.Option(help="Chance of an example (client-central: a client) to take part in a step (round).")
    ] = 1.0,
    mode: Annotated[PrivacyMode, typer.Option(help="Who is protected, and where noise is added.")] = "example-local",
    units: Annotated[int, typer.Option(min=0, help="Examples of a client, or clients; 0: not said.")] = 0,
    local_steps: Annotated[int, typer.Option(min=1, help="K, steps of a client in a round.")] = 1,
    clip: Annotated[float, typer.Option(help="Bound on their norm.")] = 1.0,
    mechanism: Annotated[Law, typer.Option(help="Discrete noise.")] = "gaussian",
    sampling: Annotated[Draw, typer.Option(help="Each by chance, or a fixed number.")] = "poisson",
    as_json: Json = False,
) -> None:
    """The noise that a budget asks for, and the error that it makes, before there is a run."""
    from fedzo.privacy.accounting import authority, calibrate, cross_check
    from fedzo.privacy.mechanisms import MECHANISMS

    for option, value in (("--epsilon", epsilon), ("--clip", clip)):
        if not value > 0.0:
            raise ConfigError(f"{option} is {value:g}, wanted a number above 0")
    if not 0.0 < sampling_rate <= 1.0:
        raise ConfigError(f"--sampling-rate is {sampling_rate:g}, wanted above 0 and at most 1")
    if not 0.0 < delta < 1.0 and (delta or mechanism == "gaussian"):
        raise ConfigError(f"--delta is {delta:g}, wanted above 0 and below 1 (0 with --mechanism laplace)")
    if units and delta > 1.0 / units:
        raise ConfigError(
            f"--delta is {delta:g}, above 1 / {units} (--units): it would allow one of them to be published whole; "
            f"wanted well below {1.0 / units:g}"
        )
    if sampling_rate != 1.0 and mode in ("client-local", "client-secagg"):
        raise ConfigError(
            f"--sampling-rate is {sampling_rate:g}, but with --mode {mode} the server knows who takes part: no "
            "amplification is to be had; leave it out, and give as --rounds those that a client takes part in"
        )
    drawn: Sampling = "none" if sampling_rate == 1.0 else sampling
    releases = rounds * (local_steps if mode == "example-local" else 1)
    release = Release(mechanism, 1.0, drawn, sampling_rate, units if drawn == "fixed" else 0)
    noise = calibrate(release, releases, epsilon, delta)
    planned = replace(release, noise_multiplier=noise)
    figures: dict[str, Any] = {
        "noise_multiplier": noise,
        "releases": releases,
        "sampling": drawn,
        "neighbours": planned.relation,
        "noise_of_a_sum": MECHANISMS[mechanism](noise).deviation * clip,
    }
    if units:
        expected = 1.0 if mode == "client-local" else sampling_rate * units
        figures["expected_units"] = expected
        figures["scalar_error"] = figures["noise_of_a_sum"] / expected
    figures |= {f"epsilon_{name}": found for name, found in cross_check(planned, releases, delta).items()}
    figures["accountant"] = authority(planned, delta).source
    print_figures(figures, as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    budgets: Annotated[
        Path | None, typer.Option(help="Where clients of this machine keep their budgets; none: in the run's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run has spent, of each client or of the run, and a paragraph that says what it means."""
    from fedzo.federation.ledger import Ledger
    from fedzo.files import strict_json
    from fedzo.privacy_report import checks, paragraph, privacy_figures, spent
    from fedzo.run_folder import BUDGETS, RunFolder

    folder = RunFolder.open(run)
    with Ledger(folder.ledger) as ledger:
        each = spent(ledger, budgets or folder.path / BUDGETS)
        figures = privacy_figures(ledger, each)
        figures |= {f"epsilon_{name}": found for name, found in checks(ledger, each).items()}
        if ledger.ended:
            figures["ended"] = ledger.ended
        text = paragraph(ledger, each)
    if as_json:
        print(strict_json({**figures, "clients": [asdict(one) for one in each], "statement": text}))
        return
    print_figures(figures, False)
    if len(each) > 1:
        console.print("\nclient  releases      rate   epsilon  counted by")
        for one in each:
            by = "the client" if one.own else "the server"
            row = f"{one.client:>6}  {one.releases:>8,}  {one.release.rate:>8.4g}  {one.epsilon:>8.4f}  {by}"
            console.print(row, highlight=False)
    console.print(f"\n{text}", markup=False)


@app.command()
def clip(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file, with public data as data.validation.")],
    quantile: Annotated[float, typer.Option(help="Of the norms: what share is to be within the bound.")] = 0.5,
    override: Override = None,
    as_json: Json = False,
) -> None:
    """Suggest privacy.clip, from public data only."""
    from fedzo.clip import suggest
    from fedzo.config import load_config
    from fedzo.experiment import Experiment
    from fedzo.files import strict_json

    chosen = load_config(config, override or ()).resolved()
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
