"""Rate, memory and bytes of runs with many registered clients, of which a hundred are asked a round.

    server    the coordinator and its ledger alone: answers of the right shape come from nowhere, at no cost
    local     `fedzo run`: server and clients in one process
    flower    `fedzo run --engine flower`: a supernode for each client, on Flower's simulation with Ray

The model is the embedded one and its method the default's. The embedded examples are fewer than 10,000 clients, so the
grammar of make_embedded.py writes 8 a client into a scratch folder. Every run is a process of its own (Flower's are
several), looked at through /proc four times a second. A rate is that of the rounds after the first, in which Numba
compiles and nobody has a replica yet; CPU is that of all processes of the run and less disturbed by other programs.
Peaks are resident sets; growth is how much the server's has grown a round over the second half of the rounds. In
Flower's simulation the ServerApp is a thread of the process that also plays all supernodes.

    python simulations/bench_scale.py [--clients 1000 10000] [--per-round 100] [--rounds N] [--engine server local
        flower] [--quick]

Ends with one line of JSON.
"""

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedzo.config import Config, load_config
from fedzo.embedded import DATA
from fedzo.events import read_events
from fedzo.federation.ledger import Ledger
from fedzo.run_folder import RunFolder

ENGINES = ("server", "local", "flower")
ROUNDS = {"server": 1000, "local": 30, "flower": 10}
EXAMPLES = 8  # of a client
PERIOD = 0.25  # seconds between two looks
TICK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
MIB, KIB = 2**20, 2**10


@dataclass
class Program:
    """A process, as it was at the looks.

    Attributes:
        role: "server", "superlink", "worker" or "other".
        times, sizes, cpu: of each look the clock's seconds, bytes resident, and seconds of CPU so far.
    """

    role: str
    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def role_of(command: str, engine: str) -> str:
    """What a process of a run is, by its command line."""
    if engine != "flower":
        return "server"
    for mark, role in (
        ("flwr-simulation", "server"),
        ("flower-superlink", "superlink"),
        ("ray::ClientAppActor", "worker"),
    ):
        if mark in command:
            return role
    return "other"


def processes_below(root: int, parents: dict[int, int]) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


class Look(threading.Thread):
    """Looks at a process and its descendants until told to stop."""

    def __init__(self, root: int, engine: str) -> None:
        super().__init__(daemon=True)
        self.programs: dict[int, Program] = {}
        self._root, self._engine, self._stop_asked = root, engine, threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(PERIOD):
            now, fields = time.time(), _processes()
            for pid in processes_below(self._root, {pid: int(values[1]) for pid, values in fields.items()}):
                with suppress(OSError, KeyError):
                    program = self.programs.get(pid) or Program("other")
                    # A worker of Ray has its name only after a while, and a process that has ended has none.
                    if program.role == "other":
                        command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                        program.role = role_of(command, self._engine)
                    values = fields[pid]
                    program.times.append(now)
                    program.cpu.append((int(values[11]) + int(values[12])) / TICK)
                    program.sizes.append(int(values[21]) * PAGE)
                    self.programs[pid] = program

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def peak(self, role: str) -> int:
        """Bytes: the most that a process of this role had resident; 0: there was none."""
        return max((max(p.sizes) for p in self.programs.values() if p.role == role), default=0)

    def count(self, role: str) -> int:
        return sum(program.role == role for program in self.programs.values())

    def size_at(self, when: float) -> float:
        """Bytes resident of the server."""
        server = max((p for p in self.programs.values() if p.role == "server"), key=lambda p: p.cpu[-1])
        return float(np.interp(when, server.times, server.sizes))

    def cpu_between(self, start: float, end: float) -> float:
        """Seconds, of all processes."""
        return sum(float(np.diff(np.interp([start, end], p.times, p.cpu))[0]) for p in self.programs.values())


def _processes() -> dict[int, list[str]]:
    """Process id -> the fields of /proc/PID/stat after the name."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
    return found


def write_data(path: Path, clients: int, seed: int = 1) -> None:
    """Sentences of the embedded data's grammar for so many clients, no sentence twice, labels in turn."""
    from make_embedded import Writer

    rng, seen = random.Random(seed), set[str]()
    with path.open("w", encoding="ascii") as file:
        while len(seen) < EXAMPLES * clients:
            label = len(seen) % 2
            sentence, _ = Writer(rng).review(label)
            if sentence not in seen:
                seen.add(sentence)
                file.write(json.dumps({"sentence": sentence, "label": label}) + "\n")


def configuration(data: Path, clients: int, asked: int, rounds: int) -> Config:
    values: dict[str, object] = {
        "data.source": str(data), "data.validation": str(DATA / "validation.jsonl"), "data.test": "",
        "data.clients": clients, "data.partition": "iid", "federation.clients_per_round": asked,
        "federation.rounds": rounds, "evaluation.every": 0, "evaluation.limit": 100,
    }  # fmt: skip
    return load_config(None, tuple(f"{name}={value}" for name, value in values.items())).resolved()


def serve(out: Path, config: Config) -> None:
    """Plays the rounds of a run with a coordinator only; prints when each began and ended, as a line of JSON."""
    from fedzo.engine import start
    from fedzo.experiment import Experiment
    from fedzo.federation.coordinator import Coordinator
    from fedzo.federation.messages import Contribution
    from fedzo.runtime import keep_memory

    keep_memory()
    experiment, rng = Experiment(config), np.random.default_rng(0)
    _ = experiment.validation  # as a server has it
    with closing(start(RunFolder.create(out, config), experiment)) as ledger:
        coordinator = Coordinator(ledger, experiment.replica(ledger.spec))
        hello = experiment.worker(0, coordinator.replica, later=True).hello()
        for client in range(config.data.clients):
            coordinator.admit(replace(hello, client=client))
        times = []
        while not coordinator.finished:
            began = time.time()
            plans = coordinator.open_round()
            for plan in plans:
                plan.to_bytes()
            spent = time.time()
            answers = [
                Contribution(
                    plan.run_id, plan.round, plan.client, plan.seeds,
                    rng.normal(scale=1e-3, size=plan.seeds.shape).astype(np.float32), hello.examples, 1.0,
                ).to_bytes()
                for plan in plans
            ]  # fmt: skip
            made = time.time() - spent
            for plan, answer in zip(plans, answers, strict=True):
                coordinator.receive(plan.client, answer)
            coordinator.close_round()
            times.append((began + made, time.time()))
    print(json.dumps(times))


def told(folder: RunFolder) -> list[tuple[float, float]]:
    """When each round began and ended, from the run's events."""
    rounds = [event for event in read_events(folder.path / "events.jsonl")[0] if event["event"] == "round-committed"]
    ends = [datetime.fromisoformat(event["time"]).timestamp() for event in rounds]
    return [(end - event["seconds"], end) for end, event in zip(ends, rounds, strict=True)]


def ledger_bytes(path: Path) -> dict[str, float]:
    """Bytes a round of the ledger's payloads, hashes and summaries, of what it keeps of a client, and of the file."""
    with closing(sqlite3.connect(path)) as db:
        sums = [f"avg(length({name}))" for name in ("payload", "hash", "summary")]
        payload, chained, summary = db.execute(f"SELECT {', '.join(sums)} FROM rounds").fetchone()
        (member,) = db.execute("SELECT avg(length(details)) FROM members").fetchone()
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return {
        "ledger_payload_a_round": round(payload, 1),
        "ledger_bytes_a_round": round(payload + chained + summary, 1),
        "ledger_bytes_a_client": round(member, 1),
        "ledger_file_bytes": path.stat().st_size,
    }


def play(engine: str, clients: int, asked: int, rounds: int, scratch: Path, timeout: float) -> dict[str, Any]:
    """One run; its figures by name."""
    data = scratch / f"data-{clients}"
    if not data.exists():
        data.mkdir()
        write_data(data / "train.jsonl", clients)
    config = configuration(data, clients, asked, rounds)
    out = scratch / f"{engine}-{clients}"
    given = RunFolder.create(scratch / f"config-{engine}-{clients}", config).config
    if engine == "server":
        command = [sys.executable, __file__, "--serve", str(out), "--config", str(given)]
    else:
        command = [
            sys.executable, "-c", "from fedzo.cli import main; main()", "run", "-c", str(given), "--out", str(out),
            "--engine", engine, "-q",
        ]  # fmt: skip
    began = time.time()
    with (scratch / f"{out.name}.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        look = Look(process.pid, engine)
        look.start()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            raise SystemExit(f"{engine}, {clients} clients: not done in {timeout:.0f} s (--timeout)") from None
        finally:
            look.stop()
        log.seek(0)
        said = log.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"{engine}, {clients} clients: {' / '.join(said[-3:])}")
    times = json.loads(said[-1]) if engine == "server" else told(RunFolder(out))
    return figures(engine, config, began, times, look, out)


def figures(
    engine: str, config: Config, began: float, times: Sequence[tuple[float, float]], look: Look, out: Path
) -> dict[str, Any]:
    """What a run's times, processes and ledger say."""
    rounds, steps = len(times), config.federation.local_steps
    with Ledger(out / "ledger.sqlite") as ledger:
        summaries = ledger.summaries()
    spent = sum(end - start for start, end in times[1:])
    accepted = sum(summary["accepted"] for summary in summaries[1:])
    sampled = sum(summary["sampled"] for summary in summaries)
    half, last = times[rounds // 2 - 1][1], times[-1][1]
    found: dict[str, Any] = {
        "engine": engine,
        "clients": config.data.clients,
        "sampled": sampled / rounds,
        "accepted": sum(summary["accepted"] for summary in summaries) / rounds,
        "rounds": rounds,
        "start_seconds": round(times[0][0] - began, 1),
        "first_round_seconds": round(times[0][1] - times[0][0], 2),
        "rounds_per_second": round((rounds - 1) / spent, 3),
        "client_steps_per_second": round(steps * accepted / spent, 1),
        "cpu_seconds_a_round": round(look.cpu_between(times[0][1], last) / (rounds - 1), 3),
        "load_average": round(os.getloadavg()[1], 1),
        "server_peak_mib": round(look.peak("server") / MIB),
        "server_growth_kib_a_round": round((look.size_at(last) - look.size_at(half)) / KIB / (rounds - rounds // 2), 1),
        "down_bytes": round(sum(summary["bytes_down"] for summary in summaries) / sampled, 1),
        "up_bytes": round(sum(summary["bytes_up"] for summary in summaries) / sampled, 1),
        **ledger_bytes(out / "ledger.sqlite"),
    }
    if engine == "flower":
        found["superlink_peak_mib"] = round(look.peak("superlink") / MIB)
        found["worker_peak_mib"], found["workers"] = round(look.peak("worker") / MIB), look.count("worker")
    return found


COLUMNS = (
    ("engine", "engine"), ("clients", "clients"), ("rounds", "rounds"), ("start s", "start_seconds"),
    ("rounds/s", "rounds_per_second"), ("steps/s", "client_steps_per_second"), ("CPU s/round", "cpu_seconds_a_round"),
    ("load", "load_average"),
    ("server MiB", "server_peak_mib"), ("KiB/round", "server_growth_kib_a_round"), ("down B", "down_bytes"),
    ("up B", "up_bytes"), ("ledger B/round", "ledger_bytes_a_round"),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--per-round", type=int, default=100)
    parser.add_argument("--rounds", type=int, help=f"by default {ROUNDS}")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for a run")
    parser.add_argument("--quick", action="store_true", help="300 clients, 20 a round, in a tenth of the rounds")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve is not None:
        serve(options.serve, load_config(options.config))
        return
    counts, asked = ([300], 20) if options.quick else (options.clients, options.per_round)
    rows = []
    print("".join(f"{title:>15}" for title, _ in COLUMNS), flush=True)
    with tempfile.TemporaryDirectory(prefix="fedzo-scale-") as name:
        for engine in options.engine:
            rounds = options.rounds or ROUNDS[engine] // (10 if options.quick else 1)
            for clients in counts:
                row = play(engine, clients, asked, max(4, rounds), Path(name), options.timeout)
                print(
                    "".join(f"{row[key]:>15,}" if key != "engine" else f"{row[key]:>15}" for _, key in COLUMNS),
                    flush=True,
                )
                rows.append(row)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
