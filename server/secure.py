"""The server's side of the secure sum: Flower's SecAgg+ workflow, over whichever clients are asked.

The server learns the sum of the clients' vectors and nothing else, as long as it follows the protocol and fewer than
`threshold` clients tell it their secrets. One that gave each client a false picture of the others could learn more;
where `threshold` is above half of the clients it could not by calling a client lost to some and there to others.
"""

import importlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import FitIns, FitRes, Parameters, bytes_to_ndarray, parameters_to_ndarrays
from flwr.common.secure_aggregation import secaggplus_utils
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import recorddict_to_fitres
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_public_key
from flwr.supercore.run import Run

from fedzo.errors import RunError
from fedzo.privacy.mechanisms import Ints
from fedzo.privacy.secure_sum import LEAST_CLIENTS, LIMIT, MODULUS, MOST_CLIENTS, RANGE, install

_WORKFLOW = "flwr.server.workflow.secure_aggregation.secaggplus_workflow"

_log = logging.getLogger("fedzo.server")


def secure_sum(
    grid: Grid, nodes: Mapping[int, int], round_: int, threshold: int, timeout: float, size: int
) -> tuple[tuple[int, ...], Ints] | None:
    """Has clients add up the vectors that they hold.

    Args:
        nodes: client -> node id, of those that take part: all are each other's neighbours.
        round_: goes with every message as its group id.
        threshold: least number of clients whose vectors are in the sum, and who must be there to unmask it.
        timeout: seconds for each of the protocol's four stages; who is late is lost.
        size: d, entries of a vector; a client with another number of them is lost.

    Returns:
        The clients whose vectors are in the sum, ascending, and the exact sum int64 [d]. None when fewer than
        `threshold` remained, or what a client sent does not fit: no vector was unmasked, nor a sum of fewer.

    Raises:
        RunError: fewer than 3 clients or too many, a threshold that they cannot have, or another Flower than 1.41.
    """
    if not LEAST_CLIENTS <= len(nodes) <= MOST_CLIENTS:
        raise RunError(f"a secure sum of {len(nodes)} clients, wanted {LEAST_CLIENTS} to {MOST_CLIENTS}")
    if not 2 <= threshold <= len(nodes):
        raise RunError(f"a secure sum of at least {threshold} of {len(nodes)} clients, wanted 2 to {len(nodes)}")
    install(importlib.import_module(_WORKFLOW), "SecAggPlusWorkflow.unmask_stage", secaggplus_utils.pseudo_rand_gen)
    strategy = _Keep(grid, list(nodes.values()))
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: round_}),
            MAIN_PARAMS_RECORD: ArrayRecord(),
        }
    )
    context = LegacyContext(Context(run_id=0, node_id=0, node_config={}, state=state, run_config={}), strategy=strategy)
    # As a whole number Flower wants fewer than there are; as a share 1.0 it means all.
    least = 1.0 if threshold == len(nodes) else threshold
    workflow = _Workflow(
        len(nodes), least, max_weight=1.0, clipping_range=float(LIMIT), quantization_range=RANGE, modulus_range=MODULUS,
        timeout=timeout,
    )  # fmt: skip
    try:
        workflow(_Paced(grid, size), context)
    except (ValueError, TypeError) as error:  # of shares that do not make up a secret
        _log.warning("round %d: the secure sum could not be unmasked (%s)", round_, type(error).__name__)
        return None
    if strategy.mean is None:
        return None
    clients = tuple(sorted(client for client, node in nodes.items() if node in strategy.summed))
    scaled = strategy.mean * len(clients)
    total = np.rint(scaled)
    fits = np.isfinite(scaled).all() and (np.abs(scaled - total) < 0.01).all()
    if not fits or (np.abs(total) > len(clients) * LIMIT).any():
        _log.warning("round %d: the secure sum is none of vectors within +-%d", round_, LIMIT)
        return None
    return clients, total.astype(np.int64)


def poll(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    """Sends messages, one a node, and gives node and answer as they come, until all are there or time is up.

    Args:
        timeout: seconds; also the messages' time to live, so that nobody begins work that is no longer wanted.
    """
    start = time.monotonic()
    sent: dict[str, int] = {}
    # To one node at a time: the ids come back in order, and a message that could not be pushed has none.
    for message in messages:
        message.metadata.ttl = timeout
        node = message.metadata.dst_node_id
        sent |= {name: node for name in grid.push_messages([message]) if name}
    while sent:
        for answer in grid.pull_messages(list(sent)):
            found = sent.pop(answer.metadata.reply_to_message_id, None)
            if found is not None and answer.has_content():  # an error instead: the node counts as lost
                yield found, answer
        elapsed = time.monotonic() - start
        if elapsed > timeout:
            return
        if sent:
            time.sleep(min(0.25, max(0.01, elapsed / 20)))  # short stages are polled often, long ones cheaply


class _Workflow(SecAggPlusWorkflow):
    """Flower's, which goes on when clients are lost before they have shared their keys.

    Flower counts those as lost after it, and asks the others for shares of secrets that they never received.
    """

    def share_keys_stage(self, grid: Grid, context: LegacyContext, state: WorkflowState) -> bool:
        if not super().share_keys_stage(grid, context, state):
            return False
        there = set(state.active_node_ids)
        state.sampled_node_ids = there
        state.nid_to_neighbours = {node: state.nid_to_neighbours[node] & there for node in there}
        return True


class _Keep(FedAvg):
    """A strategy that asks given nodes and keeps what comes.

    Attributes:
        summed: nodes whose masked vectors were added up.
        mean: float64 [d] of their vectors; None: it was not unmasked.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        super().__init__()
        self._proxies = [GridClientProxy(node, grid, 0) for node in nodes]
        self.summed: set[int] = set()
        self.mean: np.ndarray[Any, np.dtype[np.float64]] | None = None

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        return [(proxy, FitIns(parameters, {})) for proxy in self._proxies]

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Any]]:
        self.summed = {proxy.node_id for proxy, _ in results}
        (self.mean,) = parameters_to_ndarrays(results[0][1].parameters)  # the same in each
        return None, {}


class _Paced(Grid):
    """A Grid whose `send_and_receive` polls at our own pace, and loses who answers something else than was asked for.

    Args:
        grid: what carries the messages.
        size: entries of a vector.
    """

    def __init__(self, grid: Grid, size: int) -> None:
        self._grid, self._size = grid, size

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        batch = list(messages)
        asked = {
            m.metadata.dst_node_id: ConfigRecord(dict(m.content.config_records[RECORD_KEY_CONFIGS])) for m in batch
        }
        answers = []
        for node, answer in poll(self._grid, batch, float("inf") if timeout is None else timeout):
            if answer.metadata.src_node_id == node and self._fits(node, asked[node], answer.content):
                answers.append(answer)
            else:
                _log.warning("node %d answered the secure sum with something else than was asked for", node)
        return answers

    def _fits(self, node: int, asked: Mapping[str, Any], content: RecordDict) -> bool:
        try:
            return self._check(node, asked, content.config_records[RECORD_KEY_CONFIGS], content)
        except Exception:  # whatever a broken answer raises
            return False

    def _check(self, node: int, asked: Mapping[str, Any], answer: Mapping[str, Any], content: RecordDict) -> bool:
        stage = asked[Key.STAGE]
        if stage == Stage.SETUP:
            for key in (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2):
                bytes_to_public_key(answer[key])
            return True
        if stage == Stage.SHARE_KEYS:
            others = {int(name) for name in asked if name != Key.STAGE} - {node}
            to, boxes = answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST]
            return set(to) == others and len(to) == len(boxes) == len(others) and _all_bytes(boxes)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            recorddict_to_fitres(content, True)
            arrays = [bytes_to_ndarray(data) for data in answer[Key.MASKED_PARAMETERS]]
            return [array.shape for array in arrays] == [(1,), (self._size,)] and all(
                array.dtype == np.int64 and (array >= 0).all() and (array < MODULUS).all() for array in arrays
            )
        wanted = [*asked[Key.ACTIVE_NODE_ID_LIST], *asked[Key.DEAD_NODE_ID_LIST]]
        shares = answer[Key.SHARE_LIST]
        return list(answer[Key.NODE_ID_LIST]) == wanted and len(shares) == len(wanted) and _all_bytes(shares)

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)


def _all_bytes(values: Sequence[Any]) -> bool:
    return all(isinstance(value, bytes) for value in values)
