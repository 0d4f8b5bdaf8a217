"""Messages: what comes out of bytes is what went in, and no other bytes are believed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedzo.errors import ProtocolError
from fedzo.federation.artifact import artifact_name, pack_values, unpack_values
from fedzo.federation.messages import (
    Behind,
    CatchUp,
    Contribution,
    Failure,
    Held,
    Message,
    Plan,
    RoundRecords,
    decode,
    max_contribution_bytes,
)
from fedzo.federation.spec import PROTOCOL

UINT32 = st.integers(0, 2**32 - 1)
FLOAT32 = st.floats(width=32)
HEAD = {"run_id": st.binary(min_size=8, max_size=8), "round": UINT32, "client": UINT32}


def _seeds(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.uint64, shape, elements=st.integers(0, 2**64 - 1))


def _scalars(shape: tuple[int, int]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=FLOAT32)


def _gradients(steps: int) -> st.SearchStrategy[np.ndarray | None]:
    return st.none() | st.integers(1, 4).flatmap(lambda entries: _scalars((steps, entries)))


SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 4))


@st.composite
def contributions(draw: st.DrawFn) -> Contribution:
    shape = draw(SHAPES)
    fields = {name: draw(strategy) for name, strategy in HEAD.items()}
    arrays = {"seeds": draw(_seeds(shape)), "scalars": draw(_scalars(shape)), "gradients": draw(_gradients(shape[0]))}
    return Contribution(**fields, **arrays, examples=draw(UINT32), loss=draw(FLOAT32))


@st.composite
def private_contributions(draw: st.DrawFn) -> Contribution:
    shape = draw(SHAPES)
    fields = {name: draw(strategy) for name, strategy in HEAD.items()}
    counts = draw(hnp.arrays(np.float32, st.integers(0, 3), elements=FLOAT32))
    return Contribution(
        **fields, seeds=draw(_seeds(shape)), scalars=draw(_scalars(shape)), examples=None, loss=None, counts=counts
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    fields = {name: draw(strategy) for name, strategy in HEAD.items()}
    kind = draw(st.sampled_from(["none", "records", "snapshot"]))
    shapes = draw(st.lists(SHAPES, max_size=4)) if kind == "records" else []
    return Plan(
        **fields,
        seeds=draw(_seeds(draw(SHAPES))),
        eps=draw(st.floats(1e-12, 1e3)),
        batch_size=draw(UINT32),
        digest=draw(st.binary(min_size=32, max_size=32)),
        catch_up=CatchUp(
            kind,
            draw(UINT32),
            fields["round"],  # a catch-up always ends at the plan's round
            tuple(
                RoundRecords(draw(_seeds(shape)), draw(_scalars(shape)), draw(_gradients(shape[0]))) for shape in shapes
            ),
            draw(st.binary(max_size=40)) if kind == "snapshot" else b"",
        ),
        initial=draw(st.binary(max_size=40)),
    )


MESSAGES = st.one_of(
    contributions(),
    private_contributions(),
    plans(),
    st.builds(Held, **HEAD),
    st.builds(Behind, **HEAD, applied=UINT32),
    st.builds(Failure, **HEAD, reason=st.sampled_from(["digest", "not-finite", "budget"])),
)


def _same(a: object, b: object) -> bool:
    """Equality that looks into arrays, and at the bits of floats."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(_same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


@settings(deadline=None)
@given(MESSAGES)
def test_a_message_survives_the_wire(message: Message) -> None:
    assert _same(decode(message.to_bytes()), message)


@settings(deadline=None, max_examples=60)
@given(MESSAGES)
def test_every_truncation_is_refused(message: Message) -> None:
    data = message.to_bytes()
    for length in range(len(data)):
        with pytest.raises(ProtocolError):
            decode(data[:length])
    with pytest.raises(ProtocolError):
        decode(data + b"\0")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([b"", *(b"fz" + bytes([PROTOCOL, kind]) for kind in range(9))]))
def test_random_bytes_are_a_message_or_a_protocol_error(data: bytes, start: bytes) -> None:
    try:
        message = decode(start + data)
    except ProtocolError:
        return
    assert isinstance(message, Message)


def test_sizes_are_what_the_documentation_states() -> None:
    """20 bytes of head; a contribution is 32 + 12 K P, a plan 89 + 8 K P and its catch-up, 7 + 12 K R a round."""
    for steps, queries in ((1, 1), (1, 8), (4, 2)):
        seeds, scalars = np.ones((steps, queries), np.uint64), np.ones((steps, queries), np.float32)
        sent = Contribution(bytes(8), 0, 0, seeds, scalars, 1, 0.5)
        assert len(sent.to_bytes()) == max_contribution_bytes(steps, queries) == 32 + 12 * steps * queries
        records = RoundRecords(seeds, scalars)
        gradients = np.ones((steps, 5), np.float32)
        both = dataclasses.replace(sent, gradients=gradients), dataclasses.replace(records, gradients=gradients)
        assert len(both[0].to_bytes()) == max_contribution_bytes(steps, queries, entries=5)
        assert len(both[0].to_bytes()) - len(sent.to_bytes()) == both[1].nbytes - records.nbytes == 4 + 4 * steps * 5
        assert len(both[1].to_bytes()) == both[1].nbytes
        assert len(records.to_bytes()) == records.nbytes == 7 + 12 * steps * queries
        for caught, size in ((CatchUp("none", 1, 1), 0), (CatchUp("records", 0, 1, (records,)), records.nbytes)):
            plan = Plan(bytes(8), 1, 0, seeds, 0.1, 4, bytes(32), caught)
            assert len(plan.to_bytes()) == 89 + 8 * steps * queries + size
    assert len(Behind(bytes(8), 0, 0, 0).to_bytes()) == 24
    assert len(Failure(bytes(8), 0, 0, "digest").to_bytes()) == 21


def test_bytes_are_little_endian() -> None:
    seeds = np.array([[0x0102030405060708]], np.uint64)
    data = Contribution(b"abcdefgh", 258, 3, seeds, np.array([[1.0]], np.float32), 4, 1.0).to_bytes()
    assert data.hex() == (
        "667a" "05" "02" + b"abcdefgh".hex() + "02010000" "03000000"
        "0100" "0100" "04000000" "0000803f" "0807060504030201" "0000803f"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"no" + bytes(30), "not a message"),
        (b"fz\1\1" + bytes(30), "protocol version 1, wanted 5"),
        (b"fz\5\x09" + bytes(30), "unknown kind of message 9"),
        (b"fz\5\4" + bytes(16) + b"\7", "unknown reason of failure 7"),
        (b"fz\5\2" + bytes(16) + b"\xff" * 12, "scalars of 0 bytes"),  # claims 65535 x 65535 scalars
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        decode(data)


def test_records_that_claim_more_than_there_is_are_refused() -> None:
    plan = Plan(bytes(8), 1, 0, np.ones((1, 1), np.uint64), 0.1, 4, bytes(32), CatchUp("snapshot", 0, 1))
    body = b"\xff\xff\xff\xff\xff\x7f\x01" + bytes(20)
    forged = dataclasses.replace(plan, catch_up=CatchUp("snapshot", 0, 1, snapshot=body)).to_bytes()
    kind_at = 20 + 2 + 2 + 8 + 8 + 4 + 32
    assert forged[kind_at] == 2
    with pytest.raises(ProtocolError, match="records of 20 bytes"):
        decode(forged[:kind_at] + b"\1" + forged[kind_at + 1 :])


# -- artifacts


def test_initial_values_survive_the_wire_and_touch_nothing_else() -> None:
    import torch

    theta = torch.arange(10, dtype=torch.float32)
    data = pack_values(theta, [(2, 3), (9, 1)])
    assert len(data) == 4 + 2 * 16 + 4 * 4
    other = torch.full((10,), -1.0)
    unpack_values(data, other)
    assert other.tolist() == [-1, -1, 2, 3, 4, -1, -1, -1, -1, 9]
    assert len(artifact_name(data)) == 64

    for wrong in (*(data[:length] for length in range(len(data))), data + b"\0", b"\xff" * 40):
        untouched = torch.full((10,), -1.0)
        with pytest.raises(ProtocolError):
            unpack_values(wrong, untouched)
        assert (untouched == -1).all()
    with pytest.raises(ProtocolError, match="outside theta of 9"):
        unpack_values(data, torch.zeros(9))
