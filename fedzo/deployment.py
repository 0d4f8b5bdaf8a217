"""Flower's deployment engine on one machine: SuperLink, SuperExec and SuperNodes on loopback, with TLS and
authentication, as they would run on machines of their own.

Every node has a home, a state directory and workers of its own, so that nodes share nothing but the processor.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fedzo.config import Config, to_toml
from fedzo.credentials import make_credentials, make_node_key
from fedzo.errors import RunError
from fedzo.events import read_events
from fedzo.flower import START_TIMEOUT, answers, copy_app, environment_of, free_port, program, tail
from fedzo.processes import Process, Processes
from fedzo.relay import Relay
from fedzo.resident import LOADED, link
from fedzo.run_folder import RunFolder

# Flower's pace between a message and the process that works on it; its default is 1 s.
FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}


@dataclass
class Node:
    """A SuperNode.

    Attributes:
        number: of its client.
        home: folder of its state, caches and log.
        sockets: folder of its workers' sockets.
        relay: what its connection to the SuperLink goes through.
        config: its owner's, for --node-config.
        environment: besides what every node has.
        process: None: it is not started.
    """

    number: int
    home: Path
    sockets: Path
    key: Path
    relay: Relay
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    process: Process | None = None

    @property
    def up(self) -> bool:
        return self.process is not None and self.process.alive

    def worker(self) -> Mapping[str, Any]:
        """What its worker says of itself; empty: there is none, or it has not begun."""
        return next(iter(link.status(self.sockets).values()), {})

    def loads(self) -> int:
        """Base models that its workers have loaded so far, those that were killed included."""
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in self.sockets.glob("*.log")]
        return sum(log.count(LOADED) for log in logs)


class Deployment:
    """What runs, and how it is started, killed and asked.

    Args:
        folder: logs and the nodes' state go here; an earlier deployment's state there is used again.
        nodes: how many there are.
        share: nodes have one folder for sockets and state, and so one worker, as the nodes of one machine do.

    Raises:
        RunError: Flower's programs do not start; the message has the end of their log.
    """

    def __init__(self, folder: Path, nodes: int, *, share: bool = False) -> None:
        self.folder, self._share = folder.resolve(), share
        self._stack = ExitStack()
        # A path of its own, and short: a socket's has 100 bytes at most. Keys and certificates go with it.
        self.home = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fedzo-", ignore_cleanup_errors=True))
        )
        self._processes = self._stack.enter_context(Processes())
        self.link: Process | None = None
        self.nodes: list[Node] = []
        self.superexec: Process | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.credentials = make_credentials(self.home / "credentials")
            self.port = free_port()
            for number in range(nodes):
                sockets = self.home / ("s" if share else f"s{number}")
                sockets.mkdir(mode=0o700, exist_ok=True)
                relay = Relay(self.port)
                self._stack.callback(relay.close)
                home, key = self.folder / f"node-{number}", self.home / "credentials" / f"node-{number}"
                home.mkdir(exist_ok=True)
                make_node_key(key)
                self.nodes.append(Node(number, home, sockets, key, relay, {"partition-id": number}))
            address = f'[superlink.fedzo]\naddress = "127.0.0.1:{self.port}"\n'
            address += f"root-certificates = {json.dumps(str(self.credentials.authority))}\n"
            (self.home / "config.toml").write_text(f'[superlink]\ndefault = "fedzo"\n\n{address}', encoding="utf-8")
            self.environment = environment_of(self.home) | FAST
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything that was started, workers included; what those logged stays in their nodes' folders."""
        for node in self.nodes:
            for path in node.sockets.glob("*.log"):
                shutil.copy(path, node.home / f"worker-{path.stem}.log")
        self._stack.close()

    def start_link(self) -> None:
        """Starts the SuperLink, over the database that it had before, and waits until it answers.

        Raises:
            RunError: it does not.
        """
        files, log = self.credentials, self.folder / "superlink.log"
        self.link = self._processes.start(
            [
                program("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port),
                "--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate),
                "--ssl-keyfile", str(files.key), "--enable-supernode-auth", "--isolation", "process",
                "--superexec-auth-secret-file", str(files.secret),
                "--database", str(self.home / "superlink.sqlite"),
            ],
            folder=self.home, environment=self.environment, log=log,
        )  # fmt: skip
        if not answers(self.link, f"https://127.0.0.1:{self.port}/health", files.authority):
            raise RunError("Flower's SuperLink did not start: " + " / ".join(tail(log)))

    def start_superexec(self) -> None:
        """Starts what runs the ServerApp: apart from the SuperLink, so that each may die without the other."""
        self.superexec = self._processes.start(
            [
                program("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{self.port}",
                "--root-certificates", str(self.credentials.authority),
                "--superexec-auth-secret-file", str(self.credentials.secret),
            ],
            folder=self.home, environment=self.environment, log=self.folder / "serverapp.log",
        )  # fmt: skip

    def register(self, node: Node) -> None:
        """Makes a node's key known to the SuperLink; another is refused."""
        self.flwr("supernode", "register", str(node.key.with_suffix(".pub")), "fedzo")

    def start_node(self, node: Node, *options: str) -> None:
        """Starts a SuperNode, over the state that it had before.

        Args:
            options: of flower-supernode, after ours.
        """
        home = node.home
        kept = self.folder / "shared" if self._share else home
        environment = self.environment | {
            "FLWR_HOME": str(self.home / f"n{node.number}"),
            "FEDZO_STATE": str(kept / "state"),
            "FEDZO_CACHE": str(kept / "cache"),
            "FEDZO_RUNTIME": str(node.sockets),
            **node.environment,
        }
        node_config = " ".join(f"{name}={json.dumps(value)}" for name, value in node.config.items())
        node.process = self._processes.start(
            [
                program("flower-supernode"), "--superlink", f"127.0.0.1:{node.relay.port}",
                "--root-certificates", str(self.credentials.authority), "--auth-supernode-private-key", str(node.key),
                "--port", str(free_port()), "--node-config", node_config, *options,
            ],
            folder=home, environment=environment, log=home / "supernode.log",
        )  # fmt: skip

    def submit(self, config: Config, out: Path) -> int:
        """Starts a run of the configuration in the folder `out`, or goes on with it; Flower's number of the run.

        Raises:
            RunError: Flower refuses it.
        """
        app = self.home / "app"
        if not app.exists():
            copy_app(app)
        run_config = self.home / "run.toml"
        run_config.write_text(f"out = {json.dumps(str(out.resolve()))}\n{to_toml(config.resolved())}", encoding="utf-8")
        said = self.flwr("run", str(app), "fedzo", "--run-config", str(run_config), "--format", "json")
        return int(said["run-id"])

    def outcome(self, run: int) -> tuple[str, str]:
        """Status and details of a run: "finished:completed", or what else; "unknown" while the SuperLink is away."""
        try:
            (found,) = [
                one for one in self.flwr("ls", "fedzo", "--format", "json")["runs"] if int(one["run-id"]) == run
            ]
        except (RunError, ValueError, KeyError):
            return "unknown", ""
        return str(found["status"]), str(found["status-details"])

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """What a command of `flwr` answers, where that is JSON.

        Raises:
            RunError: it failed, or does not end.
        """
        try:
            done = subprocess.run(
                [program("flwr"), *arguments], cwd=self.home, env=self.environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, check=False, timeout=START_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"flwr {arguments[0]} did not end within {START_TIMEOUT:.0f} s") from None
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode or answer.get("success") is False:
            said = answer.get("error-message") or " / ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            raise RunError(f"flwr {arguments[0]} failed: {said}")
        return answer

    def start(self) -> None:
        """Starts everything: SuperLink, SuperExec, and the nodes, registered."""
        self.start_link()
        self.start_superexec()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as pool:
            list(pool.map(self.register, self.nodes))  # each takes seconds, most of them Python's start
        for node in self.nodes:
            self.start_node(node)

    def kill(self, process: Process | None) -> None:
        """kill -9; returns when it is gone."""
        if process is not None:
            process.signal(signal.SIGKILL)
            while process.alive:
                time.sleep(0.01)

    def forget(self) -> None:
        """Loses the SuperLink's database, which must not run."""
        for path in self.home.glob("superlink.sqlite*"):
            path.unlink()

    def server_app(self) -> list[int]:
        """Process ids of the ServerApp."""
        return running("flwr-serverapp", str(self.home))


def running(name: str, mark: str) -> list[int]:
    """Process ids of a program of Flower's whose environment has a mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if any(Path(os.fsdecode(part)).name == name for part in command[:2]) and mark.encode() in environment:
            found.append(int(path.name))
    return found


def one_thread_each(config: Config, nodes: int) -> Config:
    """With threads for as many nodes on one processor, where the configuration leaves the number to torch."""
    if config.runtime.threads:
        return config
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runtime = config.runtime.model_copy(update={"threads": max(1, cores // nodes)})
    return config.model_copy(update={"runtime": runtime})


@dataclass(frozen=True)
class NodeState:
    """A node, as `play` shows it; bytes as they pass its connection to the SuperLink."""

    number: int
    up: bool
    worker: Mapping[str, Any]
    loads: int
    sent: int
    received: int


@dataclass(frozen=True)
class State:
    """A deployment, as `play` shows it.

    Attributes:
        status: of the run, in Flower's words.
        seconds: since it was submitted.
        nodes: a row each.
        lines: what has happened since the last one, a line an event.
    """

    status: str
    seconds: float
    nodes: tuple[NodeState, ...]
    lines: tuple[str, ...]


def play(
    deployment: Deployment, config: Config, folder: RunFolder, show: Callable[[State], None], pause: float = 1.0
) -> dict[str, Any]:
    """Runs a configuration on a deployment to its end.

    Args:
        folder: of the run; one that has begun goes on.
        show: is called about every `pause` seconds.

    Returns:
        Figures by name: model loads, and by node wire bytes; seconds of a round.

    Raises:
        RunError: the run failed; the message says what Flower says of it.
    """
    _, at = read_events(folder.event_log)
    start, seconds = time.monotonic(), list[float]()
    run, asked, status, details = deployment.submit(config, folder.path), 0.0, "submitted", ""
    while not status.startswith("finished"):
        events, at = read_events(folder.event_log, at)
        seconds += [event["seconds"] for event in events if event["event"] == "round-committed"]
        over = any(event["event"] in ("run-finished", "run-ended", "run-failed") for event in events)
        rows = tuple(
            NodeState(node.number, node.up, node.worker(), node.loads(), node.relay.up, node.relay.down)
            for node in deployment.nodes
        )
        show(State(status, time.monotonic() - start, rows, tuple(map(_line, events))))
        now = time.monotonic()
        # Asking takes a process of its own: seldom, but for the beginning and the end.
        if over or now - asked > (2.0 if not seconds else 10.0):
            status, details = deployment.outcome(run)
            asked = now if not over else 0.0
        time.sleep(pause)
    if status != "finished:completed":
        raise RunError(f"Flower's run is {status}: {details.rstrip('.')}. Logs are in {deployment.folder}")
    rounds, nodes = max(1, len(seconds)), deployment.nodes
    loads = {node.sockets: node.loads() for node in nodes}  # of nodes that share a worker once
    return {
        "nodes": len(nodes),
        "model_loads": sum(loads.values()),
        "round_seconds_median": median(seconds) if seconds else None,
        "wire_up_per_client": round(sum(node.relay.up for node in nodes) / len(nodes)),
        "wire_down_per_client": round(sum(node.relay.down for node in nodes) / len(nodes)),
        "wire_per_client_and_round": round(
            sum(node.relay.up + node.relay.down for node in nodes) / len(nodes) / rounds
        ),
    }


def _line(event: Mapping[str, Any]) -> str:
    """An event as a person reads it."""
    name = event["event"]
    if name == "round-committed":
        shown = {key: event[key] for key in ("loss", "accepted", "sampled", "dropped", "seconds")}
    elif name == "evaluation":
        shown = {"split": event["split"], **event["metrics"]}
    else:
        shown = {key: value for key, value in event.items() if key not in ("time", "level", "event", "run", "round")}
    told = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in shown.items()
        if value is not None and value != {}
    ]
    return "  ".join([event["time"][11:19], f"round {event['round']}", name, *told])
