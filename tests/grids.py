"""A Grid of Flower's within this process: what its nodes do with a message, a subclass says."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class ProcessGrid(Grid):
    """Hands every message to its node at once, and keeps the replies until they are asked for.

    Attributes:
        contexts: of the nodes, by their ids.
        replies: by the ids of the messages that they answer.
    """

    def __init__(self, contexts: dict[int, Context]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # private; Message() needs them
        self.contexts, self.replies = contexts, dict[str, Message]()

    @abstractmethod
    def handle(self, message: Message) -> str:
        """Has the message's node answer it; returns the message's id."""

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.handle(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in message_ids if name in self.replies]

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError
