"""The Flower ServerApp: carries fedzo's plans and answers over Flower's Grid. It holds no algorithm.

There is no Flower `Strategy`: it is built around arrays and one send_and_receive a round, polled every 3 seconds in
deployment, while a round here is pushed and polled at our own pace and may send a client that stands behind a second
plan. The round loop is `fedzo.engine.run`, the same as without Flower.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedzo.config import from_run_config
from fedzo.engine import Parcel, Transport, run
from fedzo.errors import ProtocolError, RunError
from fedzo.experiment import Experiment, open_experiment
from fedzo.federation.coordinator import Coordinator, RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Hello
from fedzo.privacy.mechanisms import Ints
from fedzo.run_folder import RunFolder, new_run_path
from fedzo.runtime import keep_memory
from server.secure import poll, secure_sum

RECORD = "fedzo"  # the one record of every message
PART = 8 * 2**20  # bytes of an artifact in one message
PATIENCE = 10.0  # seconds without a new node after which the server stops waiting for more

app = ServerApp()


def say(text: str) -> None:
    """One line of progress; `fedzo run --engine flower` shows the lines that start so."""
    print(f"fedzo: {text}", flush=True)


class Progress:
    """Prints the evaluations, and about twenty lines of rounds."""

    def __init__(self, rounds: int) -> None:
        self._rounds, self._every = rounds, max(1, rounds // 20)

    def round(self, summary: RoundSummary) -> None:
        done = summary.round + 1
        if done % self._every == 0 or done == self._rounds:
            dropped = "".join(f", {count} dropped ({reason})" for reason, count in summary.dropped.items())
            took_part = f"{summary.accepted} of {summary.sampled} clients{dropped}"
            say(f"round {done}/{self._rounds}: {summary.told}, {took_part}")

    def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None:
        say(f"after {rounds} rounds, {split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))


def converse(
    grid: Grid, kind: str, contents: Mapping[int, ConfigRecord], timeout: float
) -> Iterator[tuple[int, ConfigRecord]]:
    """Sends each node its record and gives the answers back as they come, until all are there or time is up.

    Args:
        kind: Flower's type of message.
        contents: node id -> record.
        timeout: seconds; also the messages' time to live, so that nobody begins work that is no longer wanted.
    """
    messages = [Message(RecordDict({RECORD: record}), node, kind) for node, record in contents.items()]
    for node, reply in poll(grid, messages, timeout):
        yield node, reply.content.config_records.get(RECORD, ConfigRecord())


def wait_for_nodes(grid: Grid, clients: int) -> list[int]:
    """The ids of the nodes, when there are enough.

    Raises:
        RunError: no new node has come for a while and there are too few.
    """
    nodes: list[int] = []
    last = time.monotonic()
    while len(nodes) < clients:
        if len(found := list(grid.get_node_ids())) > len(nodes):
            last = time.monotonic()
        elif time.monotonic() - last > PATIENCE:
            raise RunError(
                f"{len(found)} nodes are there, the run has {clients} clients (data.clients); in a simulation add "
                f'--federation-config "num-supernodes={clients} client-resources-num-cpus=1" to flwr run'
            )
        else:
            time.sleep(0.05)
        nodes = found
    return sorted(nodes)


def _read_hello(record: ConfigRecord) -> Hello:
    refused = record.get("refused")
    if refused is not None:
        raise ProtocolError(str(refused)[:300])
    try:
        hello = Hello(**record)  # type: ignore[arg-type]
    except TypeError:
        raise ProtocolError("a node answered with something else than a hello") from None
    if not isinstance(hello.client, int) or not isinstance(hello.examples, int):
        raise ProtocolError("a node's hello has no numbers")
    return hello


def _part(coordinator: Coordinator, record: ConfigRecord, given: int) -> ConfigRecord:
    """The greeting again, with the part of the run's mask that a node asks for: always the one after the last."""
    spec = coordinator.spec
    if record["wants"] != spec.mask or not spec.mask or record.get("offset") != given:
        raise ProtocolError(f"a node asked for something else than the run's mask from byte {given}")
    data = coordinator.ledger.artifact(spec.mask)
    if given >= len(data):
        raise ProtocolError("a node asked for more of the run's mask than there is")
    return ConfigRecord(
        {"spec": spec.to_json(), "offset": given, "size": len(data), "data": data[given : given + PART]}
    )


def register(grid: Grid, coordinator: Coordinator, timeout: float) -> dict[int, int]:
    """Greets every node and registers those that match; client -> node id.

    Raises:
        RunError: fewer clients than the quorum match.
    """
    spec = coordinator.spec
    greetings = {node: ConfigRecord({"spec": spec.to_json()}) for node in wait_for_nodes(grid, spec.clients)}
    nodes: dict[int, int] = {}
    given: dict[int, int] = {}  # node -> bytes of the mask that it was sent
    why = ""
    while greetings:
        parts: dict[int, ConfigRecord] = {}
        for node, record in converse(grid, "query", greetings, timeout):
            try:
                if "wants" in record:
                    parts[node] = _part(coordinator, record, given.get(node, 0))
                    sent = len(parts[node]["data"])  # type: ignore[arg-type]
                    given[node] = given.get(node, 0) + sent
                    coordinator.sent_artifact(sent)
                    continue
                hello = _read_hello(record)
                if hello.client in nodes:
                    raise ProtocolError(f"client {hello.client} refused: another node is that client already")
                coordinator.admit(hello)
                nodes[hello.client] = node
            except ProtocolError as error:
                why = why or f": {error}"
                say(str(error))
        greetings = parts
    if len(nodes) < max(1, spec.quorum):
        raise RunError(f"{len(nodes)} of {spec.clients} clients could be registered, wanted {max(1, spec.quorum)}{why}")
    say(f"{len(nodes)} of {spec.clients} clients registered")
    return nodes


def connect(grid: Grid, coordinator: Coordinator, timeout: float) -> Transport:
    """Flower as the engine's transport; a client whose answer is an error or late gives none."""
    nodes = register(grid, coordinator, timeout)
    clients = {node: client for client, node in nodes.items()}

    def exchange(parcels: Sequence[Parcel]) -> Iterable[Parcel]:
        plans = {nodes[client]: ConfigRecord({"plan": plan}) for client, plan in parcels}
        for node, record in converse(grid, "train.plan", plans, timeout):
            data = record.get("answer")
            yield clients[node], data if isinstance(data, bytes) else b""  # b"" is counted as malformed

    def add(holders: Sequence[int], least: int) -> tuple[tuple[int, ...], Ints] | None:
        sanitiser = coordinator.spec.sanitiser
        assert sanitiser is not None  # there is no secure sum but in a private run
        own = {client: nodes[client] for client in holders}
        return secure_sum(grid, own, coordinator.ledger.rounds, least, timeout, sanitiser.coordinates)

    return Transport(exchange, add)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Starts the run that the run-config describes, or goes on with the one in its folder `out`."""
    keep_memory()
    out = str(context.run_config.get("out", ""))
    config = from_run_config(context.run_config).resolved()
    wait_for_nodes(grid, config.data.clients)  # before anything is loaded or written
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

    timeout = config.runtime.round_timeout
    with run(
        experiment,
        folder,
        [Progress(config.federation.rounds)],
        lambda _, coordinator: connect(grid, coordinator, timeout),
    ) as ledger:
        say(f"{ledger.rounds} rounds done, ledger {ledger.head.hex()}")
