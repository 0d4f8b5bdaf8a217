"""Flower: the unmodified apps over an in-process Grid, and the launcher with the real simulation."""

import copy
import itertools
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fedzo import engine, flower
from fedzo.config import Config, flatten, from_flat
from fedzo.errors import LedgerError, RunError
from fedzo.events import read_events
from fedzo.experiment import Experiment, open_experiment
from fedzo.federation.coordinator import RoundSummary
from fedzo.federation.ledger import Ledger
from fedzo.privacy_report import spent
from fedzo.report import verify
from fedzo.run_folder import RunFolder

pytest.importorskip("flwr")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # clients/ and server/ are not part of the installed package

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict  # noqa: E402
from grids import ProcessGrid  # noqa: E402

from clients import app as client_side  # noqa: E402
from server import app as server_side  # noqa: E402
from server import nodes  # noqa: E402

TINY = {
    "data.clients": 3, "data.limit": 60, "data.test": "", "evaluation.limit": 16, "evaluation.every": 0,
    "federation.rounds": 3, "federation.local_steps": 2, "method.queries": 2, "method.batch_size": 4,
}  # fmt: skip


class InProcessGrid(ProcessGrid):
    """Calls the ClientApp for every message.

    Args:
        partitions: client number of each node.
        forge: may change a reply, lose it (None), or raise as a broken node would.
    """

    def __init__(
        self, config: Config, out: Path, partitions: Iterable[int], forge: Callable[[int, Message], Message | None]
    ) -> None:
        self.run_config = flatten(config) | {"out": str(out)}
        super().__init__(
            {1000 - i: self.context(1000 - i, {"partition-id": number}) for i, number in enumerate(partitions)}
        )
        self.forge, self.ids = forge, itertools.count()
        self.errors: list[Error] = []

    def context(self, node: int, node_config: Mapping[str, Any]) -> Context:
        return Context(
            run_id=1, node_id=node, node_config=dict(node_config), state=RecordDict(), run_config=self.run_config
        )

    def handle(self, message: Message) -> str:
        name, context = str(next(self.ids)), self.contexts[message.metadata.dst_node_id]
        message.metadata.__dict__["_message_id"] = name
        try:
            delivered = copy.deepcopy(message)  # a wire has no objects that two nodes share
            reply = self.forge(int(context.node_config["partition-id"]), client_side.app(delivered, context))
        except Exception as error:  # Flower, too, puts the text into an error reply
            self.errors.append(Error(code=0, reason=str(error)))
            reply = Message(self.errors[-1], reply_to=message)
        if reply is not None:
            self.replies[name] = reply
        return name


def honest(number: int, reply: Message) -> Message:
    return reply


def serve(
    config: Config, out: Path, partitions: Iterable[int] = (0, 1, 2), forge: Callable[..., Message | None] = honest
) -> InProcessGrid:
    """Runs the ServerApp to its end."""
    grid = InProcessGrid(config, out, partitions, forge)
    server_side.app(grid, grid.context(1, {}))
    return grid


def tiny(**changes: Any) -> Config:
    return from_flat(TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The ledger's hash after a run without Flower."""
    config = tiny()
    folder = RunFolder.create(tmp_path_factory.mktemp("local"), config)
    with engine.run(Experiment(config), folder) as ledger:
        return ledger.head


def head_of(out: Path) -> bytes:
    with Ledger(out / "ledger.sqlite") as ledger:
        return ledger.head


def test_same_ledger_as_without_flower(tmp_path: Path, head: bytes) -> None:
    serve(tiny(), tmp_path, (2, 0, 1))
    assert head_of(tmp_path) == head
    assert RunFolder.open(tmp_path).load_config() == tiny()


def test_the_server_picks_the_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(method__learning_rate="auto", federation__rounds=1)
    with engine.run(Experiment(config), RunFolder.create(tmp_path / "local", config)) as ledger:
        head, rate = ledger.head, ledger.spec.learning_rate
    serve(config, tmp_path / "flower")
    assert head_of(tmp_path / "flower") == head
    assert RunFolder.open(tmp_path / "flower").load_config() == config.with_learning_rate(rate)
    assert f"fedzo: learning rate {rate:.2g}: " in capsys.readouterr().out
    serve(config, tmp_path / "flower")  # its run-config still says "auto"
    assert head_of(tmp_path / "flower") == head and "learning rate" not in capsys.readouterr().out


def test_goes_on_with_a_run_begun_without_flower(tmp_path: Path, head: bytes) -> None:
    class StopError(Exception):
        pass

    class Interrupt:
        def round(self, summary: RoundSummary) -> None:
            raise StopError

        def evaluation(self, rounds: int, split: str, metrics: Mapping[str, float]) -> None: ...

    with pytest.raises(StopError):
        engine.run(Experiment(tiny()), RunFolder.create(tmp_path, tiny()), [Interrupt()])
    assert head_of(tmp_path) != head
    serve(tiny(), tmp_path)
    assert head_of(tmp_path) == head
    with pytest.raises(LedgerError, match="eps"):
        serve(tiny(method__eps=0.01), tmp_path)


def test_bad_nodes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forge(number: int, reply: Message) -> Message | None:
        record = reply.content.config_records["fedzo"]
        if "answer" not in record:
            if number == 1:
                record["fingerprint"] = "0" * 64
            if number == 2:
                reply.content["fedzo"] = ConfigRecord({"client": "2", "secret": 1})
            return reply
        if number == 3:
            return None  # never answers
        if number == 4:
            raise RuntimeError("broken node")
        if number == 5:
            reply.content["fedzo"] = ConfigRecord({"answer": "text"})
        if number == 6:
            reply.content = RecordDict()
        return reply

    # A second node that claims to be client 0, and one with a number beyond the run's.
    config = tiny(data__clients=7, federation__rounds=1, runtime__round_timeout=5.0)
    serve(config, tmp_path, (0, 1, 2, 3, 4, 5, 6, 0, 9), forge)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        (entry,) = ledger.read()
        (summary,) = ledger.summaries()
    assert entry.clients == (0,)
    assert summary["sampled"] == 5
    assert summary["dropped"] == {"malformed": 2, "no-reply": 2}
    printed = capsys.readouterr().out
    assert "client 1 refused: its fingerprint is" in printed
    assert "a node answered with something else than a hello" in printed
    assert "client 0 refused: another node is that client already" in printed
    assert "client 9 refused: the run has the clients 0 to 6" in printed


def test_a_failing_client_tells_nothing_and_recovers(tmp_path: Path, head: bytes) -> None:
    """The first plan of client 1 is spoilt on its way: it says one sentence, and is back in the next round."""

    class Spoilt(InProcessGrid):
        left = 1

        def handle(self, message: Message) -> str:
            record = message.content.config_records["fedzo"]
            if self.left and "plan" in record and message.metadata.dst_node_id == 999:
                self.left -= 1
                record["plan"] = record["plan"][:-3]
            return super().handle(message)

    grid = Spoilt(tiny(), tmp_path, (0, 1, 2), honest)
    server_side.app(grid, grid.context(1, {}))
    assert [error.reason for error in grid.errors] == ["the client could not do the plan"]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [entry.clients for entry in ledger.read()] == [(0, 2), (0, 1, 2), (0, 1, 2)]
        assert ledger.summaries()[0]["dropped"] == {"no-reply": 1}
    assert head_of(tmp_path) != head


def plan_of(message: Message) -> bool:
    return "plan" in message.content.config_records.get("fedzo", {})


def test_a_node_that_forgot_the_run_is_greeted_again(tmp_path: Path, head: bytes) -> None:
    """Flower keeps a node's state in its process: restarted, it has none, and is the same client all the same."""

    class Forgetful(InProcessGrid):
        asked: ClassVar[list[str]] = []

        def handle(self, message: Message) -> str:
            if message.metadata.dst_node_id == 999:
                self.asked.append("plan" if plan_of(message) else "greeting")
                if self.asked == ["greeting", "plan", "plan"]:
                    self.contexts[999].state = RecordDict()
            return super().handle(message)

    grid = Forgetful(tiny(), tmp_path, (0, 1, 2), honest)
    server_side.app(grid, grid.context(1, {}))
    assert grid.asked == ["greeting", "plan", "plan", "greeting", "plan", "plan"]
    assert head_of(tmp_path) == head


def test_nodes_come_and_go_while_a_run_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 comes late; client 1's node goes, and another takes its place: both are asked in the next round."""
    monkeypatch.setattr(nodes, "_LOOK", 0.0)

    class Changing(InProcessGrid):
        plans = 0

        def handle(self, message: Message) -> str:
            self.plans += plan_of(message)
            name = super().handle(message)
            if self.plans == 3:  # in the second round of two
                self.contexts[998] = self.context(998, {"partition-id": 2})
            if self.plans == 7:  # in the third or fourth, of three
                self.contexts.pop(999, None)
                self.contexts[2000] = self.context(2000, {"partition-id": 1})
            return name

    config = tiny(federation__rounds=8, runtime__start_clients=2)
    grid = Changing(config, tmp_path, (0, 1), honest)
    server_side.app(grid, grid.context(1, {}))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        took_part = [entry.clients for entry in ledger.read()]
        assert verify(ledger, Experiment(config)) == 8
    assert took_part[:2] == [(0, 1)] * 2 and took_part[-2:] == [(0, 1, 2)] * 2
    told = [event["event"] for event in read_events(tmp_path / "events.jsonl")[0]]
    assert told.count("client-lost") == told.count("client-rejoined") == 1


def test_rounds_without_an_answer_are_spaced_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the SuperLink has just come back: errors at once. The rounds of the run do not fly by meanwhile."""
    monkeypatch.setattr(nodes, "_LONGEST_REST", 0.7)

    class Broken(InProcessGrid):
        def handle(self, message: Message) -> str:
            if plan_of(message):
                name = str(next(self.ids))
                self.replies[name] = Message(Error(code=0, reason="unavailable"), reply_to=self.named(message, name))
                return name
            return super().handle(message)

        def named(self, message: Message, name: str) -> Message:
            message.metadata.__dict__["_message_id"] = name
            return message

    grid = Broken(tiny(), tmp_path, (0, 1, 2), honest)
    start = time.monotonic()
    server_side.app(grid, grid.context(1, {}))
    assert time.monotonic() - start > 1.4
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert [summary["dropped"] for summary in ledger.summaries()] == [{"no-reply": 3}] * 3


def test_a_client_that_cannot_start_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Elsewhere(InProcessGrid):
        def handle(self, message: Message) -> str:
            self.contexts[message.metadata.dst_node_id].run_config = self.run_config | {
                "data.source": "/nowhere/secret"
            }
            return super().handle(message)

    grid = Elsewhere(tiny(), tmp_path, (0, 1, 2), honest)
    with pytest.raises(RunError, match="0 of 3 clients could be registered"):
        server_side.app(grid, grid.context(1, {}))
    printed = capsys.readouterr()
    assert "DataError; its own log says more" in printed.out
    assert "secret" not in printed.out


def test_too_few_nodes_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"2 nodes are there, the run has 3 clients.*num-supernodes=3"):
        serve(tiny(runtime__join_timeout=0.1), tmp_path / "run", (0, 1))
    assert not (tmp_path / "run").exists()


SPARSE = {"space__kind": "sparse", "space__density": 0.02, "space__exclude": "*norm*"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of clients that start anew."""
    monkeypatch.setenv("FEDZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nodes, "PART", 4096)
    client_side._host.cache_clear()
    return tmp_path / "cache" / "artifacts"


def test_clients_fetch_the_mask_once(tmp_path: Path, cache: Path) -> None:
    """In parts, through the run's own transport; what they keep in their cache is not sent again."""
    pytest.importorskip("bitsandbytes")
    config = tiny(**SPARSE, model__client_quantisation="nf4, int8, none")
    with engine.run(Experiment(config), RunFolder.create(tmp_path / "local", config)) as ledger:
        local, mask = ledger.head, ledger.artifact(ledger.spec.mask)
    sizes = []
    for name in ("first", "again"):
        client_side._host.cache_clear()
        serve(config, tmp_path / name)
        with Ledger(tmp_path / name / "ledger.sqlite") as ledger:
            assert ledger.head == local
            assert [path.name for path in cache.iterdir()] == [ledger.spec.mask]
            assert {member["quantisation"] for member in ledger.members().values()} == {"nf4", "int8", "none"}
            first, *others = ledger.summaries()
            assert first["bytes_down"] > first["artifact_bytes"] and not any(s["artifact_bytes"] for s in others)
            sizes.append(first["artifact_bytes"])
    assert len(mask) > 2 * 4096 and sizes[1] == 0
    # Three clients of one machine ask at once; the first to have the whole spares the others the last part.
    assert len(mask) <= sizes[0] <= 3 * len(mask)
    (cache / ledger.spec.mask).write_bytes(mask[:-1] + b"x")  # damaged: fetched anew
    client_side._host.cache_clear()
    serve(config, tmp_path / "repaired")
    assert head_of(tmp_path / "repaired") == local and (cache / ledger.spec.mask).read_bytes() == mask


def test_a_mask_with_another_hash_is_refused(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Forged(InProcessGrid):
        def handle(self, message: Message) -> str:
            record = message.content.config_records["fedzo"]
            if isinstance(record.get("data"), bytes) and record["offset"] == 4096:
                record["data"] = bytes(len(record["data"]))  # type: ignore[arg-type]
            return super().handle(message)

    grid = Forged(tiny(**SPARSE), tmp_path / "run", (0, 1, 2), honest)
    with pytest.raises(RunError, match=r"0 of 3 clients could be registered.*has the hash"):
        server_side.app(grid, grid.context(1, {}))
    assert list(cache.iterdir()) == []
    assert "the artifact that was sent as" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked",
    [{"wants": "0" * 64}, {"offset": 4096}, {"offset": "0"}, {"wants": 5}],
    ids=["other", "later", "text", "number"],
)
def test_a_node_gets_the_run_s_mask_part_by_part_and_nothing_else(
    asked: dict[str, Any], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forge(number: int, reply: Message) -> Message:
        record = reply.content.config_records["fedzo"]
        if number == 1 and "wants" in record:
            record.update(asked)
        return reply

    serve(tiny(**SPARSE, federation__rounds=1), tmp_path / "run", (0, 1, 2), forge)
    assert "a node asked for something else than the run's mask" in capsys.readouterr().out
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert list(ledger.members()) == [0, 2]


def test_a_client_whose_file_holds_another_mask_is_refused(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's configuration names a file: clients without it fetch the mask, one with another of that name is out."""
    from fedzo.spaces import Mask

    config = tiny(**SPARSE, federation__rounds=1)
    own = Experiment(config).mask
    assert own is not None
    path = tmp_path / "mask.safetensors"
    own.save(path)
    other = Mask(own.fingerprint, own.method, {}, own.entries)

    class Elsewhere(InProcessGrid):
        """Client 0 has no such file, client 1 another, client 2 the run's."""

        def handle(self, message: Message) -> str:
            client_side._host.cache_clear()
            partition = self.contexts[message.metadata.dst_node_id].node_config["partition-id"]
            path.unlink(missing_ok=True)
            if partition:
                (other if partition == 1 else own).save(path)
            return super().handle(message)

    named = config.model_copy(update={"space": config.space.model_copy(update={"mask": str(path)})})
    grid = Elsewhere(named, tmp_path / "run", (0, 1, 2), honest)
    server_side.app(grid, grid.context(1, {}))
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.spec.mask == own.hash and list(ledger.members()) == [0, 2]
    assert "SpaceError; its own log says more" in capsys.readouterr().out


def private(mode: str, **changes: Any) -> Config:
    keys = {"privacy__mode": mode, "privacy__noise_multiplier": 3.0, "privacy__epsilon": 100.0, "privacy__delta": 1e-3}
    return tiny(**keys, **changes)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the clients keep their budgets."""
    pytest.importorskip("opendp")
    pytest.importorskip("dp_accounting")
    monkeypatch.setenv("FEDZO_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize("mode", ["example-local", "client-central", "client-local", "client-secagg"])
def test_private_runs(mode: str, tmp_path: Path, state: Path) -> None:
    """Rounds are played and replay; each client but those of a trusted server counts its own releases in a file."""
    config = private(mode, privacy__clipping="adaptive")
    grid = serve(config, tmp_path / "run")
    assert not grid.errors
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.rounds == 3 and verify(ledger, open_experiment(config, ledger)) == 3
        each = spent(ledger, state)
        releases = 6 if mode == "example-local" else 3
        assert [one.releases for one in each] == [releases] * (1 if mode == "client-central" else 3)
        assert all(one.own for one in each) == (mode != "client-central")
        assert all(summary["loss"] is None for summary in ledger.summaries())


def test_a_secure_sum_is_made_of_what_clients_hold(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records are the sum of the clients' vectors, and no message has any of these; nor does a client give its own
    twice, once the round's sum has taken it."""
    held: list[Any] = []

    def keep(context: Context, round_: int, vector: Any) -> None:
        held.append(vector)
        hold(context, round_, vector)

    hold = client_side.secure.hold
    monkeypatch.setattr(client_side.secure, "hold", keep)
    sent: list[bytes] = []

    def listen(number: int, reply: Message) -> Message:
        for record in reply.content.config_records.values():
            parts = [part for value in record.values() for part in (value if isinstance(value, list) else [value])]
            sent.extend(part for part in parts if isinstance(part, bytes))
        return reply

    serve(private("client-secagg", federation__rounds=2), tmp_path / "run", forge=listen)
    with Ledger(tmp_path / "run" / "ledger.sqlite") as ledger:
        terms = ledger.spec.terms
        assert terms is not None
        for entry, own in zip(ledger.read(), (held[:3], held[3:]), strict=True):
            assert entry.clients == (0, 1, 2)
            wanted = sum(own)[: entry.scalars.size].reshape(entry.scalars.shape) * terms.clip / terms.levels / 3
            assert entry.scalars == pytest.approx(wanted, rel=1e-6)
    assert len(held) == 6 and len(sent) > 20
    for vector in held:
        for form in (vector.astype("<i8"), vector.astype("<f8"), vector.astype("<f4")):
            assert not any(form.tobytes() in part for part in sent)


@pytest.mark.parametrize(
    ("node", "wanted"),
    [
        ({"max-epsilon": 50.0}, "max-epsilon is 50.0, the run's epsilon is 100"),
        ({"privacy-modes": "client-local, client-secagg"}, "the run's is example-local"),
        ({"max-epsilon": 100, "privacy-modes": "example-local"}, ""),
    ],
)
def test_a_node_s_owner_may_ask_for_privacy(
    node: dict[str, Any], wanted: str, tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = InProcessGrid(private("example-local"), tmp_path / "run", (0, 1, 2), honest)
    grid.contexts[1000].node_config.update(node)
    server_side.app(grid, grid.context(1, {}))
    said = capsys.readouterr().out
    assert ("2 of 3 clients registered" in said) == bool(wanted) and wanted in said
    open_run = InProcessGrid(tiny(), tmp_path / "open", (0, 1, 2), honest)
    open_run.contexts[1000].node_config.update(node)
    server_side.app(open_run, open_run.context(1, {}))
    assert "takes part in private runs only" in capsys.readouterr().out


def test_run_config_lists_every_key() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert app["config"] == tomllib.loads(flower.run_config_toml())["tool"]["flwr"]["app"]["config"]
    from flwr.common.config import flatten_dict

    assert flatten_dict(app["config"]) == flatten(Config()) | {"out": ""}


def test_every_config_file_is_a_run_config() -> None:
    from flwr.common.config import parse_config_args

    files = sorted((ROOT / "configs").glob("*.toml"))
    for path in files:
        assert parse_config_args([str(path)]).keys() <= flatten(Config()).keys(), path


def test_launcher_needs_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r'pip install "fedzo\[flower\]"'):
        flower.run_flower(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def running(mark: str) -> list[str]:
    """Processes whose environment or command line holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in text and int(path.name) != os.getpid():
            found.append(path.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_simulation(
    tmp_path: Path, head: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDZO_TEST", str(tmp_path))  # marks every process that comes of this test
    before = Path.cwd()
    flower.run_flower(tiny(), tmp_path / "run")
    assert head_of(tmp_path / "run") == head
    assert "3 of 3 clients registered" in capfd.readouterr().err
    assert running(str(tmp_path)) == []
    assert Path.cwd() == before

    with pytest.raises(RunError, match=r"finished:failed.*nowhere"):
        flower.run_flower(tiny(model__source="nowhere/at-all"), tmp_path / "failed", quiet=True)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "failed" / "flower.log").is_file()
    assert running(str(tmp_path)) == []


@pytest.mark.slow
def test_private_simulation(tmp_path: Path, state: Path) -> None:
    """SecAgg+ and the clients' own budgets with Ray's processes, among which clients move; budgets are in the run's
    folder."""
    for mode in ("client-secagg", "example-local"):
        flower.run_flower(private(mode), tmp_path / mode, quiet=True)
        with Ledger(tmp_path / mode / "ledger.sqlite") as ledger:
            assert verify(ledger, open_experiment(private(mode), ledger)) == 3
            each = spent(ledger, tmp_path / mode / "budgets")
            assert [(one.own, one.releases) for one in each] == [(True, 3 if mode == "client-secagg" else 6)] * 3
    assert not state.exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ends with its parent on Linux only")
def test_nothing_outlives_a_killed_launcher(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(flower.to_toml(tiny(federation__rounds=10**6)), encoding="utf-8")
    code = (
        "import sys; from pathlib import Path;"
        "from fedzo.config import load_config; from fedzo.flower import run_flower;"
        "run_flower(load_config(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    environment = os.environ | {"FEDZO_TEST": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(config), str(tmp_path / "run")], env=environment)
    try:
        end = time.monotonic() + 200
        while not (tmp_path / "run" / "ledger.sqlite").exists() and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    end = time.monotonic() + 60
    while running(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.5)
    assert running(str(tmp_path)) == []
