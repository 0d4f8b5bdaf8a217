"""Flower's nodes as the engine's transport: who is there, who is which client, and the messages on their way.

There is no Flower `Strategy`: it is built around arrays and one send_and_receive a round, polled every 3 seconds in
deployment, while a round here is pushed and polled at our own pace, may send a client a second plan, and greets nodes
that come while it lasts.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedzo.engine import Parcel
from fedzo.errors import ProtocolError, RunError, shown
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.messages import Hello

RECORD = "fedzo"  # the one record of every message
PART = 8 * 2**20  # bytes of an artifact in one message
LOADING = 600.0  # seconds that a node may take to load its model and data
FAREWELL = 10.0  # seconds that the end of a run waits for its nodes to hear of it
_LOOK = 1.0  # seconds between two looks at which nodes there are
_LONGEST_REST = 30.0  # seconds between two rounds, of which the first had no answer
_MOST_MASKS = 3  # times that a node is sent the run's mask, while it is there
_AGAIN = 60.0  # seconds after which a node that was refused, or did not answer, is greeted again
_AT_ONCE, _BYTES_AT_ONCE = 256, 32 * 2**20  # messages pushed together


class Post:
    """Messages to nodes, and their answers."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._sent: dict[str, tuple[int, str, float]] = {}  # id -> node, kind, when it is late

    def send(self, kind: str, contents: Iterable[tuple[int, ConfigRecord]], timeout: float) -> list[int]:
        """Sends nodes records, of which few are in memory at once.

        Args:
            kind: Flower's type of message.
            contents: node ids and their records.
            timeout: seconds; also the messages' time to live, so that nobody begins work that is no longer wanted.

        Returns:
            The nodes that it could be sent to.
        """
        late = time.monotonic() + timeout
        reached: list[int] = []
        batch: list[tuple[int, Message]] = []
        size = 0
        for node, record in contents:
            batch.append((node, Message(RecordDict({RECORD: record}), node, kind, ttl=timeout)))
            size += sum(len(value) for value in record.values() if isinstance(value, bytes))
            if len(batch) >= _AT_ONCE or size >= _BYTES_AT_ONCE:
                reached += self._push(kind, batch, late)
                batch, size = [], 0
        return reached + (self._push(kind, batch, late) if batch else [])

    def _push(self, kind: str, batch: list[tuple[int, Message]], late: float) -> list[int]:
        names = list(self._grid.push_messages([message for _, message in batch]))
        # Fewer names: all of them were refused, and Flower has logged why. No name: this one was.
        sent = {name: node for name, (node, _) in zip(names, batch, strict=False) if name} if names else {}
        self._sent.update({name: (node, kind, late) for name, node in sent.items()})
        return list(sent.values())

    def receive(self) -> Iterator[tuple[int, str, ConfigRecord | None]]:
        """Node, kind and record of each answer that has come; None: an error, or it is too late for one."""
        if not self._sent:
            return
        for answer in self._grid.pull_messages(list(self._sent)):
            found = self._sent.pop(answer.metadata.reply_to_message_id, None)
            if found is not None:
                content = answer.content.config_records.get(RECORD, ConfigRecord()) if answer.has_content() else None
                yield found[0], found[1], content
        now = time.monotonic()
        for name, (node, kind, late) in list(self._sent.items()):
            if now > late:
                del self._sent[name]
                yield node, kind, None

    def waits(self, kind: str) -> int:
        """How many answers to messages of this kind may still come."""
        return sum(found[1] == kind for found in self._sent.values())


class Nodes:
    """The run's nodes.

    Args:
        grid: Flower's.
        coordinator: of the run; told who has come and gone.
        say: is told, in a line, what a person should know.
        timeout: seconds for an answer to a plan.
        loading: seconds for an answer to a greeting, before which a node loads its model and data.
        patience: seconds without a new node after which no more is waited for.
        start: clients that must be there before the first round.

    Attributes:
        of: client -> node id, of those that are registered.
    """

    def __init__(
        self,
        grid: Grid,
        coordinator: Coordinator,
        say: Callable[[str], None],
        *,
        timeout: float,
        patience: float,
        start: int,
        loading: float = LOADING,
    ) -> None:
        self.of: dict[int, int] = {}
        self._grid, self._coordinator, self._say = grid, coordinator, say
        self._timeout, self._patience, self._start = timeout, patience, start
        self._loading = loading
        self._post = Post(grid)
        self._client: dict[int, int] = {}  # node id -> client
        self._known: set[int] = set()  # nodes that were greeted, or will be
        self._queue: deque[int] = deque()  # nodes that will be
        self._refused: dict[int, float] = {}  # node id -> when it is greeted again
        self._holder: dict[int, int] = {}  # refused node id -> the node that is the client that it says it is
        self._gone: set[int] = set()  # clients that were registered
        self._resident: set[int] = set()  # nodes whose worker waits for the end of the run
        self._given: dict[int, int] = {}  # node id -> bytes of the mask that it was sent since it was greeted
        self._cost: Counter[int] = Counter()  # node id -> bytes of it that it was sent in all
        self._mute = 0  # rounds running in which no node answered
        self._why = ""
        self._looked = 0.0

    def ready(self) -> None:
        """Before a round: takes in who has come, forgets who is gone, waits until there are enough for one.

        Raises:
            RunError: there are not, and for a while no node has come.
        """
        first, last, pace = self._start > 0, time.monotonic(), Pace()
        # A SuperLink that has just come back answers at once that it knows of no answer: rounds would fly by.
        rested = last + (min(_LONGEST_REST, 2.0 ** min(self._mute, 5)) if self._mute else 0.0)
        while True:
            count = len(self._known)
            self._look()
            for node, kind, record in self._post.receive():
                if kind == "query":
                    self._greeted(node, record)
            # The first round waits for those that are being greeted, unless enough clients are there without them.
            settled = len(self._known) >= self._start and not self._greeting
            wanted = max(1, self._coordinator.spec.quorum)
            enough = len(self.of) >= (wanted if not first or settled else max(wanted, self._start))
            if enough and time.monotonic() >= rested:
                break
            if enough or len(self._known) > count or self._greeting:
                last = time.monotonic()
            elif (first and len(self._known) >= self._start) or time.monotonic() - last > self._patience:
                raise RunError(self._too_few())
            pace.wait()
        if first:
            self._start = 0
            self._say(f"{len(self.of)} of {self._coordinator.spec.clients} clients registered")

    def _too_few(self) -> str:
        spec = self._coordinator.spec
        if len(self._known) < self._start:
            return too_few(len(self._known), self._start)
        wanted = max(1, spec.quorum)
        return f"{len(self.of)} of {spec.clients} clients could be registered, wanted {wanted}{self._why}"

    def exchange(self, parcels: Iterable[Parcel]) -> Iterator[Parcel]:
        """Plans for answers; a client whose answer is an error or late gives none."""
        asked: dict[int, int] = {}  # node id -> client

        def plans() -> Iterator[tuple[int, ConfigRecord]]:
            for client, plan in parcels:
                node = self.of[client]
                asked[node] = client
                yield node, ConfigRecord({"plan": plan})

        waiting = set(self._post.send("train.plan", plans(), self._timeout))
        self._mute += 1
        again: set[int] = set()  # nodes that must be greeted before they can do their plan
        pace, end = Pace(), time.monotonic() + self._timeout
        while waiting and time.monotonic() < end:
            self._look(forget=False)
            for node, kind, record in self._post.receive():
                if kind == "query":
                    self._greeted(node, record)
                    if node in again and (record is None or "wants" not in record):
                        again.discard(node)
                        if not self._renew(node, asked[node], end - time.monotonic()):
                            waiting.discard(node)
                    continue
                if node not in waiting:
                    continue
                if record is not None and record.get("greet") is True and node not in again:
                    again.add(node)
                    self._queue.appendleft(node)
                    continue
                waiting.discard(node)
                if record is not None:
                    self._mute = 0
                    data = record.get("answer")
                    yield asked[node], data if isinstance(data, bytes) else b""  # b"" is counted as malformed
            pace.wait()

    def _renew(self, node: int, client: int, left: float) -> bool:
        """Sends a node its plan anew, where it is still this client; whether it could."""
        if self._client.get(node) != client or left <= 0:
            return False
        plan = self._coordinator.renew(client)
        return plan is not None and bool(
            self._post.send("train.plan", [(node, ConfigRecord({"plan": plan.to_bytes()}))], left)
        )

    def farewell(self) -> None:
        """Tells the nodes that the run is over; their workers end."""
        there = self._resident & set(self._client)
        self._post.send("query.leave", [(node, ConfigRecord()) for node in there], FAREWELL)
        pace = Pace()
        while self._post.waits("query.leave"):
            for _ in self._post.receive():
                pass
            pace.wait()

    def _look(self, *, forget: bool = True) -> None:
        """Greets the nodes that are new, and forgets those that are gone.

        Args:
            forget: else only greets: while a round lasts, its clients stay its clients.
        """
        self._greet()
        now = time.monotonic()
        if now - self._looked < _LOOK and self._known:
            return
        self._looked = now
        there = set(self._grid.get_node_ids())
        if gone := (self._known - there if forget else set()):
            self._known -= gone
            self._resident -= gone
            for node in gone:
                self._given.pop(node, None)
                self._cost.pop(node, None)
            for node in gone & set(self._client):
                client = self._client.pop(node)
                del self.of[client]
                self._coordinator.dismiss(client)
                self._gone.add(client)
                self._coordinator.events.tell("client-lost", client=client)
            freed = gone & set(self._holder.values())
            self._refused = {
                node: now if self._holder.get(node) in freed else when
                for node, when in self._refused.items()
                if node in there
            }
            self._holder = {node: holder for node, holder in self._holder.items() if node in there and holder in there}
        again = [node for node, when in self._refused.items() if when <= now]
        for node in again:
            del self._refused[node]
        new = sorted(there - self._known)
        self._known.update(new)
        self._queue += [*new, *again]
        self._greet()

    @property
    def _greeting(self) -> bool:
        """Whether nodes are being greeted."""
        return bool(self._queue) or self._post.waits("query") > 0

    def _greet(self) -> None:
        """Greets nodes that wait for it, few at a time: of ten thousand the last would have no time left to answer."""
        if not self._queue:
            return
        spec, free = self._coordinator.spec.to_json(), _AT_ONCE - self._post.waits("query")
        now = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
        self._given.update(dict.fromkeys(now, 0))
        self._post.send("query", ((node, ConfigRecord({"spec": spec})) for node in now), self._loading)

    def _greeted(self, node: int, record: ConfigRecord | None) -> None:
        """Takes a node's answer to its greeting."""
        if record is None:
            self._refused[node] = time.monotonic() + _AGAIN  # it did not answer; it may then
            return
        try:
            if "wants" in record:
                self._send_part(node, record)
                return
            hello, resident = _read_hello(record)
            holder = self.of.get(hello.client, node)
            if holder != node:
                self._holder[node] = holder
                raise ProtocolError(f"client {hello.client} refused: another node is that client already")
            if self._client.get(node, hello.client) != hello.client:
                raise ProtocolError(f"client {hello.client} refused: its node is client {self._client[node]}")
            self._coordinator.admit(hello)
            if hello.client in self._gone:
                self._gone.discard(hello.client)
                self._coordinator.events.tell("client-rejoined", client=hello.client)
            self.of[hello.client], self._client[node] = node, hello.client
            if resident:
                self._resident.add(node)
        except ProtocolError as error:
            self._refused[node] = time.monotonic() + _AGAIN
            self._why = self._why or f": {error}"
            self._coordinator.events.tell("client-refused", logging.WARNING, reason=str(error))
            self._say(str(error))

    def _send_part(self, node: int, record: ConfigRecord) -> None:
        """Greets again, with the part of the run's mask that a node asks for: always the one after the last."""
        spec, given = self._coordinator.spec, self._given.get(node, 0)
        if record["wants"] != spec.mask or not spec.mask or record.get("offset") != given:
            raise ProtocolError(f"a node asked for something else than the run's mask from byte {given}")
        data = self._coordinator.ledger.artifact(spec.mask)
        if given >= len(data):
            raise ProtocolError("a node asked for more of the run's mask than there is")
        if self._cost[node] >= _MOST_MASKS * len(data):
            raise ProtocolError(f"a node asked for the run's mask more than {_MOST_MASKS} times")
        part = data[given : given + PART]
        again = ConfigRecord({"spec": spec.to_json(), "offset": given, "size": len(data), "data": part})
        self._given[node] = given + len(part)
        self._cost[node] += len(part)
        self._coordinator.sent_artifact(len(part))
        self._post.send("query", [(node, again)], self._loading)


class Pace:
    """Waits between two looks at the mail: short at first, longer when nothing is likely to have come."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def wait(self) -> None:
        time.sleep(min(0.25, max(0.01, (time.monotonic() - self._start) / 50)))


def wait_for_nodes(grid: Grid, wanted: int, patience: float) -> None:
    """Returns when there are enough nodes.

    Raises:
        RunError: no new node has come for a while and there are too few.
    """
    count, last = 0, time.monotonic()
    while (found := len(list(grid.get_node_ids()))) < wanted:
        if found > count:
            last = time.monotonic()
        elif time.monotonic() - last > patience:
            raise RunError(too_few(found, wanted))
        count = found
        time.sleep(0.05)


def too_few(found: int, wanted: int) -> str:
    return (
        f"{found} nodes are there, the run has {wanted} clients (data.clients, or runtime.start_clients to begin); "
        f'in a simulation add --federation-config "num-supernodes={wanted} client-resources-num-cpus=1" to flwr run'
    )


def _read_hello(record: ConfigRecord) -> tuple[Hello, bool]:
    """What a node says of itself, and whether it has a worker that waits for the end of the run."""
    if "refused" in record:
        raise ProtocolError(shown(record["refused"], 300))
    given: dict[str, Any] = dict(record)
    resident = given.pop("resident", False)
    try:
        hello = Hello(**given)
    except TypeError:
        raise ProtocolError("a node answered with something else than a hello") from None
    if type(hello.client) is not int:
        raise ProtocolError(f"client {shown(hello.client)} refused: wanted a number")
    return hello, resident is True
