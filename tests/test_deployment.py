"""Real processes: SuperLink and SuperNodes with TLS and keys, who is let in, and the same ledger as without."""

import contextlib
import http.client
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedzo import engine
from fedzo.cli import app as cli
from fedzo.config import Config, load_config
from fedzo.credentials import make_credentials, make_node_key
from fedzo.errors import RunError
from fedzo.experiment import Experiment
from fedzo.federation.ledger import Ledger
from fedzo.relay import Relay
from fedzo.report import verify
from fedzo.run_folder import RunFolder

pytest.importorskip("flwr")
from fedzo.deployment import Deployment, Node, play, running

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")

OVERRIDES = [
    "data.clients=2", "data.limit=40", "data.test=", "evaluation.limit=16", "evaluation.every=0",
    "federation.rounds=3", "method.batch_size=4", "runtime.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(None, OVERRIDES)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink without nodes: two are known to it, the others not."""
    with Deployment(tmp_path_factory.mktemp("deployment"), 5) as made:
        made.start_link()
        made.start_superexec()
        for node in made.nodes[:2]:
            made.register(node)
        yield made


def seen(deployment: Deployment) -> list[str]:
    """The states of the nodes that the SuperLink knows."""
    return [str(node["status"]) for node in deployment.flwr("supernode", "ls", "fedzo", "--format", "json")["nodes"]]


def wait(done: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.2)
    return done()


def start(deployment: Deployment) -> None:
    """Starts the two nodes that are known, if no test before has."""
    for node in deployment.nodes[:2]:
        if not node.up:
            deployment.start_node(node)


def log(node: Node) -> str:
    path = node.home / "supernode.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def test_an_unregistered_node_is_refused(deployment: Deployment) -> None:
    stranger = deployment.nodes[2]
    deployment.start_node(stranger)
    assert wait(lambda: not stranger.up)  # it gives up by itself
    assert "SuperNode ID" not in log(stranger)
    assert "online" not in seen(deployment)


def test_a_node_that_does_not_trust_the_certificate_talks_to_nobody(deployment: Deployment, tmp_path: Path) -> None:
    node, other = deployment.nodes[3], make_credentials(tmp_path / "other")
    deployment.register(node)  # its key is good: the certificate alone decides
    deployment.start_node(node, "--root-certificates", str(other.authority), "--max-retries", "1")
    assert wait(lambda: "CERTIFICATE_VERIFY_FAILED" in log(node) or not node.up)
    assert "CERTIFICATE_VERIFY_FAILED" in log(node) and "SuperNode ID" not in log(node)
    assert "online" not in seen(deployment)
    deployment.kill(node.process)


def test_a_plain_text_client_gets_no_answer(deployment: Deployment) -> None:
    node = deployment.nodes[4]
    deployment.register(node)
    deployment.start_node(node, "--insecure", "--max-retries", "1")
    assert wait(lambda: not node.up or "SuperNode ID" in log(node), 30.0) or node.up
    assert "SuperNode ID" not in log(node) and "online" not in seen(deployment)
    deployment.kill(node.process)
    plain = http.client.HTTPConnection("127.0.0.1", deployment.port, timeout=10)
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.request("GET", "/health")
        plain.getresponse()
    # And one that would take any certificate gets the real one, of this name only.
    trusting = ssl.create_default_context(cafile=str(deployment.credentials.authority))
    secure = http.client.HTTPSConnection("127.0.0.1", deployment.port, timeout=10, context=trusting)
    secure.request("GET", "/health")
    assert secure.getresponse().status == 200
    with pytest.raises(ssl.SSLCertVerificationError):
        http.client.HTTPSConnection("127.0.0.1", deployment.port, timeout=10).request("GET", "/health")


def test_the_same_ledger_as_in_one_process(deployment: Deployment, config: Config, tmp_path: Path) -> None:
    start(deployment)
    states: list[str] = []
    folder = RunFolder(tmp_path / "run")
    figures = play(deployment, config, folder, lambda state: states.append(state.status))
    with engine.run(Experiment(config), RunFolder.create(tmp_path / "local", config)) as local:
        head = local.head
    with Ledger(folder.ledger) as ledger:
        assert ledger.head == head
        assert verify(ledger, Experiment(config)) == 3
    assert [node.loads() for node in deployment.nodes] == [1, 1, 0, 0, 0]
    assert figures["model_loads"] == 2 and figures["wire_up_per_client"] > 10_000
    assert "running" in states
    assert wait(lambda: not any(node.worker() for node in deployment.nodes[:2]), 30.0)  # told that the run is over
    assert [(node.home / "state" / ledger.spec.run_id.hex() / "replica").exists() for node in deployment.nodes[:2]] == [
        True, True,
    ]  # fmt: skip


def test_a_run_that_fails_says_why(deployment: Deployment, config: Config, tmp_path: Path) -> None:
    start(deployment)
    missing = config.model_copy(update={"model": config.model.model_copy(update={"source": "/no/model"})})
    with pytest.raises(RunError, match=r"Flower's run is finished:failed: .*/no/model.* Logs are in"):
        play(deployment, missing, RunFolder(tmp_path / "run"), lambda state: None)


def test_nothing_is_left_of_a_deployment(tmp_path: Path) -> None:
    with Deployment(tmp_path, 1) as made:
        made.start_link()
        home = made.home
        assert running("flower-superlink", str(home)) and (home / "credentials" / "superlink.key").exists()
    assert not running("flower-superlink", str(home)) and not home.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["node-0", "superlink.log"]


def test_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    files = make_credentials(tmp_path / "made")
    public = make_node_key(tmp_path / "made" / "node")
    assert public.read_text(encoding="ascii").startswith("ecdsa-sha2-nistp384 ")
    for path in (files.key, files.secret, tmp_path / "made" / "node"):
        assert oct(path.stat().st_mode)[-3:] == "600"
    assert oct((tmp_path / "made").stat().st_mode)[-3:] == "700"


def test_credentials_and_app_on_the_command_line(tmp_path: Path) -> None:
    def fedzo(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli, ["deploy", *arguments])
        return done.exit_code, done.output

    made = tmp_path / "made"
    assert fedzo("credentials", str(made), "--name", "fl.example.org", "--address", "10.0.0.5", "--nodes", "2")[0] == 0
    assert {path.name for path in made.iterdir()} == {
        "authority.crt", "superlink.crt", "superlink.key", "superexec.secret", "node-0", "node-0.pub", "node-1",
        "node-1.pub",
    }  # fmt: skip
    code, said = fedzo("credentials", str(made), "--name", "fl.example.org")
    assert code == 1 and "is there already" in said
    code, said = fedzo("credentials", str(tmp_path / "other"), "--address", "fl.example.org")
    assert code == 2 and "--name" in said and not (tmp_path / "other").exists()
    code, said = fedzo("credentials", str(tmp_path / "other"))
    assert code == 1 and "--address or --name" in said
    assert fedzo("app", str(tmp_path / "app"))[0] == 0
    assert (tmp_path / "app" / "clients" / "app.py").is_file() and (tmp_path / "app" / "pyproject.toml").is_file()
    assert fedzo("app", str(tmp_path / "app"))[0] == 1


def test_the_relay_counts_and_cuts() -> None:
    import socketserver
    import threading

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(4096):
                self.request.sendall(data * 2)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        relay = Relay(server.server_address[1])
        with contextlib.closing(relay):
            import socket

            with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as one:
                one.sendall(b"x" * 1000)
                got = b""
                while len(got) < 2000:
                    got += one.recv(4096)
                assert (relay.up, relay.down) == (1000, 2000)
                relay.cut()
                with pytest.raises(ConnectionResetError):
                    one.recv(1)
            with (
                pytest.raises(ConnectionResetError),
                socket.create_connection(("127.0.0.1", relay.port), timeout=10) as two,
            ):
                two.recv(1)
            relay.mend()
            with socket.create_connection(("127.0.0.1", relay.port), timeout=10) as three:
                three.sendall(b"y")
                assert three.recv(2) in (b"y", b"yy")
        server.shutdown()
