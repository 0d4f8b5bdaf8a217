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

from clients import secure
from fedzo.cache import ArtifactCache, budget_directory
from fedzo.config import Config, Scalar, from_run_config
from fedzo.engine import Bases, answer
from fedzo.errors import FedzoError, ProtocolError
from fedzo.experiment import Experiment
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec
from fedzo.privacy.terms import Terms
from fedzo.runtime import keep_memory
from fedzo.spaces import Mask

RECORD = "fedzo"  # the one record of every message and of the client's state

app = ClientApp()
_log = logging.getLogger("fedzo.client")


@lru_cache(maxsize=1)
def _resident(flower_run: int, run_config: tuple[tuple[str, Scalar], ...], spec: str) -> Bases:
    """What this process keeps of a run.

    Raises:
        _MissingError: the run's mask is not in this machine's cache.
    """
    keep_memory()
    config = from_run_config(dict(run_config))
    run = RunSpec.from_json(spec)
    mask = None
    if run.mask:
        if config.space.kind != "sparse":
            raise ProtocolError(f'refused: a client\'s space.kind is "{config.space.kind}", the run has a mask')
        data = ArtifactCache().get(run.mask)
        if data is None:
            raise _MissingError
        mask = Mask.from_bytes(data, f"mask {run.mask[:12]}")
    first: list[Experiment] = []

    def make(own: Config) -> Experiment:
        first[:] = first or [Experiment(own, mask)]
        return first[0].on_base(own.model.quantisation)

    return Bases(config, run, make)


class _MissingError(Exception):
    pass


def _enter(context: Context, spec: str) -> tuple[int, Experiment, Replica]:
    """The client's number, and what its process keeps.

    Raises:
        ProtocolError: the node has no number, or one that the run does not have, or its owner wants more privacy.
        FedzoError: from whatever part of the experiment cannot be made here.
    """
    number, run = context.node_config.get("partition-id"), RunSpec.from_json(spec)
    if not isinstance(number, int):
        raise ProtocolError("a node has no client number; give it one with --node-config 'partition-id=0'")
    if not 0 <= number < run.clients:
        raise ProtocolError(f"client {number} refused: the run has the clients 0 to {run.clients - 1}")
    _check_owner(context, run.terms)
    return number, *_resident(context.run_id, tuple(sorted(context.run_config.items())), spec).of(number)


def _check_owner(context: Context, terms: Terms | None) -> None:
    """What the node's owner asks of a run: --node-config "max-epsilon=2.0 max-delta=1e-5
    privacy-modes='example-local,client-local'".

    Raises:
        ProtocolError: the run does not promise it.
    """
    most, modes = context.node_config.get("max-epsilon"), context.node_config.get("privacy-modes")
    delta = context.node_config.get("max-delta")
    if most is None and modes is None and delta is None:
        return
    if terms is None:
        raise ProtocolError("refused: this node takes part in private runs only, and the run is not one")
    if most is not None and not (isinstance(most, int | float) and terms.epsilon <= most):
        raise ProtocolError(f"refused: this node's max-epsilon is {most}, the run's epsilon is {terms.epsilon:g}")
    if delta is not None and not (isinstance(delta, int | float) and terms.delta <= delta):
        raise ProtocolError(f"refused: this node's max-delta is {delta}, the run's delta is {terms.delta:g}")
    if modes is not None and terms.mode not in [mode.strip() for mode in str(modes).split(",")]:
        raise ProtocolError(f"refused: this node's privacy-modes are {modes}, the run's is {terms.mode}")


def _fetch(context: Context, mask: str, greeting: ConfigRecord) -> ConfigRecord | None:
    """Keeps the part of the mask that came with a greeting; what to ask for next, or None when it is whole.

    Raises:
        ProtocolError: the part does not follow the last, or the whole has another hash.
    """
    data, offset, size = (greeting.get(key) for key in ("data", "offset", "size"))
    held = 0
    if isinstance(data, bytes) and isinstance(offset, int) and isinstance(size, int):
        held = ArtifactCache().receive(mask, str(context.node_id), offset, data, size)
        if held == size:
            return None
    return ConfigRecord({"wants": mask, "offset": held})


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
        spec = str(greeting["spec"])
        try:
            number, experiment, replica = _enter(context, spec)
            if "data" in greeting:  # meanwhile another client of this machine has the whole
                ArtifactCache().discard(RunSpec.from_json(spec).mask, str(context.node_id))
        except _MissingError:
            record = _fetch(context, RunSpec.from_json(spec).mask, greeting)
            if record is not None:
                return Message(RecordDict({RECORD: record}), reply_to=message)
            number, experiment, replica = _enter(context, spec)
        hello = experiment.worker(number, replica, budget_directory()).hello()
        record = ConfigRecord(dataclasses.asdict(hello))
        context.state[RECORD] = ConfigRecord({"spec": spec})
    except Exception as error:
        _note(error)
        told = str(error) if isinstance(error, ProtocolError) else f"{type(error).__name__}; its own log says more"
        record = ConfigRecord({"refused": told})
    return Message(RecordDict({RECORD: record}), reply_to=message)


def _least(context: Context) -> int:
    """Clients that a secure sum must be of, so that it has all its noise."""
    terms = RunSpec.from_json(str(context.state.config_records[RECORD]["spec"])).terms
    if terms is None or terms.mode != "client-secagg":
        raise ProtocolError("the run has no secure sums")
    return terms.survivors


@app.train(mods=[secure.mod(_least)])
def add(message: Message, context: Context) -> Message:
    """Gives the contribution that the client holds to the secure sum: the mod around it masks it."""
    return secure.reply(message, secure.take(message, context))


@app.train("plan")
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
            worker = experiment.worker(number, replica, budget_directory())
            reply = answer(worker, experiment.evaluator, plan)
            if worker.held is not None:
                secure.hold(context, replica.rounds, worker.held)
        except Exception:
            replica.reset()  # it may stand between two rounds
            raise
    except Exception as error:
        _note(error)
        raise RuntimeError("the client could not do the plan") from None
    return Message(RecordDict({RECORD: ConfigRecord({"answer": reply})}), reply_to=message)
