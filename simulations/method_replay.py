"""Every named method over 4 clients: whoever has the base model and the ledger has the server's theta, bit for bit.

    python simulations/method_replay.py [--methods NAME ...] [--kill NAME ...] [--quick]

Each method is run on the embedded model over a small space that it is valid for, with K = 1 and K = 4 local steps and
under each seed schedule that it is valid for; where it is not valid, it is shown refused, with the reason. Checked are:

- replay: a fresh replica that applies the ledger, all in one go, on one thread or two, has the server's theta;
- records, snapshot: so has a client that comes late, halfway by what it missed or by a snapshot, then by records;
- resumed: a run that is lost in the middle of a round, halfway, and finished anew has the ledger hash of one that was
  not (within one process: an exception ends the run, and model, data and ledger are opened again);
- threads: so has a run with two threads in place of one (of each method the first: it takes long where cores are few);
- killed: so has a `fedzo run` that is killed with -9 in flight and resumed (of the methods of --kill; --quick: one).

Ends with one line of JSON.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from kill_resume import committed, fedzo, finish

from fedzo import engine
from fedzo.config import Config, from_flat
from fedzo.errors import ConfigError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator, replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import CatchUp, Plan, RoundRecords, decode
from fedzo.federation.spec import SEED_SCHEDULES
from fedzo.limits import Value
from fedzo.method_facts import facts
from fedzo.methods import METHODS
from fedzo.run_folder import RunFolder

CLIENTS, ROUNDS, LOCAL_STEPS = 4, 6, (1, 4)
# Of each kind one of few entries, the first that a method is valid for. An adapter has matrices, in layers.
SMALL: dict[str, dict[str, Value]] = {
    "adapter": {"space.adapter": "lora", "space.rank": 4},
    "sparse": {"space.density": 0.002},
    "full": {"space.include": "*norm*"},
    "scales": {"model.quantisation": "nf4", "space.include": "*v_proj*"},
    "codes": {"model.quantisation": "int8", "space.include": "*v_proj*"},
}
# What a method leaves to the user, in terms of the embedded model.
OPEN: dict[str, Value] = {"method.first_order": "*layers.1.*"}
# What changes at times does so several times in a short run, on both sides of its middle.
OFTEN: dict[str, Value] = {
    "method.anchor_every": 2,
    "method.project_every": 2,
    "method.project_steps": 1,
    "method.refresh": 2,
}
# One of each kind of state: none, moments, curvature, anchor, factors that change, whole codes.
KILLED = ("zo-sgd", "zo-adam", "hizoo", "mezo-svrg", "lozo", "quzo")


class LostError(Exception):
    """The process is gone."""


def configured(name: str, **changes: Value) -> Config:
    """A small run of a method; a change is named section__key.

    Raises:
        ConfigError: the method is not valid under the changes.
    """
    kind = next(kind for kind in SMALL if kind in facts(name).spaces)
    keys: dict[str, Value] = {
        "method.name": name, "space.kind": kind, **SMALL[kind], **OFTEN, "method.batch_size": 2,
        "model.max_length": 24, "data.clients": CLIENTS, "data.partition": "iid", "data.limit": 48, "data.test": "",
        "federation.rounds": ROUNDS, "federation.pool_size": 64, "evaluation.every": 0, "evaluation.limit": 8,
        "runtime.threads": 1, "runtime.device": "cpu", "runtime.evaluation": "paired",
    }  # fmt: skip
    keys |= {key: OPEN[key] for key in METHODS[name].open}
    return from_flat(keys | {key.replace("__", "."): value for key, value in changes.items()}, name)


def run(config: Config, path: Path, lose: int | None = None) -> tuple[Ledger, Coordinator]:
    """A run to its end, begun or gone on with; its ledger is open.

    Args:
        lose: the round after whose first answer the process is lost.

    Raises:
        LostError: it was.
    """
    servers = []

    def connect(experiment: Experiment, coordinator: Coordinator) -> engine.Transport:
        servers.append(coordinator)
        whole = engine.in_process(experiment, coordinator)

        def exchange(parcels: Sequence[engine.Parcel]) -> Iterable[engine.Parcel]:
            for parcel in whole.exchange(parcels):
                if coordinator.ledger.rounds == lose:
                    raise LostError
                yield parcel

        return engine.Transport(exchange, whole.add)

    folder = RunFolder(path) if path.exists() else RunFolder.create(path, config)
    threads = torch.get_num_threads()
    try:
        return engine.run(Experiment(config), folder, connect=connect), servers[0]
    finally:
        torch.set_num_threads(threads)


def late(experiment: Experiment, ledger: Ledger, kind: str) -> bytes:
    """The digest of theta of a client that comes halfway, by records or by a snapshot, and then follows the run.

    Raises:
        RuntimeError: halfway, its theta is not the recorded one.
    """
    half, spec = ledger.rounds // 2, ledger.spec
    entries = list(ledger.read())
    tail = tuple(RoundRecords(entry.seeds, entry.scalars, entry.gradients) for entry in entries)
    if kind == "records":
        missed = CatchUp("records", 0, half, tail[:half])
    else:
        server = experiment.replica(spec)
        replay(ledger, server, half)
        missed = CatchUp("snapshot", 0, half, snapshot=server.rule.snapshot(server.theta, server.state))
    client = experiment.replica(spec)
    client.catch_up(_sent(missed, ledger))
    if client.digest() != entries[half - 1].digest:
        raise RuntimeError(f"a client that came late by {kind} has another theta after {half} rounds")
    client.catch_up(_sent(CatchUp("records", half, len(entries), tail[half:]), ledger))
    return client.digest()


def _sent(missed: CatchUp, ledger: Ledger) -> CatchUp:
    """As it arrives at a client, in a plan."""
    seeds = next(ledger.read()).seeds
    plan = Plan(ledger.spec.run_id, missed.stop, 0, seeds, ledger.spec.eps, 1, bytes(32), missed)
    arrived = decode(plan.to_bytes())
    assert isinstance(arrived, Plan)
    return arrived.catch_up


def check(config: Config, whole: tuple[Ledger, Coordinator], scratch: Path, threads: bool = False) -> dict[str, bool]:
    """What holds of a method's finished run, by name; `threads`: of one on two threads as well."""
    ledger, server = whole
    with ledger:
        experiment, final, last = Experiment(config), server.replica.digest(), list(ledger.read())[-1]
        replayed = [_replayed(experiment, ledger, threads) for threads in (1, 2)]
        held = {
            "moved": final.hex() != ledger.spec.theta0,
            "replay": replayed == [final, last.digest],
            "records": late(experiment, ledger, "records") == final,
            "snapshot": late(experiment, ledger, "snapshot") == final,
            "resumed": _resumed(config, scratch / "lost") == ledger.head,
        }
        if threads:
            runtime = config.runtime.model_copy(update={"threads": 2})
            held["threads"] = _head(config.model_copy(update={"runtime": runtime}), scratch / "threads") == ledger.head
    return held


def _replayed(experiment: Experiment, ledger: Ledger, threads: int) -> bytes:
    before, fresh = torch.get_num_threads(), experiment.replica(ledger.spec)
    torch.set_num_threads(threads)
    try:
        replay(ledger, fresh)
    finally:
        torch.set_num_threads(before)
    return fresh.digest()


def _resumed(config: Config, path: Path) -> bytes:
    """The ledger hash of a run that is lost halfway and then finished."""
    with contextlib.suppress(LostError):
        run(config, path, lose=config.federation.rounds // 2)
        raise RuntimeError("the run was not lost")
    return _head(config, path)


def _head(config: Config, path: Path) -> bytes:
    ledger, _ = run(config, path)
    with ledger:
        return ledger.head


def killed(name: str, scratch: Path) -> tuple[bool, int]:
    """Whether a run killed with -9 in flight and resumed has the ledger of one that was not; rounds at the kill."""
    rounds = 30
    config = configured(name, federation__rounds=rounds, method__batch_size=32)
    options = RunFolder.create(scratch / "settings", config).config
    whole = finish(fedzo("run", "--config", str(options), "--out", str(scratch / "whole"), "--json"))
    folder = scratch / "killed"
    process = fedzo("run", "--config", str(options), "--out", str(folder), "--json")
    while process.poll() is None and committed(folder) < rounds // 3:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    at = committed(folder)
    resumed = finish(fedzo("resume", str(folder), "--json"))
    return at < rounds and all(whole[key] == resumed[key] for key in ("ledger_hash", "theta_digest")), at


def cells(name: str) -> Iterator[tuple[int, str]]:
    """The (K, seed schedule) that a method might be valid under."""
    for schedule in SEED_SCHEDULES:
        if METHODS[name].keys.get("federation.seeds", schedule) == schedule:
            yield from ((steps, schedule) for steps in LOCAL_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="names; all, if not given")
    parser.add_argument("--kill", nargs="*", default=list(KILLED), help="methods whose processes are killed as well")
    parser.add_argument("--quick", action="store_true", help="the first seed schedule only, no runs on two threads")
    args = parser.parse_args()
    held: dict[str, dict[str, bool]] = {}
    refused: dict[str, list[str]] = {}
    for name in args.methods:
        facts(name)  # an unknown name ends here
        for number, (steps, schedule) in enumerate(cells(name)):
            if args.quick and number >= len(LOCAL_STEPS):
                break
            cell = f"{name}, K = {steps}, {schedule}"
            try:
                config = configured(name, federation__local_steps=steps, federation__seeds=schedule)
            except ConfigError as error:
                refused.setdefault(str(error), []).append(f"K = {steps}, {schedule}")
                print(f"refused  {cell}: {error}")
                continue
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as scratch:
                whole = run(config, Path(scratch) / "whole")
                held[cell] = check(config, whole, Path(scratch), threads=number == 0 and not args.quick)
            told = "holds  " if all(held[cell].values()) else "FAILS  "
            print(f"{told}  {cell}: {', '.join(held[cell])} ({time.monotonic() - started:.1f} s)", flush=True)
    kills: dict[str, int] = {}
    for name in [name for name in args.kill if name in args.methods][: 1 if args.quick else None]:
        with tempfile.TemporaryDirectory() as scratch:
            same, kills[name] = killed(name, Path(scratch))
        held[f"{name}, kill -9"] = {"killed": same}
        print(f"{'holds  ' if same else 'FAILS  '}  {name}: killed after {kills[name]} rounds and resumed", flush=True)
    failed = {cell: [what for what in found if not found[what]] for cell, found in held.items()}
    failed = {cell: what for cell, what in failed.items() if what}
    figures = {
        "methods": len(args.methods),
        "runs": len(held) - len(kills),
        "refused": refused,
        "rounds_at_kill": kills,
        "failed": failed,
        "identical": not failed,
    }
    print(json.dumps(figures))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
