"""Flower with many nodes: greeted few at a time, their mail looked up."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny import make_spec, make_worker
from tiny import start as begin

pytest.importorskip("flwr")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # server/ is not part of the installed package

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid
from grids import ProcessGrid

from server import nodes as server_nodes
from server.simulation import index_mail


def simulation(count: int) -> tuple[InMemoryGrid, InMemoryLinkState, list[int]]:
    """The grid of Flower's simulation with so many nodes, its state, and their ids."""
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    assert isinstance(state, InMemoryLinkState)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    run = Run.create_empty(7)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.run_ids[7], state.task_store[1] = RunRecord(run=run), Task(task_id=1, run_id=7)
    grid = InMemoryGrid(factory)
    grid.set_run(run)
    return grid, state, list(_register_nodes(count, factory))


def message(node: int, text: str, ttl: float = 600.0) -> Message:
    return Message(RecordDict({"fedzo": ConfigRecord({"text": text})}), node, "query", ttl=ttl)


def texts(found: Iterable[Message]) -> list[object]:
    return [one.content.config_records["fedzo"]["text"] for one in found]


def test_nodes_get_the_same_mail_as_without_the_index() -> None:
    given = []
    for indexed in (False, True):
        grid, state, ids = simulation(6)
        if indexed:
            index_mail(grid)
        taken = []
        for text, node in (("a", 1), ("b", 4), ("c", 1), ("d", 0)):
            grid.push_messages([message(ids[node], text)])
            taken.append([texts(state.get_message_ins(one, 1)) for one in ids[3:]])
        taken += [[texts(state.get_message_ins(one, 1)) for one in ids] for _ in range(3)]
        given.append(taken)
    assert given[0] == given[1]
    assert given[1][4:] == [[["d"], ["a"], [], [], [], []], [[], ["c"], [], [], [], []], [[]] * 6]


def test_a_node_whose_mail_has_expired_gets_what_comes_later() -> None:
    grid, state, (node,) = simulation(1)
    index_mail(grid)
    (name,) = grid.push_messages([message(node, "old")])
    state.delete_messages({name})  # as the state does with what has expired
    assert state.get_message_ins(node, 1) == []
    grid.push_messages([message(node, "new")])
    assert texts(state.get_message_ins(node, 1)) == ["new"]


def test_nobody_elses_mail_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, state, ids = simulation(30)
    index_mail(grid)
    grid.push_messages([message(ids[0], "a")])
    looked: list[set[str]] = []
    check = state._check_stored_messages
    monkeypatch.setattr(
        state, "_check_stored_messages", lambda names, *more: (looked.append(names), check(names, *more))
    )
    assert [texts(state.get_message_ins(node, 1)) for node in ids[1:]] == [[]] * 29
    assert looked == []
    assert texts(state.get_message_ins(ids[0], 1)) == ["a"]
    assert len(looked) == 1


def test_another_grid_is_left_alone() -> None:
    grid = Greeted({})
    before = dict(vars(grid))
    index_mail(grid)
    assert vars(grid) == before


class Greeted(ProcessGrid):
    """Nodes that say hello when the server next asks for replies.

    Attributes:
        most: messages that were on their way at once.
    """

    def __init__(self, hellos: dict[int, ConfigRecord]) -> None:
        state = RecordDict()
        super().__init__(
            {node: Context(run_id=1, node_id=node, node_config={}, state=state, run_config={}) for node in hellos}
        )
        self.hellos, self.names, self.most = hellos, itertools.count(), 0

    def handle(self, message: Message) -> str:
        name = str(next(self.names))
        message.metadata.__dict__["_message_id"] = name
        hello = self.hellos[message.metadata.dst_node_id]
        self.replies[name] = Message(RecordDict({server_nodes.RECORD: hello}), reply_to=message)
        self.most = max(self.most, len(self.replies))
        return name


def test_nodes_are_greeted_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_nodes, "_AT_ONCE", 4)
    spec = make_spec(clients=21)
    coordinator = begin(tmp_path, spec, clients=()).coordinator
    grid = Greeted(
        {100 + c: ConfigRecord(dataclasses.asdict(make_worker(spec, c).hello())) for c in range(spec.clients)}
    )
    said: list[str] = []
    nodes = server_nodes.Nodes(grid, coordinator, said.append, timeout=60.0, patience=5.0, start=spec.clients)
    nodes.ready()
    assert grid.most == 4
    assert nodes.of == {client: 100 + client for client in range(21)}
    assert sorted(coordinator.members) == list(range(21))
    assert said == ["21 of 21 clients registered"]
