"""The resident worker: the socket and who may talk on it, its life, what it keeps, and what nodes may ask of it."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedzo import engine
from fedzo.cli import app as cli
from fedzo.config import Config, flatten, from_flat
from fedzo.engine import in_process, play_round
from fedzo.errors import FedzoError, ProtocolError, RunError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.messages import Contribution, Failure, Hello, decode
from fedzo.processes import Processes, began
from fedzo.resident import link, wire
from fedzo.resident.host import Host
from fedzo.resident.server import Served
from fedzo.resident.state import ReplicaFile
from fedzo.resident.wire import Parcel
from fedzo.run_folder import RunFolder

TINY = {
    "data.clients": 2, "data.limit": 40, "data.test": "", "evaluation.limit": 16, "evaluation.every": 0,
    "federation.rounds": 4, "federation.local_steps": 1, "method.queries": 2, "method.batch_size": 4,
    "runtime.threads": 1,
}  # fmt: skip


def tiny(**changes: Any) -> Config:
    return from_flat(TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's workers have their sockets; none outlives it."""
    path = Path("/tmp") / f"fz-{os.getpid()}-{time.monotonic_ns() % 10**9}"  # a socket's path must be short
    monkeypatch.setenv("FEDZO_RUNTIME", str(path))
    monkeypatch.setenv("FEDZO_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path / "cache"))
    yield path
    for fields in link.status().values():
        os.kill(int(fields["pid"]), signal.SIGKILL)
    for left in path.glob("*"):
        left.unlink()
    path.rmdir()


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Coordinator]:
    """A run whose clients are elsewhere."""
    config = tiny()
    experiment = Experiment(config)
    with engine.start(RunFolder.create(tmp_path / "run", config), experiment) as ledger:
        yield Coordinator(ledger, experiment.replica(ledger.spec))


def request(ask: str, coordinator: Coordinator, client: int, *parts: bytes, **more: Any) -> Parcel:
    fields = {
        "ask": ask, "flower_run": 1, "node": str(100 + client), "parent": os.getpid(), "offset": 0, "size": 0,
        "spec": coordinator.spec.to_json(), "node_config": {"partition-id": client}, "run_config": flatten(tiny()),
    }  # fmt: skip
    return Parcel(fields | more, parts)


def name_of(coordinator: Coordinator) -> str:
    return link.name_of(coordinator.spec.to_json(), flatten(tiny()), "")


def greet(coordinator: Coordinator, client: int, **more: Any) -> Hello:
    reply = link.ask(name_of(coordinator), request("greet", coordinator, client, **more))
    hello = Hello(**reply.fields["hello"])
    coordinator.admit(hello)
    return hello


def round_of(coordinator: Coordinator) -> list[object]:
    """Plays a round over the sockets; the decoded answers."""
    plans, answers = coordinator.open_round(), []
    while plans:
        plan = plans.pop()
        reply = link.ask(name_of(coordinator), request("plan", coordinator, plan.client, plan.to_bytes()))
        answers.append(decode(reply.parts[0]))
        again = coordinator.receive(plan.client, reply.parts[0])
        plans += [again] if again else []
    coordinator.close_round()
    return answers


def test_one_worker_for_two_nodes_gives_the_ledger_of_one_process(
    folder: Path, begun: Coordinator, tmp_path: Path
) -> None:
    for client in (0, 1):
        assert greet(begun, client).applied == 0
    while not begun.finished:
        assert all(isinstance(answer, Contribution) for answer in round_of(begun))
    (status,) = link.status().values()
    assert (status["loads"], status["plans"], status["clients"]) == (1, 8, [0, 1])
    assert status["run"] == begun.spec.run_id.hex() and status["memory"] > 2**20
    config = tiny()
    with engine.run(Experiment(config), RunFolder.create(tmp_path / "local", config)) as ledger:
        assert ledger.head == begun.ledger.head


def test_a_killed_worker_is_started_again_and_goes_on_from_its_file(folder: Path, begun: Coordinator) -> None:
    for client in (0, 1):
        greet(begun, client)
    for _ in range(2):
        round_of(begun)
    (first,) = link.status().values()
    os.kill(first["pid"], signal.SIGKILL)
    # The file was written after the first plan; the second was less than ten seconds later.
    assert all(isinstance(answer, Contribution) for answer in round_of(begun))
    (second,) = link.status().values()
    assert second["pid"] != first["pid"]
    log = next(folder.glob("*.log")).read_text(encoding="utf-8")
    assert "theta of round 0 read from" in log or "theta of round 1 read from" in log
    assert greet(begun, 0).applied == 2


def test_who_does_not_know_the_key_is_refused(folder: Path, begun: Coordinator) -> None:
    greet(begun, 0)
    (name,) = link.status()
    path = folder / f"{name}.sock"
    assert oct(path.stat().st_mode)[-3:] == "600" and oct(folder.stat().st_mode)[-3:] == "700"
    assert oct((folder / "key").stat().st_mode)[-3:] == "600"
    with (
        pytest.raises(Exception, match=r"digest|rejected|closed|EOF|\[Errno"),
        Client(str(path), family="AF_UNIX", authkey=b"another") as connection,
    ):
        connection.recv_bytes()
    with socket.socket(socket.AF_UNIX) as plain:  # one that only listens holds nobody up
        plain.connect(str(path))
        assert greet(begun, 1).client == 1
    own = (folder / "key").read_bytes()
    (folder / "key").write_bytes(b"x" * 32)
    with pytest.raises(ProtocolError, match="another key"):
        greet(begun, 0)
    (folder / "key").write_bytes(own)


@pytest.mark.parametrize("what", ["mode", "link", "file", "key"])
def test_a_folder_that_others_can_enter_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "workers"
    monkeypatch.setenv("FEDZO_RUNTIME", str(path))
    if what == "mode":
        path.mkdir()
        path.chmod(0o755)
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "file":
        path.write_text("")
    else:
        (wire.runtime_directory() / "key").write_bytes(b"short")
        with pytest.raises(RunError, match="has 5 bytes, wanted 32"):
            wire.key(path)
        return
    with pytest.raises(RunError, match=str(path)):
        wire.runtime_directory()


@given(
    fields=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())),
    parts=st.lists(st.binary(), max_size=4),
)
def test_parcels(fields: dict[str, Any], parts: list[bytes]) -> None:
    parcel = Parcel(fields, tuple(parts))
    assert Parcel.from_bytes(parcel.to_bytes()) == parcel


@given(st.binary() | st.builds(lambda n, b: struct.pack("<I", n) + b, st.integers(0, 2**32 - 1), st.binary()))
def test_other_bytes_are_no_parcel(data: bytes) -> None:
    try:
        parcel = Parcel.from_bytes(data)
    except ProtocolError:
        return
    assert Parcel.from_bytes(parcel.to_bytes()) == parcel


def test_rubbish_on_the_socket_hurts_nobody(folder: Path, begun: Coordinator) -> None:
    greet(begun, 0)
    (name,) = link.status()
    for data in (b"", b"\0" * 3, struct.pack("<I", 2**32 - 1) + b"{}", Parcel({"ask": "other"}).to_bytes()):
        with Client(str(folder / f"{name}.sock"), family="AF_UNIX", authkey=wire.key(folder)) as connection:
            connection.send_bytes(data)
            assert set(wire.receive(connection).fields) & {"error", "failed"}
    assert greet(begun, 1).client == 1


def served(name: str, **limits: float) -> "subprocess.Popen[str]":
    """A worker process with limits of its own, whose host knows no run."""
    code = (
        "import sys\nfrom fedzo.resident import server\n"
        + "".join(f"server.{key} = {value}\n" for key, value in limits.items())
        + "sys.exit(server.main(sys.argv[1]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, name], stderr=subprocess.PIPE, text=True)


def test_a_worker_ends_when_nothing_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDZO_IDLE", "1.0")
    process = served("idle")
    assert process.wait(30) == 0
    assert process.stderr is not None and "nothing asked for 1 s" in process.stderr.read()
    assert not (folder / "idle.sock").exists()


def test_a_second_worker_of_a_name_makes_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDZO_IDLE", "5.0")
    first = served("one")
    while not (folder / "one.sock").exists():
        time.sleep(0.05)
    assert served("one").wait(30) == 0
    assert first.poll() is None and link.status().keys() == {"one"}
    first.kill()
    first.wait()


def test_a_worker_ends_when_its_nodes_are_gone(folder: Path) -> None:
    node = subprocess.Popen(["sleep", "100"])
    life = Served(lambda parcel: Parcel({}), lambda: None, idle=100.0, orphaned=0.2)
    life._reply(Parcel({"ask": "plan", "parent": node.pid}))
    assert life._over() == ""
    node.kill()
    node.wait()
    assert life._over() == ""  # it may come back
    time.sleep(0.3)
    assert life._over() == "its nodes are gone"
    life._reply(Parcel({"ask": "plan", "parent": os.getpid()}))
    assert life._over() == ""


def test_status_on_the_command_line(folder: Path, begun: Coordinator, capsys: pytest.CaptureFixture[str]) -> None:
    greet(begun, 1)
    cli(["client", "status", "--json"], standalone_mode=False)
    (worker,) = json.loads(capsys.readouterr().out)["workers"]
    assert worker["clients"] == [1] and worker["loads"] == 1 and not worker["busy"]
    cli(["client", "status"], standalone_mode=False)
    assert begun.spec.run_id.hex() in capsys.readouterr().out
    link.ask(name_of(begun), request("leave", begun, 1))
    while link.status():
        time.sleep(0.05)
    cli(["client", "status"], standalone_mode=False)
    assert "no worker runs" in capsys.readouterr().out


def test_the_last_client_to_leave_ends_the_worker(folder: Path, begun: Coordinator) -> None:
    for client in (0, 1):
        greet(begun, client)
    assert not link.ask(name_of(begun), request("leave", begun, 0)).fields
    assert link.status()
    assert link.ask(name_of(begun), request("leave", begun, 1)).fields == {"over": True}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"partition-id": 0, "max-epsilom": 1.0}, 'unknown key "max-epsilom"'),
        ({"partition-id": "0"}, '"partition-id" of type str'),
        ({"partition-id": True}, '"partition-id" of type bool'),
        ({}, "no client number"),
        ({"partition-id": 7}, "client 7 refused: the run has the clients 0 to 1"),
        ({"partition-id": 0, "max-epsilon": 1.0}, "takes part in private runs only"),
    ],
)
def test_what_a_node_s_owner_says_is_checked(config: dict[str, Any], why: str, begun: Coordinator) -> None:
    reply = Host(keep=False).answer(request("greet", begun, 0, node_config=config))
    assert why in reply.fields["refused"]


def test_a_node_s_own_data_and_base(begun: Coordinator, tmp_path: Path) -> None:
    """All examples of the file are the client's; a base at another place is the same, and one that differs is not."""
    own = tmp_path / "own.jsonl"
    lines = [{"sentence": f"a fine film {i}", "label": i % 2} for i in range(11)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    host = Host(keep=False)

    def ask(**config: Any) -> dict[str, Any]:
        return dict(host.answer(request("greet", begun, 0, node_config={"partition-id": 0, **config})).fields)

    assert ask()["hello"]["examples"] == len(Experiment(tiny()).client_data(0)) != 11
    assert ask(data=str(own))["hello"]["examples"] == 11
    assert ask(data=str(tmp_path / "none.jsonl"))["refused"] == "DataError; its own log says more"
    path = tmp_path / "base"
    loaded = Experiment(tiny()).loaded
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    assert ask(model=str(path))["hello"]["fingerprint"] == begun.spec.fingerprint
    loaded.model.get_parameter(next(iter(dict(loaded.model.named_parameters())))).data[0] += 1.0
    loaded.model.save_pretrained(tmp_path / "other")
    loaded.tokenizer.save_pretrained(tmp_path / "other")
    assert ask(model=str(tmp_path / "other"))["hello"]["fingerprint"] != begun.spec.fingerprint


def test_own_data_in_one_process_is_refused(tmp_path: Path) -> None:
    config = tiny(data__partition="own", data__validation="validation", data__train="")
    with pytest.raises(FedzoError, match=r'data\.partition = "own".*--node-config'):
        engine.run(Experiment(config), RunFolder.create(tmp_path, config))


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"method__optimizer": "momentum"},
    "adam": {"method__optimizer": "adam", "method__learning_rate": 1e-4},
    "pool": {"federation__seeds": "pool", "federation__pool_size": 16},
    "adapter": {"space__kind": "adapter"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_theta_is_kept(kind: str, tmp_path: Path) -> None:
    """From its file a replica stands where the other stood, and goes the same way on."""
    if kind == "adapter":
        pytest.importorskip("peft")
    config = tiny(**SETTINGS[kind])
    experiment = Experiment(config)
    with engine.start(RunFolder.create(tmp_path / "run", config), experiment) as ledger:
        coordinator = Coordinator(ledger, experiment.replica(ledger.spec))
        transport = in_process(experiment, coordinator)
        for _ in range(2):
            play_round(coordinator, transport)
        kept = coordinator.replica
        ReplicaFile(tmp_path / "theta", kept).save(now=True)
        other = Experiment(config).replica(ledger.spec)
        ReplicaFile(tmp_path / "theta", other)
        assert (other.rounds, other.digest()) == (2, kept.digest())
        play_round(coordinator, transport)
        other.apply([entry.records() for entry in ledger.read(2)])
        assert other.digest() == coordinator.replica.digest()


@pytest.mark.parametrize("damage", ["cut", "flipped", "other run", "empty", "folder"])
def test_a_damaged_file_is_as_good_as_none(damage: str, tmp_path: Path) -> None:
    config, path = tiny(), tmp_path / "theta"
    experiment = Experiment(config)
    spec = experiment.spec()
    replica = experiment.replica(spec)
    replica.theta += 1.0
    replica.rounds = 3
    ReplicaFile(path, replica).save(now=True)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "other run":
        spec = experiment.spec(0.5)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir()
    fresh = experiment.replica(spec)
    ReplicaFile(path, fresh)
    assert fresh.rounds == 0 and fresh.digest().hex() == spec.theta0


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("in the way")
    experiment = Experiment(tiny())
    replica = experiment.replica(experiment.spec())
    file = ReplicaFile(tmp_path / "state" / "theta", replica)
    replica.rounds = 1
    file.save(now=True)
    assert (tmp_path / "state").read_text() == "in the way"


def test_an_error_in_a_plan_says_its_kind_only(begun: Coordinator) -> None:
    host = Host(keep=False)
    assert "hello" in host.answer(request("greet", begun, 0)).fields
    assert host.answer(request("plan", begun, 0, b"rubbish")).fields == {"failed": "ProtocolError"}
    coordinator = begun
    coordinator.admit(Hello(**host.answer(request("greet", begun, 0)).fields["hello"]))
    (plan,) = coordinator.open_round()
    wrong = bytearray(plan.to_bytes())
    reply = host.answer(request("plan", begun, 0, bytes(wrong)))
    assert isinstance(decode(reply.parts[0]), Contribution)
    assert np.isfinite(decode(reply.parts[0]).scalars).all()
    assert not isinstance(decode(reply.parts[0]), Failure)


def test_processes_end_with_their_block(tmp_path: Path) -> None:
    with Processes() as processes:
        command = ["sh", "-c", "sleep 100 & sleep 100"]
        one = processes.start(command, folder=tmp_path, environment=dict(os.environ), log=tmp_path / "log")
        two = processes.start(["sleep", "100"], folder=tmp_path, environment=dict(os.environ), log=tmp_path / "log")
        assert one.alive and two.alive
        two.signal(signal.SIGKILL)
        end = time.monotonic() + 10.0
        while two.alive and time.monotonic() < end:
            time.sleep(0.02)
        assert one.alive and not two.alive
        with pytest.raises(RunError, match="cannot start no-such-program: No such file"):
            processes.start(["no-such-program"], folder=tmp_path, environment={}, log=tmp_path / "log")
    assert not one.alive and began(one.pid) == ""
