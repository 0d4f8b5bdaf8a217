"""Hostile replies, small enough to shrink: what the server's parser and validator do with them.

`simulations/fuzz_server.py` is the long version, with the embedded model and Flower.
"""

import copy
import dataclasses
import itertools
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hybrid import hybrid_spec
from test_messages import plans
from tiny import Federation, answer, make_spec, make_terms, make_worker, private_spec, rounds_of, start

from fedzo.engine import Transport, play_round
from fedzo.errors import ProtocolError, shown
from fedzo.federation.messages import (
    Behind,
    CatchUp,
    Contribution,
    Failure,
    Held,
    Hello,
    Plan,
    RoundRecords,
    decode,
    decode_answer,
)
from fedzo.federation.replica import theta_digest
from fedzo.federation.spec import PROTOCOL, RunSpec


def quick(examples: int) -> settings:
    """The same examples each time."""
    health = list(HealthCheck)
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


UINT8, UINT16, UINT32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))


def little(size: int, values: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: value.to_bytes(size, "little"))


def joined(*parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(b"".join)


# A message field by field, each of any value; the lengths that it states are often small, so that some of them fit.
SMALL = st.integers(0, 3) | UINT16
HEAD = joined(
    st.just(b"fz") | st.binary(min_size=2, max_size=2), little(1, st.just(PROTOCOL) | UINT8),
    little(1, st.integers(0, 8) | UINT8), st.binary(min_size=8, max_size=8), little(4, UINT32), little(4, UINT32),
)  # fmt: skip
BODY = st.one_of(
    st.just(b""), little(1, UINT8), little(4, UINT32),
    joined(little(2, SMALL), little(2, SMALL), little(4, UINT32), little(4, UINT32)),
    joined(little(2, SMALL), little(2, SMALL), little(4, UINT32), little(4, UINT32), little(4, SMALL | UINT32)),
    joined(little(2, SMALL), little(2, SMALL), little(2, SMALL)),
)  # fmt: skip
MESSAGE = joined(
    HEAD, BODY, st.integers(0, 30).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
)


@quick(500)
@given(MESSAGE)
def test_what_is_parsed_is_what_would_be_sent(data: bytes) -> None:
    """There is one way to write a message, so nothing is hidden in one."""
    try:
        message = decode_answer(data)
    except ProtocolError as error:
        assert len(str(error)) < 200
        return
    assert not isinstance(message, Plan)
    if not isinstance(message, Contribution) or message.loss is None or message.loss == message.loss:
        assert message.to_bytes() == data


@quick(100)
@given(plans())
def test_a_plan_knows_its_length(plan: Plan) -> None:
    assert plan.nbytes == len(plan.to_bytes())
    with pytest.raises(ProtocolError, match="a plan, wanted an answer"):
        decode_answer(plan.to_bytes())


def test_a_plan_of_many_empty_rounds_is_refused_unparsed() -> None:
    empty = RoundRecords(np.empty((0, 0), np.uint64), np.empty((0, 0), np.float32))
    plan = Plan(
        bytes(8), 1, 0, np.empty((0, 0), np.uint64), 0.1, 1, bytes(32), CatchUp("records", 0, 1, (empty,) * 5_000)
    )
    data = plan.to_bytes()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode_answer(data)
        refused = tracemalloc.get_traced_memory()[1]
        decode(data)
        parsed = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused < 10_000 < 10 * len(data) < parsed


# -- the validator, in runs of every kind


def _specs() -> Iterator[tuple[str, RunSpec]]:
    yield "plain", make_spec()
    yield "local steps", make_spec(local_steps=2, seeds="independent")
    yield "gradients", hybrid_spec(local_steps=2)
    yield "two scalars", hybrid_spec("adam", 0.02, estimator="hizoo", optimizer="hizoo", family="gaussian")
    for mode in ("client-local", "client-central", "client-secagg"):
        yield mode, private_spec(make_terms(mode, clipping="adaptive"), aggregation="uniform", local_steps=2)


SPECS = dict(_specs())
ROUND = 2  # that is open
# What a right contribution's fields may be replaced by; a value that is right by chance is sorted out by `_right`.
FLOATS = st.floats(width=32) | st.sampled_from([float("nan"), float("inf"), 1e4, -1.0001e4, 3.4e38, 1e-45])


@dataclasses.dataclass
class Open:
    """A run with a round open, and each client's right answer to it."""

    run: Federation
    right: dict[int, bytes]
    pristine: tuple[Any, ...]

    def reset(self) -> None:
        coordinator = self.run.coordinator
        kept = copy.deepcopy(self.pristine)
        coordinator._open, coordinator.members, coordinator._vain, coordinator._spent = kept


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Open]:
    found = {}
    for name, spec in SPECS.items():
        run = start(tmp_path_factory.mktemp("fuzz"), spec)
        for _ in range(ROUND):
            run.round()
        asked = run.coordinator.open_round()
        right = {plan.client: answer(run.workers[plan.client], plan.to_bytes()) for plan in asked}
        server = run.coordinator
        state = server._open, server.members, server._vain, server._spent
        found[name] = Open(run, right, copy.deepcopy(state))
    return found


def _right(spec: RunSpec, right: bytes, message: Contribution) -> bool:
    """An oracle of its own: whether a contribution is one that the protocol lets into a round, as it does `right`."""
    wanted = decode(right)
    if not isinstance(wanted, Contribution):
        return False
    if any(getattr(message, name) != getattr(wanted, name) for name in ("run_id", "round", "client", "examples")):
        return False
    for name in ("seeds", "scalars", "gradients", "counts"):
        found, shape = getattr(message, name), getattr(getattr(wanted, name), "shape", None)
        if getattr(found, "shape", None) != shape:
            return False
        if name != "seeds" and shape is not None and not bool((np.abs(found) <= spec.scalar_bound).all()):
            return False
    return message.seeds.tolist() == wanted.seeds.tolist() and (
        message.loss is None or abs(message.loss) < float("inf")
    )


@st.composite
def contributions(draw: st.DrawFn, right: Contribution) -> bytes:
    """A right contribution with some of its fields replaced."""
    changes: dict[str, Any] = {}
    for name in draw(
        st.lists(st.sampled_from([stated.name for stated in dataclasses.fields(right)]), min_size=1, max_size=2)
    ):
        value = getattr(right, name)
        if name == "run_id":
            changes[name] = draw(st.binary(min_size=8, max_size=8))
        elif name in ("round", "client"):
            changes[name] = draw(st.integers(0, 5) | UINT32)
        elif name == "seeds":
            changes[name] = value ^ np.uint64(draw(st.integers(0, 2**64 - 1)))
        elif name == "counts" and draw(st.booleans()):  # of a run that is private, or of one that is not
            private = {"counts": np.zeros(draw(st.integers(0, 2)), np.float32), "examples": None, "loss": None}
            changes |= private | {"gradients": None} if value is None else {"counts": None, "examples": 0, "loss": 1.0}
        elif name == "examples" and value is not None:
            changes[name] = draw(UINT32)
        elif name == "loss" and value is not None:
            changes[name] = draw(FLOATS)
        elif isinstance(value, np.ndarray) and value.size:
            array = value.copy()
            array.ravel()[draw(st.integers(0, array.size - 1))] = draw(FLOATS)
            changes[name] = array if draw(st.booleans()) else array[: draw(st.integers(0, len(array)))]
    if "scalars" in changes and len(changes["scalars"]) != len(right.seeds):
        changes["seeds"] = right.seeds[: len(changes["scalars"])]
        changes |= {} if right.gradients is None else {"gradients": right.gradients[: len(changes["scalars"])]}
    return dataclasses.replace(right, **changes).to_bytes()


@st.composite
def edits(draw: st.DrawFn, right: bytes) -> bytes:
    """Bytes with some replaced, cut or added."""
    data = bytearray(right)
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), UINT8), max_size=3)):
        data[at] = value
    return bytes(data[: len(data) - draw(st.integers(0, len(data)))]) + draw(st.binary(max_size=20))


@st.composite
def replies(draw: st.DrawFn, opened: Open) -> tuple[int, bytes]:
    """Whom the transport says that it comes from, and the message."""
    spec, sender = opened.run.coordinator.spec, draw(st.sampled_from([0, 1, 2, 3] * 3 + [-1, 4, 5, 2**40]))
    data = opened.right[draw(st.sampled_from([sender] if sender in opened.right else sorted(opened.right)))]
    message, numbers = decode(data), st.integers(0, 4) | UINT32
    own = {
        "run_id": spec.run_id,
        "round": draw(st.just(ROUND) | numbers),
        "client": draw(st.just(max(sender, 0)) | numbers),
    }
    own["client"] %= 2**32
    reasons = st.sampled_from(["digest", "not-finite", "budget"])
    made = [
        edits(data), MESSAGE, st.just(data), numbers.map(lambda applied: Behind(**own, applied=applied)),
        reasons.map(lambda reason: Failure(**own, reason=reason)), st.just(Held(**own)),
    ]  # fmt: skip
    if isinstance(message, Contribution):
        made.append(contributions(message))
    elif isinstance(message, Held):  # what a run without a secure sum would be sent
        seeds = opened.pristine[0].seeds[message.client]
        scalars, counts = np.ones(seeds.shape, np.float32), np.zeros(spec.sanitiser.counts, np.float32)
        made.append(st.just(Contribution(**own, seeds=seeds, scalars=scalars, examples=None, loss=None, counts=counts)))
    found = draw(st.one_of(made))
    return sender, found if isinstance(found, bytes) else found.to_bytes()


@pytest.mark.parametrize("name", list(SPECS))
@quick(100)
@given(data=st.data())
def test_replies_are_taken_only_if_right_and_each_is_counted(
    opened: dict[str, Open], name: str, data: st.DataObject
) -> None:
    one = opened[name]
    one.reset()
    server, ledger = one.run.coordinator, one.run.ledger
    before = ledger.head, ledger.rounds, theta_digest(server.replica.theta), len(ledger.members())
    current = server._open
    assert current is not None
    sent = data.draw(st.lists(replies(one), min_size=1, max_size=8))
    renewed = sum(server.receive(client, message) is not None for client, message in sent)
    taken = len(current.contributions) + len(current.held)
    assert taken + renewed + current.dropped.total() == len(sent)
    for client, kept in current.contributions.items():
        assert _right(server.spec, one.right[client], kept)
    assert not (current.contributions if name == "client-secagg" else current.held)
    for client in current.held:
        assert (client, Held(server.spec.run_id, ROUND, client).to_bytes()) in sent
    assert renewed <= 2 * len(current.rewound)
    assert {*current.contributions, *current.held, *current.answered, *current.rewound} <= set(one.right)
    assert set(server.members) == set(range(4)) and current.bytes_up == sum(len(message) for _, message in sent)
    assert (ledger.head, ledger.rounds, theta_digest(server.replica.theta), len(ledger.members())) == before


@pytest.mark.parametrize("name", [name for name in SPECS if name != "client-secagg"])
@quick(150)
@given(data=st.data())
def test_a_contribution_is_taken_if_and_only_if_it_is_right(
    opened: dict[str, Open], name: str, data: st.DataObject
) -> None:
    one = opened[name]
    one.reset()
    server, client = one.run.coordinator, data.draw(st.integers(0, 3))
    right = decode(one.right[client])
    assert isinstance(right, Contribution)
    sent = data.draw(st.just(one.right[client]) | contributions(right))
    server.receive(client, sent)
    current = server._open
    assert current is not None
    assert (client in current.contributions) is not _hostile(server.spec, one.right[client], sent)
    assert current.dropped.total() == (client not in current.contributions)


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The hashes of runs in which clients 1 and 3 never answer."""
    found = {}
    for name in ("plain", "local steps", "gradients"):
        run = start(tmp_path_factory.mktemp("silent"), SPECS[name])
        found[name] = run.finish(lambda round_, client, data: [] if client % 2 else [data])
    return found


@pytest.mark.parametrize("name", ["plain", "local steps", "gradients"])
@quick(15)
@given(data=st.data())
def test_a_run_among_hostile_clients_has_the_ledger_of_one_without(
    silent: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    run = start(tmp_path_factory.mktemp("hostile"), SPECS[name])
    old: list[bytes] = []

    def tamper(round_: int, client: int, right: bytes) -> list[bytes]:
        if client % 2 == 0:
            return [right]
        old.append(right)
        sent = [data.draw(edits(right)), data.draw(st.sampled_from(old))]
        message = decode(right)
        if isinstance(message, Contribution):
            sent.append(data.draw(contributions(message)))
        return list(filter(lambda one: _hostile(run.coordinator.spec, right, one), sent))

    assert run.finish(tamper) == silent[name]
    assert rounds_of(run.ledger)[-1].clients == (0, 2)


def _hostile(spec: RunSpec, right: bytes, data: bytes) -> bool:
    """Whether a reply is none that may be taken."""
    try:
        message = decode(data)
    except ProtocolError:
        return True
    return not (isinstance(message, Contribution) and _right(spec, right, message))


# -- the handshake

VALUES = st.one_of(
    st.text(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.binary(), st.none(),
    st.lists(st.text()), st.sampled_from(["\x1b[2J", "a\nb", "\u202e", "x" * 100_000, "nf4", "\x9b31m", "\ud800"]),
)  # fmt: skip


@quick(300)
@given(data=st.data())
def test_a_hello_is_right_or_refused_in_words_fit_for_a_terminal(opened: dict[str, Open], data: st.DataObject) -> None:
    one = opened["plain"]
    one.reset()
    server, spec = one.run.coordinator, one.run.coordinator.spec
    right = one.run.workers[data.draw(st.integers(0, 3))].hello()
    names = data.draw(st.lists(st.sampled_from([stated.name for stated in dataclasses.fields(Hello)]), max_size=3))
    hello = dataclasses.replace(right, **{name: data.draw(VALUES) for name in names})
    server._greeted.clear()
    try:
        server.admit(hello)
    except ProtocolError as error:
        text = str(error)
        assert text.isascii() and text.isprintable() and len(text) < 500
        assert not server._greeted and set(server.members) == set(range(4))
        return
    assert all(type(getattr(hello, stated.name)) is stated.type for stated in dataclasses.fields(Hello))
    assert (hello.fingerprint, hello.space_hash, hello.theta0) == (spec.fingerprint, spec.space_hash, spec.theta0)
    kept = server._greeted.pop(hello.client)
    assert 0 <= hello.client < 4 and set(kept) == {"quantisation", "compute_dtype", "examples"}
    assert len(kept["quantisation"]) <= 16 and len(kept["compute_dtype"]) <= 16 and 0 < kept["examples"] < 2**32


@quick(200)
@given(VALUES | st.recursive(VALUES, st.lists), st.integers(1, 100))
def test_what_others_chose_is_shown_on_one_line_of_ascii(value: object, length: int) -> None:
    text = shown(value, length)
    assert text.isascii() and text.isprintable() and len(text) <= length + 3


def test_a_name_of_a_base_is_shown_escaped_in_a_hint(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec(space="scales"), clients=[])
    hello = make_worker(run.coordinator.spec, 0).hello()
    with pytest.raises(ProtocolError, match=r"this client's is '\\x1b\[2J': load the run's"):
        run.coordinator.admit(dataclasses.replace(hello, space_hash="6" * 64, quantisation="\x1b[2J"))


# -- Flower's nodes

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["\x1b[2J", "a\nfedzo: b", "\u202e", "x" * 9_000]
)
FIELD = st.one_of(
    TEXT, st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.binary(max_size=80),
    *(st.lists(one, max_size=3) for one in (TEXT, st.integers(0, 9), st.binary(max_size=9))),
)  # fmt: skip
NAMES = [stated.name for stated in dataclasses.fields(Hello)]
KEYS = st.sampled_from(["answer", "wants", "offset", "refused", "greet", "resident", "plan", *NAMES]) | TEXT


@pytest.fixture(scope="module")
def flower() -> dict[str, Any]:
    """What of Flower and of the server the test below needs."""
    flwr = pytest.importorskip("flwr.app")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # server/ is not part of the installed package
    from grids import ProcessGrid

    from server.nodes import Nodes

    def records(right: dict[str, Any]) -> st.SearchStrategy[Any]:
        """A right record with fields replaced, added or taken away, another one, or an error."""
        changed = st.dictionaries(KEYS, FIELD, max_size=3).map(lambda more: right | more)
        taken = st.sets(st.sampled_from(sorted(right)), max_size=2).map(
            lambda names: {name: value for name, value in right.items() if name not in names}
        )
        made = (changed | taken | st.dictionaries(KEYS, FIELD, max_size=3)).map(flwr.ConfigRecord)
        other = st.sampled_from([flwr.MetricRecord({"answer": 1.5}), flwr.ArrayRecord()])
        contents = st.dictionaries(st.just("fedzo") | TEXT, made | other, max_size=2).map(flwr.RecordDict)
        return contents | st.builds(flwr.Error, st.integers(0, 2**31 - 1), TEXT)

    class Grid(ProcessGrid):
        """Nodes 0 to 3 are the clients of a tiny run, of which the odd ones answer plans as strangers answer all."""

        def __init__(self, run: Federation, strangers: int, draw: Callable[..., Any]) -> None:
            context = flwr.Context(1, 0, {}, flwr.RecordDict(), {})
            super().__init__(dict.fromkeys([*range(4), *range(10, 10 + strangers)], context))
            self.run_, self.draw, self.count = run, draw, itertools.count()

        def handle(self, message: Any) -> str:
            name, node = str(next(self.count)), message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = name
            record, right = message.content["fedzo"], {"answer": b""}
            if "spec" in record:
                right = vars(self.run_.workers[node % 4].hello())
            elif node % 2 == 0:
                right = {"answer": answer(self.run_.workers[node], record["plan"])}
            wrong = node >= 10 or (node % 2 == 1 and "plan" in record)
            content = self.draw(records(right)) if wrong else flwr.RecordDict({"fedzo": flwr.ConfigRecord(right)})
            self.replies[name] = flwr.Message(content, reply_to=message)
            return name

    return {"grid": Grid, "nodes": Nodes}


@quick(25)
@given(data=st.data())
def test_nodes_that_answer_as_they_like_change_nothing(
    flower: dict[str, Any], silent: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run = start(tmp_path_factory.mktemp("nodes"), SPECS["plain"], clients=[])
    run.workers = {client: make_worker(run.coordinator.spec, client) for client in range(4)}
    grid, said = flower["grid"](run, data.draw(st.integers(0, 4)), data.draw), list[str]()
    nodes = flower["nodes"](grid, run.coordinator, said.append, timeout=5.0, patience=0.0, start=4)
    while not run.coordinator.finished:
        nodes.ready()
        play_round(run.coordinator, Transport(nodes.exchange))
    assert nodes.of == {client: client for client in range(4)}
    assert run.ledger.head == silent["plain"]
    assert all(line.isascii() and line.isprintable() and len(line) < 500 for line in said)


@st.composite
def near(draw: st.DrawFn, value: Any) -> Any:
    """A value of a ConfigRecord, changed a little, or another one."""
    if isinstance(value, bytes) and value and draw(st.booleans()):
        return draw(edits(value))
    if isinstance(value, list) and value and draw(st.booleans()):
        one = draw(st.sampled_from(value))
        changed = draw(edits(one)) if isinstance(one, bytes) else draw(st.integers(-(2**63), 2**63 - 1))
        at = draw(st.integers(0, len(value) - 1))
        return draw(st.sampled_from([value[::-1], value[1:], [*value, one], [*value[:at], changed, *value[at + 1 :]]]))
    return draw(FIELD)


@quick(30)
@given(data=st.data())
def test_clients_that_answer_a_secure_sum_as_they_like_hurt_no_sum_of_others(
    flower: dict[str, Any], data: st.DataObject
) -> None:
    from test_secure_sum import CONFIGS, STAGES, Wire, draw, total

    hostile, vectors = data.draw(st.sets(st.integers(0, 4), min_size=1, max_size=2)), draw(5, limit=1000)
    stages = data.draw(st.sets(st.sampled_from(STAGES), min_size=1))

    def forge(client: int, stage: str, reply: Any) -> Any:
        if client in hostile and stage in stages:
            record = reply.content.config_records[CONFIGS]
            for key in data.draw(st.lists(st.sampled_from(sorted(record)), max_size=2)) if record else []:
                record[key] = data.draw(near(record[key]))
        return reply

    found = Wire(5).sum(vectors, 3, forge)
    if found is not None and not hostile & set(found[0]):
        assert found[1].tolist() == total(vectors, found[0]).tolist() and len(found[0]) >= 3
    if found is not None:
        assert set(found[0]) >= set(range(5)) - hostile


# -- what a client can make the server send or keep


def test_who_is_silent_is_sent_what_it_missed_when_it_asks(tmp_path: Path) -> None:
    spec = make_spec(rounds=30, size=2000)
    run = start(tmp_path, spec)
    for _ in range(12):
        run.round(lambda round_, client, data: [] if client == 1 else [data])
    caught = [run.plans[round_, 1][0].catch_up for round_ in range(12)]
    assert [(one.kind, one.start) for one in caught[:2]] == [("none", 0), ("records", 0)]
    assert all(one.kind == "none" and one.start == one.stop for one in caught[2:])
    run.workers[1] = make_worker(spec, 1)  # it comes back, and is heard at once
    summary = run.round()
    assert not summary.dropped and summary.accepted == 4
    assert [plan.catch_up.start for plan in run.plans[12, 1]] == [12, 0]
    assert run.round().accepted == 4 and [plan.catch_up.start for plan in run.plans[13, 1]] == [12]


def test_who_only_ever_asks_for_the_history_is_sent_it_ever_more_rarely(tmp_path: Path) -> None:
    spec = make_spec(rounds=64, size=2000)
    run = start(tmp_path, spec)

    def ask(round_: int, client: int, data: bytes) -> list[bytes]:
        return [Behind(spec.run_id, round_, client, 0).to_bytes()] * 5 if client == 1 else [data]

    run.finish(ask)
    histories = [round_ for round_ in range(64) for plan in run.plans[round_, 1] if plan.catch_up.records]
    assert histories == [1, 2, 4, 8, 16, 32]
    assert len(run.ledger.summaries()) == 64 and rounds_of(run.ledger)[-1].clients == (0, 2, 3)


@pytest.mark.parametrize("reason", ["digest", "not-finite"])
def test_who_only_ever_fails_is_not_sent_the_history_each_time(tmp_path: Path, reason: Any) -> None:
    spec = make_spec(rounds=20, size=2000)
    run = start(tmp_path, spec)
    run.finish(
        lambda round_, client, data: [Failure(spec.run_id, round_, 1, reason).to_bytes()] if client == 1 else [data]
    )
    assert [round_ for round_ in range(20) if run.plans[round_, 1][0].catch_up.records] == [1]


@pytest.mark.parametrize(("size", "kind"), [(12, "snapshot"), (2000, "records")])
def test_clients_that_stand_apart_share_what_they_are_sent(tmp_path: Path, size: int, kind: str) -> None:
    """A round holds one snapshot, and each round's records once, however many clients are behind."""
    run = start(tmp_path, make_spec(size=size, rounds=20), clients=[0, 1])
    for round_ in range(8):
        run.round(lambda now, client, data, last=round_ < 4: [data] if client == 0 or last else [])
    run.coordinator._vain.clear()
    run.join(2)
    caught = {plan.client: plan.catch_up for plan in run.coordinator.open_round()}
    assert (caught[1].start, caught[2].start, caught[1].kind, caught[2].kind) == (3, 0, kind, kind)
    if kind == "snapshot":
        assert caught[1].snapshot is caught[2].snapshot
    else:
        assert all(a is b for a, b in zip(caught[1].records, caught[2].records[3:], strict=True))
    assert len(rounds_of(run.ledger)) == 8


def test_a_spent_budget_is_believed_of_clients_that_keep_one(tmp_path: Path) -> None:
    for name, believed in (("plain", False), ("client-central", False), ("client-local", True)):
        run = start(tmp_path / name, SPECS[name])
        plans = run.coordinator.open_round()
        run.coordinator.receive(1, Failure(run.coordinator.spec.run_id, 0, 1, "budget").to_bytes())
        assert run.coordinator.close_round().dropped["budget" if believed else "malformed"] == 1
        assert 1 in [plan.client for plan in plans]
        assert (1 in [plan.client for plan in run.coordinator.open_round()]) is not believed


def test_an_answer_of_a_client_that_was_dismissed_is_dropped(tmp_path: Path) -> None:
    run = start(tmp_path, make_spec())
    plan = run.coordinator.open_round()[2]
    right = answer(run.workers[plan.client], plan.to_bytes())
    run.coordinator.dismiss(plan.client)
    ask = Behind(run.coordinator.spec.run_id, 0, plan.client, 0).to_bytes()
    assert run.coordinator.receive(plan.client, right) is run.coordinator.receive(plan.client, ask) is None
    assert run.coordinator.close_round().dropped == {"no-reply": 3, "not-asked": 2}
