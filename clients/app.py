"""The Flower ClientApp: hands messages to the worker of the run and its replies back. It holds no algorithm.

In deployment Flower starts a process for every message: it must start fast, so it imports nothing heavy and asks the
resident worker of its machine (`fedzo.resident`), which it starts when there is none. A process of Flower's simulation
lives as long as the run, and is itself what holds the run's model and theta, for whichever clients it is asked to be;
the protocol brings a replica that stands behind to the plan's round.
"""

import logging
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import secure
from fedzo.errors import FedzoError, ProtocolError
from fedzo.resident import link
from fedzo.resident.wire import Parcel

RECORD = "fedzo"  # the one record of every message and of the client's state

app = ClientApp()
_log = logging.getLogger("fedzo.client")


@lru_cache(maxsize=1)
def _host() -> Any:
    from fedzo.resident.host import Host

    return Host(keep=False)


def _ends_with_its_message() -> bool:
    return Path(sys.argv[0]).name == "flwr-clientapp"


def _ask(ask: str, context: Context, spec: str, *parts: bytes, **more: int) -> Parcel:
    """Has the run's worker do something.

    Raises:
        FedzoError: there is no worker, and none could be started.
    """
    fields = {
        "ask": ask,
        "flower_run": context.run_id,
        "node": str(context.node_id),
        "spec": spec,
        "node_config": dict(context.node_config),
        "run_config": dict(context.run_config),
        "parent": os.getppid(),
        **more,
    }
    request = Parcel(fields, parts)
    if not _ends_with_its_message():
        reply: Parcel = _host().answer(request)
        return reply
    name = link.name_of(spec, context.run_config, str(context.node_config.get("device", "")))
    if ask == "leave":
        return link.ask_running(name, request) or Parcel({})
    return link.ask(name, request)


def _note(error: Exception) -> None:
    # fedzo's own messages hold no data; of any other error the type is all that may be written down.
    _log.error("%s%s", type(error).__name__, f": {error}" if isinstance(error, FedzoError) else "")


@app.query()
def greet(message: Message, context: Context) -> Message:
    """Answers the run's header with the client's Hello, with what it wants first, or with why it cannot take part.

    A client that lacks the run's mask says which bytes of it it wants next; they come with the header once more.
    """
    try:
        greeting = message.content.config_records[RECORD]
        spec, data = str(greeting["spec"]), greeting.get("data")
        offset, size = (greeting.get(key, 0) for key in ("offset", "size"))
        if not isinstance(offset, int) or not isinstance(size, int):
            raise ProtocolError("refused: a greeting's numbers are none")
        parts = (data,) if isinstance(data, bytes) else ()
        reply = _ask("greet", context, spec, *parts, offset=offset, size=size).fields
        if "hello" in reply:
            record = ConfigRecord({**reply["hello"], "resident": _ends_with_its_message()})
            context.state[RECORD] = ConfigRecord({"spec": spec, "least": reply["least"]})
        elif "wants" in reply:
            record = ConfigRecord({"wants": reply["wants"], "offset": reply["offset"]})
        else:
            record = ConfigRecord({"refused": str(reply.get("refused", reply.get("error")))})
    except Exception as error:
        _note(error)
        told = str(error) if isinstance(error, ProtocolError) else f"{type(error).__name__}; its own log says more"
        record = ConfigRecord({"refused": told})
    return Message(RecordDict({RECORD: record}), reply_to=message)


def _least(context: Context) -> int:
    """Clients that a secure sum must be of, so that it has all its noise."""
    least = context.state.config_records[RECORD]["least"]
    if not isinstance(least, int) or not least:
        raise ProtocolError("the run has no secure sums")
    return least


@app.train(mods=[secure.mod(_least)])
def add(message: Message, context: Context) -> Message:
    """Gives the contribution that the client holds to the secure sum: the mod around it masks it."""
    return secure.reply(message, secure.take(message, context))


@app.train("plan")
def train(message: Message, context: Context) -> Message:
    """Answers a plan's bytes with a contribution's, or asks to be greeted where this node no longer knows the run.

    Raises:
        RuntimeError: the plan could not be done. Flower sends the text to the server, so it says no more than that.
    """
    known = context.state.config_records.get(RECORD)
    if known is None:  # a node that has restarted
        return Message(RecordDict({RECORD: ConfigRecord({"greet": True})}), reply_to=message)
    try:
        plan = message.content.config_records[RECORD]["plan"]
        if not isinstance(plan, bytes):
            raise ProtocolError("a message holds no plan")
        reply = _ask("plan", context, str(known["spec"]), plan)
        if not reply.parts:
            raise ProtocolError(f"the plan was not done: {reply.fields.get('failed', reply.fields.get('error'))}")
        if len(reply.parts) > 1:
            secure.hold(context, reply.fields["round"], np.frombuffer(reply.parts[1], dtype="<i8").astype(np.int64))
    except Exception as error:
        _note(error)
        raise RuntimeError("the client could not do the plan") from None
    return Message(RecordDict({RECORD: ConfigRecord({"answer": reply.parts[0]})}), reply_to=message)


@app.query("leave")
def leave(message: Message, context: Context) -> Message:
    """The run is over: its worker keeps what it needs and ends."""
    known = context.state.config_records.get(RECORD)
    try:
        if known is not None:
            _ask("leave", context, str(known["spec"]))
    except Exception as error:
        _note(error)
    return Message(RecordDict({RECORD: ConfigRecord()}), reply_to=message)
