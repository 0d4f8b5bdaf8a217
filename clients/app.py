"""The Flower ClientApp: hands plans to fedzo's worker and its answers back. It holds no algorithm.

A process keeps the experiment (model, data) and one replica of theta between messages, for whichever clients it is
asked to be: Flower's simulation does not pin clients to processes, and the protocol brings a replica that stands
behind to the plan's round. In deployment Flower starts a process for every message, and all of it is made each time.
"""

import dataclasses
import logging
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedzo.config import Scalar, from_flat
from fedzo.engine import answer
from fedzo.errors import FedzoError, ProtocolError
from fedzo.experiment import Experiment
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec
from fedzo.runtime import keep_memory

RECORD = "fedzo"  # the one record of every message and of the client's state

app = ClientApp()
_log = logging.getLogger("fedzo.client")


@lru_cache(maxsize=1)
def _resident(flower_run: int, run_config: tuple[tuple[str, Scalar], ...], spec: str) -> tuple[Experiment, Replica]:
    """What this process keeps of a run."""
    keep_memory()
    experiment = Experiment(from_flat({key: value for key, value in run_config if key != "out"}, "the run-config"))
    return experiment, experiment.replica(RunSpec.from_json(spec))


def _enter(context: Context, spec: str) -> tuple[int, Experiment, Replica]:
    """The client's number, and what its process keeps.

    Raises:
        ProtocolError: the node has no number, or one that the run does not have.
        FedzoError: from whatever part of the experiment cannot be made here.
    """
    number, clients = context.node_config.get("partition-id"), RunSpec.from_json(spec).clients
    if not isinstance(number, int):
        raise ProtocolError("a node has no client number; give it one with --node-config 'partition-id=0'")
    if not 0 <= number < clients:
        raise ProtocolError(f"client {number} refused: the run has the clients 0 to {clients - 1}")
    return number, *_resident(context.run_id, tuple(sorted(context.run_config.items())), spec)


def _note(error: Exception) -> None:
    # fedzo's own messages hold no data; of any other error the type is all that may be written down.
    _log.error("%s%s", type(error).__name__, f": {error}" if isinstance(error, FedzoError) else "")


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Answers the run's header with the client's Hello, or with why it cannot take part."""
    try:
        spec = str(message.content.config_records[RECORD]["spec"])
        number, experiment, replica = _enter(context, spec)
        record = ConfigRecord(dataclasses.asdict(experiment.worker(number, replica).hello()))
        context.state[RECORD] = ConfigRecord({"spec": spec})
    except Exception as error:
        _note(error)
        told = str(error) if isinstance(error, ProtocolError) else f"{type(error).__name__}; its own log says more"
        record = ConfigRecord({"refused": told})
    return Message(RecordDict({RECORD: record}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers a plan's bytes with a contribution's.

    Raises:
        RuntimeError: the plan could not be done. Flower sends the text to the server, so it says no more than that.
    """
    try:
        plan = message.content.config_records[RECORD]["plan"]
        if not isinstance(plan, bytes):
            raise ProtocolError("a message holds no plan")
        number, experiment, replica = _enter(context, str(context.state.config_records[RECORD]["spec"]))
        try:
            reply = answer(experiment.worker(number, replica), experiment.evaluator, plan)
        except Exception:
            replica.reset()  # it may stand between two rounds
            raise
    except Exception as error:
        _note(error)
        raise RuntimeError("the client could not do the plan") from None
    return Message(RecordDict({RECORD: ConfigRecord({"answer": reply})}), reply_to=message)
