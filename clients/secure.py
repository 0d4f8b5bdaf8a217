"""A client's side of the secure sum: Flower's SecAgg+ mod with masks that cannot be searched for.

The server is trusted to follow the protocol and to give each client the others' public keys; all the rest is checked
here: a client takes part only with the numbers of `fedzo.privacy.secure_sum`, in a sum of enough clients, and never
tells for the same client both what removes its own mask and what removes those of its pairs.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.common.secure_aggregation import secaggplus_utils
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE, Key, Stage
from flwr.compat.common.recorddict_compat import fitres_to_recorddict

from fedzo.errors import FedzoError, ProtocolError, RunError
from fedzo.privacy.mechanisms import Ints
from fedzo.privacy.secure_sum import LEAST_CLIENTS, LIMIT, MODULUS, MOST_CLIENTS, RANGE, install

RECORD = "fedzo.secure-sum"  # of the client's state: the vector that waits for its sum
_MOD = "flwr.client.mod.secure_aggregation.secaggplus_mod"

_log = logging.getLogger("fedzo.client")


def hold(context: Context, round_: int, vector: Ints) -> None:
    """Keeps a vector int64 [d] in the client's state until its sum; one that waits there already is forgotten."""
    data = vector.astype("<i8").tobytes()
    context.state.config_records[RECORD] = ConfigRecord({"round": round_, "vector": data})


def take(message: Message, context: Context) -> Ints:
    """The vector that is held for a message's round, once: two sums of different clients would tell it.

    Raises:
        ProtocolError: none is held, or another round's.
    """
    held = context.state.config_records.pop(RECORD, None)
    if held is None or str(held["round"]) != message.metadata.group_id:
        raise ProtocolError("no vector is held for this round's secure sum")
    data = held["vector"]
    assert isinstance(data, bytes)
    return np.frombuffer(data, dtype="<i8").astype(np.int64)


def reply(message: Message, vector: Ints) -> Message:
    """The answer of the function that the mod is around, for the mod to mask.

    Args:
        vector: int64 [d] of magnitudes up to LIMIT.

    Raises:
        ProtocolError: it is none of these.
    """
    if vector.ndim != 1 or vector.dtype != np.int64:
        raise ProtocolError(f"a vector for the secure sum is {vector.dtype} {list(vector.shape)}, wanted int64 [d]")
    if vector.size and (vector.min() < -LIMIT or vector.max() > LIMIT):
        raise ProtocolError(f"a vector for the secure sum has entries beyond +-{LIMIT}")
    # In float64 whole numbers of this size pass Flower's clipping and rounding as they are.
    parameters = ndarrays_to_parameters([vector.astype(np.float64)])
    return Message(fitres_to_recorddict(FitRes(Status(Code.OK, ""), parameters, 1, {}), False), reply_to=message)


def mod(least: Callable[[Context], int]) -> Mod:
    """Flower's SecAgg+ mod, to be put around the function of message type "train" and nothing else.

    Args:
        least: of a client's context, the least number of clients that it gives its vector to a sum of.

    Returns:
        A mod that raises RuntimeError, whose text Flower sends to the server: it holds no data.
    """

    def secure(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            return _answer(message, context, call_next, least)
        except Exception as error:
            told = str(error) if isinstance(error, FedzoError) else type(error).__name__
            _log.error("secure sum: %s", told)
            raise RuntimeError(f"the client left the secure sum: {told}") from None

    return secure


def _answer(
    message: Message, context: Context, call_next: ClientAppCallable, least: Callable[[Context], int]
) -> Message:
    flower = _installed()
    # Flower brings "train.default" to the same function, but its mod would let that pass, and the vector unmasked.
    if message.metadata.message_type != "train":
        raise ProtocolError(f'a message of type "{message.metadata.message_type}", wanted "train"')
    asked = message.content.config_records.get(RECORD_KEY_CONFIGS, ConfigRecord())
    stage = asked.get(Key.STAGE)
    if stage == Stage.SETUP:
        _check_setup(asked, least(context))
    elif stage == Stage.UNMASK:
        _check_unmask(asked, context)
    answer: Message = flower.secaggplus_mod(message, context, call_next)
    if stage == Stage.COLLECT_MASKED_VECTORS and any(answer.content.array_records.values()):
        raise RunError("this version of Flower leaves the vector in the answer, beside the masked one")
    if stage == Stage.UNMASK:
        del context.state.config_records[RECORD_KEY_STATE]  # the secrets of this sum, which nobody needs any more
    return answer


def _check_setup(asked: ConfigRecord, least: int) -> None:
    """Raises ProtocolError where the server's parameters would not hide a vector, or hide it among too few."""
    wanted = {Key.CLIPPING_RANGE: float(LIMIT), Key.TARGET_RANGE: RANGE, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 1.0}
    for key, value in wanted.items():
        if asked.get(key) != value:
            raise ProtocolError(f"the secure sum's {key} is {asked.get(key)!r}, wanted {value!r}")
    sample, shares, threshold = (asked.get(key) for key in (Key.SAMPLE_NUMBER, Key.SHARE_NUMBER, Key.THRESHOLD))
    if not (isinstance(sample, int) and isinstance(shares, int) and isinstance(threshold, int)):
        raise ProtocolError("the secure sum's numbers of clients are missing")
    if not LEAST_CLIENTS <= sample == shares <= MOST_CLIENTS:
        raise ProtocolError(
            f"the secure sum is of {sample} clients with {shares} shares, wanted as many shares as clients, "
            f"{LEAST_CLIENTS} to {MOST_CLIENTS}"
        )
    if not max(2, least) <= threshold <= shares:
        raise ProtocolError(f"the secure sum may be of {threshold} clients, wanted at least {max(2, least)}")


def _check_unmask(asked: ConfigRecord, context: Context) -> None:
    """Raises ProtocolError where the server asks for both of a client's secrets, or leaves this one's vector out."""
    active, dead = asked.get(Key.ACTIVE_NODE_ID_LIST), asked.get(Key.DEAD_NODE_ID_LIST)
    state = context.state.config_records.get(RECORD_KEY_STATE, ConfigRecord())
    if not isinstance(active, list) or not isinstance(dead, list):
        raise ProtocolError("the secure sum's lists of clients are missing")
    everybody = [*active, *dead]
    if len(set(everybody)) != len(everybody) or state.get("nid") not in active:
        raise ProtocolError("the secure sum's lists of clients name one twice, or this client not as one of the sum")


def _installed() -> Any:
    """Flower's module of the mod, with masks that cannot be searched for."""
    module = importlib.import_module(_MOD)  # the package has a function of the same name
    install(module, "_collect_masked_vectors", secaggplus_utils.pseudo_rand_gen)
    return module
