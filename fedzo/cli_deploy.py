"""`fedzo deploy`: Flower's deployment engine on this machine. `fedzo client`: what this machine's workers do."""

import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedzo.errors import RunError
from fedzo.terminal import Json, Override, Quiet, console, errors, human_bytes, print_figures, print_table

deploy = typer.Typer(help="Nodes of their own, with TLS and authentication.", no_args_is_help=True)
client = typer.Typer(help="The workers that hold models on this machine.", no_args_is_help=True)


@deploy.command("local")
def local(
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes, one a client; sets data.clients.")] = 3,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="TOML file; none: the embedded default.")
    ] = None,
    override: Override = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder, also one to go on with.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Nodes share one worker, and so one base model.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Start a SuperLink and SuperNodes on loopback, run a configuration on them, and take all of it down again."""
    from fedzo.config import load_config
    from fedzo.deployment import Deployment, one_thread_each, play
    from fedzo.federation.ledger import Ledger
    from fedzo.flower import require_flower
    from fedzo.report import plot, summarise
    from fedzo.run_folder import RunFolder, new_run_path

    require_flower()
    checked = load_config(config, [*(override or ()), f"data.clients={nodes}"]).resolved()
    folder = RunFolder(out or new_run_path(checked))
    silent = quiet or as_json
    with Deployment(folder.path / "deployment", nodes, share=share) as deployment:
        with nullcontext() if silent else errors.status("starting SuperLink and SuperNodes"):
            deployment.start()
        with Live(console=errors, refresh_per_second=4) if errors.is_terminal and not silent else nullcontext() as live:

            def show(state: Any) -> None:
                for line in () if silent else state.lines:  # above the table, where there is one
                    errors.print(line, markup=False)
                if live is not None:
                    live.update(_table(state))

            figures = play(deployment, one_thread_each(checked, nodes), folder, show)
    with Ledger(folder.ledger) as ledger:
        if importlib.util.find_spec("matplotlib"):
            plot(ledger, folder.path)
        print_figures({"run": str(folder.path), **folder.settled(), **summarise(ledger), **figures}, as_json)


@deploy.command("credentials")
def credentials(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Is made; must not exist.")],
    address: Annotated[list[str] | None, typer.Option("--address", help="IP address of the SuperLink.")] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="Host name of the SuperLink.")] = None,
    nodes: Annotated[int, typer.Option(min=0, help="Keys of so many nodes: node-0, node-1, ...")] = 0,
) -> None:
    """Make an authority's certificate, the SuperLink's certificate and key, the SuperExec's secret, and node keys."""
    from fedzo.flower import require_flower

    require_flower()
    from fedzo.credentials import make_credentials, make_node_key  # of a library that Flower brings

    if folder.exists():
        raise RunError(f"{folder} is there already; choose another folder, or remove it")
    if not address and not name:
        raise RunError("a certificate is of an address or a name: give --address or --name, as the nodes will write it")
    files = make_credentials(folder, address or (), name or ())
    keys = [make_node_key(folder / f"node-{number}") for number in range(nodes)]
    for path in (files.authority, files.certificate, files.key, files.secret, *keys):
        console.print(str(path), markup=False)


@deploy.command("app")
def copy(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Is made; must not exist.")]) -> None:
    """Copy fedzo's Flower app, for `flwr run DIR`."""
    from fedzo.flower import copy_app

    if folder.exists():
        raise RunError(f"{folder} is there already; choose another folder, or remove it")
    copy_app(folder)
    console.print(str(folder), markup=False)


def _table(state: Any) -> Group:
    """What a deployment does: nodes with their workers and bytes."""
    nodes = Table("node", "SuperNode", "worker", "memory", "model loads", "at round", "sent", "received", box=None)
    for row in state.nodes:
        worker = row.worker
        nodes.add_row(
            str(row.number),
            "up" if row.up else "down",
            "none" if not worker else "busy" if worker.get("busy") else "waits",
            human_bytes(worker.get("memory", 0)) if worker else "",
            str(row.loads),
            f"{worker.get('round', 0)}/{worker.get('rounds', 0)}" if worker else "",
            human_bytes(row.sent),
            human_bytes(row.received),
        )
    return Group(nodes, Text(f"{state.status}, {state.seconds:.0f} s", style="bold"))


@client.command("status")
def status(as_json: Json = False) -> None:
    """Show the workers of this user on this machine: their runs, clients, models and memory."""
    from fedzo.files import strict_json
    from fedzo.resident import link

    found = link.status()
    if as_json:
        print(strict_json({"workers": [{"worker": name, **fields} for name, fields in found.items()]}))
        return
    if not found:
        console.print("no worker runs")
        return
    print_table(
        [
            {
                "worker": name,
                "pid": str(fields["pid"]),
                "state": "busy" if fields["busy"] else f"idle {fields['idle']:.0f} s",
                "run": str(fields.get("run", "")),
                "clients": " ".join(map(str, fields.get("clients", []))),
                "round": f"{fields.get('round', 0)}/{fields.get('rounds', 0)}",
                "loads": str(fields.get("loads", 0)),
                "memory": human_bytes(int(fields.get("memory", 0))),
                "device": str(fields.get("device", "")),
                "base": ", ".join(map(str, fields.get("bases", []))),
            }
            for name, fields in found.items()
        ]
    )
