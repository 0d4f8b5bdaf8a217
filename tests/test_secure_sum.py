"""The secure sum: its numbers, and Flower's SecAgg+ over an in-process Grid whose messages are written out and read."""

import collections
import hashlib
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzo.errors import ConfigError, ProtocolError, RunError
from fedzo.privacy.secure_sum import LIMIT, MODULUS, MOST_CLIENTS, RANGE, Ints, expand, levels

pytest.importorskip("flwr")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # clients/ and server/ are not part of the installed package

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common import bytes_to_ndarray, ndarray_to_bytes  # noqa: E402
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage  # noqa: E402
from flwr.common.serde import context_from_proto, context_to_proto  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects  # noqa: E402
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: E402
from grids import ProcessGrid  # noqa: E402

from clients import secure as client_side  # noqa: E402
from server import secure as server_side  # noqa: E402

CONFIGS = "secaggplus_configs"
STAGES = Stage.all()
FIRST_NODE = 2**63 + 5  # Flower draws node ids below 2^64
Forge = Callable[[int, str, Message], Message | None]


def honest(client: int, stage: str, reply: Message) -> Message | None:
    return reply


def lost(*where: tuple[int, str]) -> Forge:
    """Clients whose answer to a stage, and to all after it, never comes."""
    gone = dict(where)

    def forge(client: int, stage: str, reply: Message) -> Message | None:
        late = client in gone and STAGES.index(stage) >= STAGES.index(gone[client])
        return None if late else reply

    return forge


def written_and_read(message: Message) -> Message:
    contents = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}
    found = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(found, Message)
    return found


class Wire(ProcessGrid):
    """Calls a ClientApp for every message.

    Args:
        clients: number of nodes, whose contexts last as long as this.
        least: clients below which a node refuses a sum.
    """

    def __init__(self, clients: int, least: int = 2) -> None:
        self.nodes = {client: FIRST_NODE + 7 * client for client in range(clients)}
        super().__init__(
            {
                node: Context(
                    run_id=1, node_id=node, node_config={"partition-id": c}, state=RecordDict(), run_config={}
                )
                for c, node in self.nodes.items()
            }
        )
        self.forge: Forge = honest
        self.tamper: Callable[[int, Message], None] = lambda client, message: None
        self.ids = itertools.count()
        self.errors: list[str] = []
        self.seen = collections.defaultdict[str, dict[int, Message]](dict)  # stage -> client -> answer
        self.app = ClientApp()

        @self.app.train(mods=[client_side.mod(lambda _: least)])
        def add(message: Message, context: Context) -> Message:
            return client_side.reply(message, client_side.take(message, context))

    def hold(self, vectors: Mapping[int, Ints], round_: int = 0) -> None:
        for client, vector in vectors.items():
            client_side.hold(self.contexts[self.nodes[client]], round_, vector)

    def sum(
        self, vectors: Mapping[int, Ints], threshold: int = 3, forge: Forge = honest, round_: int = 0
    ) -> tuple[tuple[int, ...], Ints] | None:
        """A secure sum of vectors int64 [d] over all the nodes."""
        self.hold(vectors, round_)
        self.forge = forge
        self.errors.clear()
        self.seen.clear()
        return server_side.secure_sum(self, self.nodes, round_, threshold, 0.05, len(vectors[0]))

    def masked(self) -> dict[int, Ints]:
        """What the server was sent by each client as its vector."""
        found = {}
        for client, message in self.seen[Stage.COLLECT_MASKED_VECTORS].items():
            _, data = message.content.config_records[CONFIGS][Key.MASKED_PARAMETERS]
            found[client] = bytes_to_ndarray(data)
        return found

    def handle(self, message: Message) -> str:
        name, node = str(next(self.ids)), message.metadata.dst_node_id
        received = written_and_read(message)
        received.metadata.__dict__["_message_id"] = name
        client = int(self.contexts[node].node_config["partition-id"])
        self.tamper(client, received)
        stage = str(received.content.config_records[CONFIGS][Key.STAGE])
        context = context_from_proto(context_to_proto(self.contexts[node]))
        try:
            reply = written_and_read(self.app(received, context))
            self.contexts[node] = context_from_proto(context_to_proto(context))  # as Flower keeps it: not after errors
        except Exception as error:
            self.errors.append(str(error))
            reply = Message(Error(code=0, reason=str(error)), reply_to=received)
        if reply.has_content():
            self.seen[stage][client] = reply
        forged = self.forge(client, stage, reply) if reply.has_content() else reply
        if forged is not None:
            self.replies[name] = forged
        return name


def draw(clients: int, size: int = 9, seed: int = 0, limit: int = LIMIT) -> dict[int, Ints]:
    generator = np.random.default_rng(seed)
    return {c: generator.integers(-limit, limit, size, endpoint=True) for c in range(clients)}


def total(vectors: Mapping[int, Ints], clients: Iterable[int]) -> Ints:
    found: Ints = np.sum([vectors[c] for c in clients], axis=0)
    return found


def agrees(found: tuple[tuple[int, ...], Ints] | None, vectors: Mapping[int, Ints], clients: Iterable[int]) -> bool:
    assert found is not None
    assert found[1].dtype == np.int64
    return found[0] == tuple(clients) and np.array_equal(found[1], total(vectors, clients))


# Numbers


def test_a_masks_bits_are_pinned() -> None:
    factor, vector = expand(bytes(range(32)), MODULUS, [(1,), (3,)])
    assert (factor.shape, vector.shape, vector.dtype) == ((1,), (3,), np.int64)
    again = expand(bytes(range(32)), MODULUS, [(1,), (2, 2), ()])
    assert again[0] == factor and np.array_equal(again[1].reshape(-1)[:3], vector) and again[2].shape == ()
    head = b"fedzo secure sum: mask" + (32).to_bytes(8, "little") + bytes(range(32)) + (1).to_bytes(8, "little")
    stream = hashlib.shake_256(head).digest(24)
    assert vector.tolist() == [int.from_bytes(stream[8 * i : 8 * i + 8], "little") % MODULUS for i in range(3)]


def test_every_bit_of_the_secret_matters() -> None:
    seed = bytes(range(44))
    plain = expand(seed, MODULUS, [(4,)])[0]
    for bit in range(8 * len(seed)):
        changed = bytearray(seed)
        changed[bit // 8] ^= 1 << bit % 8
        assert not np.array_equal(expand(bytes(changed), MODULUS, [(4,)])[0], plain)
    # Flower's own folds by exclusive or: the same 32 bits twice are none.
    twice = bytes([1, 2, 3, 4]) * 8, bytes([9, 9, 9, 9]) * 8
    assert not np.array_equal(*(expand(seed, MODULUS, [(4,)])[0] for seed in twice))


@pytest.mark.parametrize("modulus", [1, 2, 2**8, MODULUS, 2**63])
def test_masks_are_uniform(modulus: int) -> None:
    (drawn,) = expand(b"k" * 32, modulus, [(40_000,)])
    assert drawn.min() >= 0 and int(drawn.max()) < modulus
    cells = min(modulus, 64)
    counts = np.bincount((drawn // (modulus // cells)).astype(np.int64), minlength=cells)
    expected = drawn.size / cells
    assert ((counts - expected) ** 2 / expected).sum() < cells + 6.0 * np.sqrt(2.0 * cells) + 1.0


@pytest.mark.parametrize(
    ("seed", "modulus"), [(b"k" * 15, MODULUS), (b"k" * 32, 3), (b"k" * 32, 0), (b"k" * 32, 2**64)]
)
def test_masks_of_weak_secrets_are_refused(seed: bytes, modulus: int) -> None:
    with pytest.raises(ValueError, match="wanted"):
        expand(seed, modulus, [(1,)])


@given(st.floats(0.0, 10_000.0), st.integers(3, MOST_CLIENTS))
@settings(max_examples=200, deadline=None)
def test_levels_are_the_finest_that_fit(share: float, clients: int) -> None:
    found = levels(share, clients)
    assert found & (found - 1) == 0 and 16 <= found <= 2**20
    assert found + 12.0 * share * found <= LIMIT
    assert found == 2**20 or 2 * found + 12.0 * share * 2 * found > LIMIT


def test_levels_that_there_are_none_of() -> None:
    assert levels(1.0 / 12.0, 10) == 2**20  # exactly fits
    with pytest.raises(ConfigError, match="too large for secure aggregation"):
        levels(11_000.0, 10)
    for clients in (2, MOST_CLIENTS + 1):
        with pytest.raises(ConfigError, match=r"federation\.clients_per_round"):
            levels(0.1, clients)


def test_the_most_clients_do_not_wrap_around() -> None:
    assert MOST_CLIENTS * RANGE < MODULUS <= (MOST_CLIENTS + 1) * RANGE
    assert MOST_CLIENTS >= 1000


# The protocol


def test_sums_are_exact() -> None:
    wire, vectors = Wire(5), draw(5)
    vectors[0][:3], vectors[1][:3] = (-LIMIT, LIMIT, 0), (-LIMIT, LIMIT, -1)  # the extremes, of each sign
    assert agrees(wire.sum(vectors), vectors, range(5))
    assert wire.errors == []


def test_sums_of_extremes() -> None:
    for value in (-LIMIT, LIMIT):
        vectors = {c: np.full(2, value, dtype=np.int64) for c in range(7)}
        assert agrees(Wire(7).sum(vectors, 5), vectors, range(7))


@pytest.mark.parametrize("clients", [3, 4, 6])
def test_all_must_stay_when_all_are_asked_for(clients: int) -> None:
    vectors = draw(clients, 3)
    assert agrees(Wire(clients, clients).sum(vectors, clients), vectors, range(clients))
    assert Wire(clients).sum(vectors, clients, lost((1, Stage.COLLECT_MASKED_VECTORS))) is None
    assert Wire(clients).sum(vectors, clients, lost((1, Stage.UNMASK))) is None


@pytest.mark.parametrize("stage", [Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS])
def test_clients_that_are_lost_before_their_vectors_come(stage: str) -> None:
    wire, vectors = Wire(5), draw(5)
    assert agrees(wire.sum(vectors, 3, lost((3, stage))), vectors, (0, 1, 2, 4))
    wire = Wire(5)
    assert agrees(wire.sum(vectors, 3, lost((0, stage), (4, stage))), vectors, (1, 2, 3))


def test_clients_that_are_lost_at_every_stage() -> None:
    vectors, where = draw(7), lost(*zip((5, 1, 3, 6), STAGES, strict=True))
    assert agrees(Wire(7).sum(vectors, 3, where), vectors, (0, 2, 4, 6))


def test_who_is_lost_after_its_vector_came_is_in_the_sum() -> None:
    vectors = draw(5)
    assert agrees(Wire(5).sum(vectors, 3, lost((2, Stage.UNMASK))), vectors, range(5))
    both = lost((2, Stage.UNMASK), (0, Stage.COLLECT_MASKED_VECTORS))
    assert agrees(Wire(5).sum(vectors, 3, both), vectors, (1, 2, 3, 4))


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_unmasked_when_too_few_remain(stage: str) -> None:
    wire = Wire(5)
    assert wire.sum(draw(5), 3, lost((0, stage), (1, stage), (2, stage))) is None
    later = STAGES[STAGES.index(stage) + 1 :]
    assert not any(wire.seen[name] for name in later)


def test_again_with_what_the_clients_kept() -> None:
    wire, vectors = Wire(4), draw(4)
    assert agrees(wire.sum(vectors), vectors, range(4))
    assert all(len(context.state) == 0 for context in wire.contexts.values())  # neither vector nor secret
    assert wire.sum(vectors, 3, lost((0, Stage.SHARE_KEYS), (1, Stage.SHARE_KEYS)), 1) is None  # abandoned half-way
    more = draw(4, seed=1)
    assert agrees(wire.sum(more, round_=2), more, range(4))


def test_the_server_sees_masked_vectors_only() -> None:
    size = 4096
    vectors = {c: np.full(size, 7 * c - 5, dtype=np.int64) for c in range(4)}
    seen = []
    for _ in range(2):
        wire = Wire(4)
        assert agrees(wire.sum(vectors), vectors, range(4))
        seen.append(wire.masked())
        for client, vector in vectors.items():
            for answers in wire.seen.values():
                message = answers[client]
                assert not any(message.content.array_records.values())
                sent = b"".join(thing.deflate() for thing in get_all_nested_objects(message).values())
                for plain in (vector, vector + LIMIT):
                    for dtype in (np.int32, np.int64, np.float64):
                        assert plain[:4].astype(dtype).tobytes() not in sent
    for client in vectors:
        one, two = seen[0][client], seen[1][client]
        assert (one != two).mean() > 0.99
        # All bits of the masked entries are fair coins, alone and between rounds and clients: six deviations.
        others = [np.zeros_like(one), two, seen[0][(client + 1) % 4]]
        for other in others:
            bits = (one ^ other)[:, None] >> np.arange(32) & 1
            assert np.abs(bits.mean(axis=0) - 0.5).max() < 6.0 * 0.5 / np.sqrt(size)


def test_no_mask_comes_from_flowers_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(*_: object) -> None:
        raise AssertionError("a Mersenne Twister")

    vectors = draw(4)
    for name in (client_side._MOD, server_side._WORKFLOW):
        original = importlib.import_module("flwr.common.secure_aggregation.secaggplus_utils").pseudo_rand_gen
        monkeypatch.setattr(importlib.import_module(name), "pseudo_rand_gen", original)  # as freshly imported
    monkeypatch.setattr(np.random, "RandomState", weak)
    assert agrees(Wire(4).sum(vectors, 3, lost((1, Stage.COLLECT_MASKED_VECTORS))), vectors, (0, 2, 3))


@pytest.mark.parametrize("side", [client_side._MOD, server_side._WORKFLOW])
def test_another_flower_is_refused(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(side)
    server = side == server_side._WORKFLOW
    with monkeypatch.context() as patch:
        patch.delattr(module, "pseudo_rand_gen")  # renamed
        _refused(server)
    with monkeypatch.context() as patch:
        patch.setattr(module, "pseudo_rand_gen", lambda *_: [])  # not what it was
        _refused(server)
    with monkeypatch.context() as patch:  # there still, but not what is used
        if server:
            patch.setattr(module.SecAggPlusWorkflow, "unmask_stage", lambda *_: True)
        else:
            patch.setattr(module, "_collect_masked_vectors", lambda *_: {})
        _refused(server)
    vectors = draw(3)
    assert agrees(Wire(3).sum(vectors), vectors, range(3))


def _refused(server: bool) -> None:
    wire = Wire(3)
    if server:
        with pytest.raises(RunError, match=r"install flwr 1\.41"):
            wire.sum(draw(3))
        assert not wire.seen
    else:
        assert wire.sum(draw(3)) is None
        assert not wire.seen and len(wire.errors) == 3
        assert all("install flwr 1.41" in told for told in wire.errors)


@pytest.mark.parametrize(("clients", "threshold"), [(0, 2), (2, 2), (3, 1), (3, 0), (3, 4), (MOST_CLIENTS + 1, 9)])
def test_sums_that_cannot_be(clients: int, threshold: int) -> None:
    with pytest.raises(RunError, match="wanted"):
        server_side.secure_sum(Wire(0), {c: c for c in range(clients)}, 0, threshold, 1.0, 4)


@pytest.mark.parametrize(
    "vector",
    [
        np.array([LIMIT + 1]), np.array([0, -LIMIT - 1]), np.array([np.iinfo(np.int64).min]),
        np.zeros((1, 1), np.int64), np.array([0.5]), np.array([np.nan]),
    ],
)  # fmt: skip
def test_a_vector_that_does_not_fit_is_not_sent(vector: Any) -> None:
    Wire(0)
    message = Message(RecordDict(), 5, "train")
    with pytest.raises(ProtocolError, match="a vector for the secure sum"):
        client_side.reply(message, vector)


def test_who_cannot_send_its_vector_is_lost() -> None:
    wire, vectors = Wire(5), draw(5)
    beyond = vectors | {2: np.full(9, LIMIT + 12345)}
    assert agrees(wire.sum(beyond), vectors, (0, 1, 3, 4))
    assert len(wire.errors) == 1 and "beyond +-2097152" in wire.errors[0] and str(LIMIT + 12345) not in wire.errors[0]


def test_an_error_tells_the_server_its_kind_only() -> None:
    def fails(_: Context) -> int:
        raise ValueError("a review that nobody may read")

    wire = Wire(0)
    message = Message(RecordDict({CONFIGS: ConfigRecord({Key.STAGE: Stage.SETUP})}), 5, "train")
    context = Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(RuntimeError) as error:
        client_side.mod(fails)(message, context, wire.app)
    assert str(error.value) == "the client left the secure sum: ValueError"
    assert error.value.__suppress_context__


def test_a_vector_is_given_once_and_for_its_round() -> None:
    wire, vectors = Wire(4), draw(4)
    wire.hold(vectors, 6)
    assert server_side.secure_sum(wire, wire.nodes, 5, 3, 0.05, 9) is None
    assert len(wire.errors) == 4 and "no vector is held" in wire.errors[0]
    wire.errors.clear()
    assert agrees(wire.sum(vectors, round_=6), vectors, range(4))
    assert server_side.secure_sum(wire, wire.nodes, 6, 3, 0.05, 9) is None
    assert len(wire.errors) == 4 and "no vector is held" in wire.errors[0]


# Clients that break the protocol


def test_answers_that_do_not_fit_lose_their_client() -> None:
    def garble(client: int, stage: str, reply: Message) -> Message | None:
        record = reply.content.config_records[CONFIGS]
        if (client, stage) == (0, Stage.SETUP):
            record[Key.PUBLIC_KEY_1] = b"no key"
        if (client, stage) == (1, Stage.SHARE_KEYS):
            record[Key.CIPHERTEXT_LIST] = record[Key.CIPHERTEXT_LIST][1:]
        if (client, stage) == (2, Stage.COLLECT_MASKED_VECTORS):
            factor, _ = record[Key.MASKED_PARAMETERS]
            record[Key.MASKED_PARAMETERS] = [factor, ndarray_to_bytes(np.zeros(1, dtype=np.int64))]
        if (client, stage) == (3, Stage.COLLECT_MASKED_VECTORS):
            reply.content = RecordDict({CONFIGS: record})
        if (client, stage) == (4, Stage.UNMASK):
            record[Key.NODE_ID_LIST] = [5]
        return reply

    vectors = draw(9)
    assert agrees(Wire(9).sum(vectors, 3, garble), vectors, (4, 5, 6, 7, 8))


def test_shares_that_make_no_secret_reveal_nothing() -> None:
    def garble(client: int, stage: str, reply: Message) -> Message | None:
        if (client, stage) == (2, Stage.UNMASK):
            record = reply.content.config_records[CONFIGS]
            record[Key.SHARE_LIST] = [bytes(len(share)) for share in record[Key.SHARE_LIST]]
        return reply

    assert Wire(4).sum(draw(4), 3, garble) is None


def test_a_sum_that_cannot_be_of_such_vectors_is_refused() -> None:
    def garble(client: int, stage: str, reply: Message) -> Message | None:
        if (client, stage) == (2, Stage.COLLECT_MASKED_VECTORS):
            record = reply.content.config_records[CONFIGS]
            factor, data = record[Key.MASKED_PARAMETERS]
            moved = bytes_to_ndarray(data) + MODULUS // 2 & MODULUS - 1
            record[Key.MASKED_PARAMETERS] = [factor, ndarray_to_bytes(moved)]
        return reply

    assert Wire(4).sum(draw(4, limit=100), 3, garble) is None


# Servers that break the protocol


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (Key.MOD_RANGE, 1), (Key.MOD_RANGE, 2**40), (Key.CLIPPING_RANGE, 8.0), (Key.TARGET_RANGE, 2**31),
        (Key.MAX_WEIGHT, 2.0), (Key.THRESHOLD, 2), (Key.SHARE_NUMBER, 3), (Key.SAMPLE_NUMBER, 2),
    ],
)  # fmt: skip
def test_clients_refuse_other_terms(key: str, value: Any) -> None:
    wire = Wire(4, least=3)

    def tamper(client: int, message: Message) -> None:
        record = message.content.config_records[CONFIGS]
        if record[Key.STAGE] == Stage.SETUP:
            record[key] = value

    wire.tamper = tamper
    assert wire.sum(draw(4)) is None
    assert len(wire.errors) == 4 and not wire.seen


def test_clients_refuse_to_tell_both_secrets() -> None:
    def twice(client: int, message: Message) -> None:
        record = message.content.config_records[CONFIGS]
        if record[Key.STAGE] == Stage.UNMASK:
            record[Key.DEAD_NODE_ID_LIST] = list(record[Key.ACTIVE_NODE_ID_LIST])[:1]

    def left_out(client: int, message: Message) -> None:
        record = message.content.config_records[CONFIGS]
        if record[Key.STAGE] == Stage.UNMASK:
            own = FIRST_NODE + 7 * client
            record[Key.ACTIVE_NODE_ID_LIST] = [n for n in record[Key.ACTIVE_NODE_ID_LIST] if n != own]
            record[Key.DEAD_NODE_ID_LIST] = [own]

    for tamper in (twice, left_out):
        wire = Wire(5)
        wire.tamper = tamper
        assert wire.sum(draw(5)) is None
        assert not wire.seen[Stage.UNMASK] and len(wire.errors) == 5


def test_no_way_around_the_mask() -> None:
    """Flower brings "train.default" to the function of "train", and its mod lets that pass."""
    wire, vectors = Wire(3), draw(3)
    wire.hold(vectors)
    node = wire.nodes[1]
    for kind, content in (
        ("train.default", RecordDict()),
        ("train.default", RecordDict({CONFIGS: ConfigRecord({Key.STAGE: Stage.COLLECT_MASKED_VECTORS})})),
        ("train", RecordDict()),
        ("train", RecordDict({CONFIGS: ConfigRecord({Key.STAGE: Stage.COLLECT_MASKED_VECTORS})})),
    ):
        message = Message(content, node, kind, group_id="0")
        with pytest.raises(RuntimeError, match="the client left the secure sum"):
            wire.app(message, wire.contexts[node])
    kept = client_side.take(Message(RecordDict(), node, "train", group_id="0"), wire.contexts[node])
    assert np.array_equal(kept, vectors[1])


def test_late_clients_cost_the_time_once() -> None:
    wire, vectors = Wire(4), draw(4)
    wire.hold(vectors)
    wire.forge = lost((0, Stage.SETUP))
    start = time.monotonic()
    assert agrees(server_side.secure_sum(wire, wire.nodes, 0, 3, 0.5, 9), vectors, (1, 2, 3))
    assert 0.5 < time.monotonic() - start < 1.5
