"""The Flower ServerApp: carries fedzo's plans and answers over Flower's Grid. It holds no algorithm.

The round loop is `fedzo.engine.run`, the same as without Flower.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedzo.config import from_run_config
from fedzo.engine import Transport, run
from fedzo.experiment import Experiment, open_experiment
from fedzo.federation.coordinator import Coordinator, RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.privacy.mechanisms import Ints
from fedzo.run_folder import RunFolder, new_run_path
from fedzo.runtime import keep_memory
from server.nodes import Nodes, wait_for_nodes
from server.secure import secure_sum
from server.simulation import index_mail

app = ServerApp()


def say(text: str) -> None:
    """One line of progress; `fedzo run --engine flower` shows the lines that start so."""
    print(f"fedzo: {text}", flush=True)


class Progress:
    """Prints the evaluations, and about twenty lines of rounds."""

    def __init__(self, rounds: int, *, secret: bool) -> None:
        self._rounds, self._every, self._secret = rounds, max(1, rounds // 20), secret

    def round(self, summary: RoundSummary) -> None:
        done = summary.round + 1
        if done % self._every == 0 or done == self._rounds:
            told = f"round {done}/{self._rounds}: {summary.told}"
            if not self._secret:  # else who took part is nobody's to know
                dropped = "".join(f", {count} dropped ({reason})" for reason, count in summary.dropped.items())
                told += f", {summary.accepted} of {summary.sampled} clients{dropped}"
            say(told)

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        say(f"after {rounds} rounds, {split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def connect(nodes: Nodes, grid: Grid, coordinator: Coordinator, timeout: float) -> Transport:
    """Flower as the engine's transport."""

    def add(holders: Sequence[int], least: int) -> tuple[tuple[int, ...], Ints] | None:
        sanitiser = coordinator.spec.sanitiser
        assert sanitiser is not None  # there is no secure sum but in a private run
        own = {client: nodes.of[client] for client in holders}
        return secure_sum(grid, own, coordinator.ledger.rounds, least, timeout, sanitiser.coordinates)

    return Transport(nodes.exchange, add, nodes.ready, nodes.farewell)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Starts the run that the run-config describes, or goes on with the one in its folder `out`."""
    keep_memory()
    out = str(context.run_config.get("out", ""))
    config = from_run_config(context.run_config).resolved()
    runtime = config.runtime
    start = runtime.start_clients or config.data.clients
    index_mail(grid)
    wait_for_nodes(grid, start, runtime.join_timeout)  # before anything is loaded or written
    path = (Path(out) if out else new_run_path(config)).resolve()
    if RunFolder(path).ledger.exists():
        folder = RunFolder(path)
        with Ledger(folder.ledger) as begun:
            experiment = open_experiment(config, begun)
    else:
        folder, experiment = RunFolder.create(path, config), Experiment(config)
    say(f"run folder {path}")
    if experiment.config.method.learning_rate == "auto":
        say(str(experiment.step_size))

    def connected(_: Experiment, coordinator: Coordinator) -> Transport:
        nodes = Nodes(
            grid, coordinator, say, timeout=runtime.round_timeout, patience=runtime.join_timeout, start=start
        )  # fmt: skip
        return connect(nodes, grid, coordinator, runtime.round_timeout)

    secret = experiment.terms is not None and experiment.terms.secret
    with run(experiment, folder, [Progress(config.federation.rounds, secret=secret)], connected) as ledger:
        say(f"{ledger.rounds} rounds done, ledger {ledger.head.hex()}")
