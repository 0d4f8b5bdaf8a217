"""What a client's process holds of a run, and what it answers to a node's messages."""

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

from fedzo.cache import ArtifactCache, state_directory
from fedzo.config import Config, from_run_config
from fedzo.engine import answer
from fedzo.errors import FedzoError, ProtocolError
from fedzo.experiment import Experiment
from fedzo.federation.replica import Replica
from fedzo.federation.spec import RunSpec
from fedzo.federation.worker import Worker
from fedzo.resident import LOADED
from fedzo.resident.party import Party
from fedzo.resident.state import ReplicaFile
from fedzo.resident.wire import Parcel
from fedzo.runtime import keep_memory
from fedzo.spaces import Mask

_log = logging.getLogger("fedzo.resident")


class MissingMaskError(Exception):
    """The run's mask is not in this machine's cache."""


class Resident:
    """A run's models, data and replicas in this process, one of each for every base that its clients have.

    Args:
        config: the run's, as this process was given it.
        spec: the run's header.
        keep: where theta is kept for the next process; None: nowhere.

    Raises:
        MissingMaskError: the run's mask must come first.
        FedzoError: a part of the experiment cannot be made here.
    """

    def __init__(self, config: Config, spec: RunSpec, keep: Path | None) -> None:
        self.config, self.spec, self._keep = config, spec, keep
        self._mask = self._find_mask()
        self._bases: dict[tuple[str, str], tuple[Experiment, Replica]] = {}
        self._files: list[ReplicaFile] = []
        self._workers: dict[int, tuple[Party, Worker, Experiment]] = {}
        self.loads = 0  # models read from disk
        self.plans = 0  # done

    def _find_mask(self) -> Mask | None:
        if not self.spec.mask:
            return None
        if self.config.space.kind != "sparse":
            raise ProtocolError(f'refused: a client\'s space.kind is "{self.config.space.kind}", the run has a mask')
        data = ArtifactCache().get(self.spec.mask)
        if data is None:
            raise MissingMaskError
        return Mask.from_bytes(data, f"mask {self.spec.mask[:12]}")

    def _base(self, party: Party) -> tuple[Experiment, Replica]:
        config = self.config.for_client(party.client).on_machine(source=party.model, device=party.device)
        key = config.model.quantisation, config.model.source
        if key not in self._bases:
            others = [other for (_, source), (other, _) in self._bases.items() if source == key[1]]
            experiment = others[0].on_base(config.model.quantisation) if others else Experiment(config, self._mask)
            self.loads += 1
            _log.info("%s%s, quantisation %s", LOADED, key[1], key[0])
            replica = experiment.replica(self.spec)
            if self._keep is not None:
                self._files.append(ReplicaFile(self._keep / self.spec.run_id.hex() / "replica", replica))
            self._bases[key] = experiment, replica
        return self._bases[key]

    def worker(self, party: Party) -> tuple[Worker, Experiment]:
        """The client's worker; made when first asked for, and anew when its owner says something else of it.

        Raises:
            ProtocolError: the run does not have this client, or not what its owner wants.
            FedzoError: its base or data cannot be loaded.
        """
        spec, terms = self.spec, self.spec.terms
        if not 0 <= party.client < spec.clients:
            raise ProtocolError(f"client {party.client} refused: the run has the clients 0 to {spec.clients - 1}")
        party.check(*(("", 0.0, 0.0) if terms is None else (terms.mode, terms.epsilon, terms.delta)))
        known = self._workers.get(party.client)
        if known is None or known[0].config != party.config:
            experiment, replica = self._base(party)
            if party.data:
                experiment.give(party.client, Path(party.data))
            worker = experiment.worker(party.client, replica, state_directory())
            known = self._workers[party.client] = party, worker, experiment
        return known[1], known[2]

    def plan(self, party: Party, plan: bytes) -> Parcel:
        """Answers a plan; with the answer goes the vector int64 that is held for a secure sum, if one is."""
        worker, experiment = self.worker(party)
        worker.held = None
        try:
            reply = answer(worker, experiment.evaluator, plan)
        except BaseException:
            worker.replica.reset()  # it may stand between two rounds
            raise
        self.plans += 1
        self.save()
        held = () if worker.held is None else (worker.held.astype("<i8").tobytes(),)
        return Parcel({"round": worker.replica.rounds}, (reply, *held))

    def save(self, *, now: bool = False) -> None:
        for file in self._files:
            file.save(now=now)

    def status(self) -> dict[str, Any]:
        """What `fedzo client status` shows of the run."""
        return {
            "run": self.spec.run_id.hex(),
            "clients": sorted(self._workers),
            "bases": [f"{source} ({quantisation})" for quantisation, source in self._bases],
            "device": self.config.runtime.device,
            "loads": self.loads,
            "plans": self.plans,
            "round": max((replica.rounds for _, replica in self._bases.values()), default=0),
            "rounds": self.spec.rounds,
            "memory": resident_bytes(),
        }


class Host:
    """Answers requests; keeps one run at a time.

    Args:
        keep: whether theta is kept on disk for the process after this one.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = state_directory() if keep else None
        self._of: tuple[Any, ...] | None = None
        self._resident: Resident | None = None
        self._here: set[tuple[int, str]] = set()  # clients that have not left

    def answer(self, request: Parcel) -> Parcel:
        """Answers "greet", "plan", "leave" and "status".

        What goes wrong becomes part of the reply, with no data in it: {"refused": why} of a greeting, {"failed": kind
        of error} of a plan.
        """
        fields, ask = request.fields, request.fields.get("ask")
        resident = self._resident
        if ask == "status":
            return Parcel({} if resident is None else resident.status())
        try:
            party = Party.of(fields["node_config"], str(fields["node"]))
            if ask == "leave":
                return self._leave(party)
            self._here.add((party.client, party.node))
            if ask == "greet":
                return self._greet(party, request)
            return self._enter(request).plan(party, request.parts[0])
        except Exception as error:
            # fedzo's own messages hold no data; of any other error the type is all that may be written down.
            told = str(error) if isinstance(error, FedzoError) else ""
            _log.error("%s%s", type(error).__name__, f": {told}" if told else "")
            if ask != "greet":
                return Parcel({"failed": type(error).__name__})
            refused = told if isinstance(error, ProtocolError) else f"{type(error).__name__}; its own log says more"
            return Parcel({"refused": refused})

    def _enter(self, request: Parcel) -> Resident:
        fields = request.fields
        key = fields["flower_run"], fields["spec"], tuple(sorted(fields["run_config"].items()))
        if self._of != key or self._resident is None:
            keep_memory()
            self.close()
            self._resident = None  # its memory goes before the next one's comes
            self._resident = Resident(
                from_run_config(fields["run_config"]), RunSpec.from_json(fields["spec"]), self._keep
            )
            self._of = key
        return self._resident

    def _greet(self, party: Party, request: Parcel) -> Parcel:
        mask = RunSpec.from_json(request.fields["spec"]).mask
        try:
            resident = self._enter(request)
            if request.parts:  # meanwhile another client of this machine has the whole
                ArtifactCache().discard(mask, party.node)
        except MissingMaskError:
            held = 0
            if request.parts:
                offset, size = request.fields["offset"], request.fields["size"]
                held = ArtifactCache().receive(mask, party.node, offset, request.parts[0], size)
            if not held or held < request.fields["size"]:
                return Parcel({"wants": mask, "offset": held})
            resident = self._enter(request)
        worker, _ = resident.worker(party)
        terms = resident.spec.terms
        least = terms.survivors if terms is not None and terms.mode == "client-secagg" else 0
        return Parcel({"hello": dataclasses.asdict(worker.hello()), "least": least})

    def _leave(self, party: Party) -> Parcel:
        self._here.discard((party.client, party.node))
        if self._here:
            return Parcel({})
        self.close()
        return Parcel({"over": True})

    def close(self) -> None:
        """Keeps what a next process can use."""
        if self._resident is not None:
            self._resident.save(now=True)


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
