"""Flower's nodes that answer as they like, among nodes of the ClientApp: a Grid within this process."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from hostile import CLIENTS, TEXTS, VALUES

from clients import app as client_side
from fedzo.config import Config, flatten

Pick = Callable[[Any], Any]
Content = Error | RecordDict


def _of(values: dict[str, Any]) -> RecordDict:
    return RecordDict({"fedzo": ConfigRecord(values)})


def _one_wrong(pick: Pick, right: dict[str, Any]) -> RecordDict:
    name = pick(sorted(set(right) - {"resident", "applied"}))
    wrong = [value for value in VALUES if type(value) is not type(right[name]) or value in TEXTS]
    return _of({**right, name: pick(wrong)})


# Kind -> the content of a hostile answer, made of the record of a right one.
KINDS: dict[str, Callable[[Pick, dict[str, Any]], Content]] = {
    "flower: an error": lambda pick, right: Error(pick([0, 1, 5, 2**31 - 1]), pick(TEXTS)),
    "flower: no record": lambda pick, right: RecordDict(),
    "flower: another record": lambda pick, right: RecordDict({pick(TEXTS) or "x": ConfigRecord(right)}),
    "flower: a record of another type": lambda pick, right: RecordDict(
        {"fedzo": pick([MetricRecord({"answer": 1.5}), ArrayRecord()])}
    ),
    "flower: other keys": lambda pick, right: _of({pick(TEXTS)[:1000]: pick(VALUES) for _ in range(4)}),
    "flower: a value wrong": _one_wrong,
    "flower: a key more": lambda pick, right: _of({**right, pick(["extra", "self", "__class__"]): pick(VALUES)}),
    "flower: refused": lambda pick, right: _of({"refused": pick(VALUES)}),
    "flower: wants": lambda pick, right: _of({"wants": pick(VALUES), "offset": pick(VALUES)}),
    "flower: answer": lambda pick, right: _of({"answer": pick(VALUES)}),
    "flower: greet me": lambda pick, right: _of({"greet": True}),
}


class HostileGrid(Grid):
    """Hands every message to its node at once, and keeps the replies until they are asked for.

    Nodes of odd clients answer greetings rightly, and plans as strangers answer everything.

    Args:
        strangers: nodes that answer nothing rightly; 0: there is nobody hostile, and odd clients answer plans with an
            error.
        add: is told each hostile answer's kind and what it was an answer to.
    """

    def __init__(
        self, config: Config, out: Path, strangers: int, rng: np.random.Generator, add: Callable[[str, str], None]
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # private; Message() needs them
        self._run_config, self._rng, self._add = flatten(config) | {"out": str(out)}, rng, add
        self._nodes = {number + 1: self.context(number + 1, number) for number in range(CLIENTS)}
        self._strangers = range(10_000, 10_000 + strangers)
        self._replies: dict[str, Message] = {}
        self._count, self._hello = 0, dict[str, Any]()

    def context(self, node: int, number: int = 0) -> Context:
        return Context(1, node, {"partition-id": number}, RecordDict(), self._run_config)

    def _garbage(self, right: dict[str, Any], asked: str) -> Content:
        kind = self._pick(list(KINDS))
        self._add(kind, asked)
        return KINDS[kind](self._pick, right)

    def _pick(self, values: Any) -> Any:
        return values[int(self._rng.integers(len(values)))]

    def _answer(self, message: Message) -> Message:
        node, asked = message.metadata.dst_node_id, message.metadata.message_type
        if node in self._strangers:
            right = {**self._hello, "client": int(self._rng.integers(CLIENTS))}
            return Message(self._garbage(right, "to a greeting"), reply_to=message)
        if asked == "train.plan" and node % 2 == 0:  # of an odd client
            silent = Error(code=0, reason="silent")
            return Message(self._garbage({"answer": b""}, "to a plan") if self._strangers else silent, reply_to=message)
        reply = client_side.app(message, self._nodes[node])
        if asked == "query":
            self._hello.update(reply.content.config_records["fedzo"])
        return reply

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            self._count += 1
            names.append(str(self._count))
            message.metadata.__dict__["_message_id"] = names[-1]
            self._replies[names[-1]] = self._answer(message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def get_node_ids(self) -> list[int]:
        return [*self._nodes, *self._strangers]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError
