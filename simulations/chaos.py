"""A deployment in which machines die and misbehave, and what becomes of its run.

    python simulations/chaos.py [--seed 0] [--rounds 130] [--minutes 28] [--out DIR] [--quick]

SuperLink, SuperNodes and ServerApp with TLS and authentication on loopback, each a process (`fedzo.deployment`); the
embedded model and data. One fault after the other, in an order, on nodes and at moments that the seed decides: a fault
is injected while a round is in flight, and counts as survived when the run has gone on and, where it is about a node,
that node has contributed again. In the end the ledger must verify, and theta's digest equal that of a replay by a fresh
process with empty caches. Ends with one line of JSON; exit status 1 when a fault was not survived.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.config import Config, load_config
from fedzo.deployment import Deployment, Node, one_thread_each
from fedzo.errors import RunError
from fedzo.events import read_events
from fedzo.federation.ledger import Ledger
from fedzo.flower import program
from fedzo.run_folder import RunFolder

STEADY = 4  # nodes that are there from the beginning
LATE, WRONG = STEADY, STEADY + 1  # one that comes later, one with another base model
RECOVERY = 240.0  # seconds in which a fault must be overcome
_CLOCK = """
import datetime, time
AHEAD = {ahead}
real_time, real_ns, Real = time.time, time.time_ns, datetime.datetime
time.time = lambda: real_time() + AHEAD
time.time_ns = lambda: real_ns() + AHEAD * 10**9
class Shifted(Real):
    @classmethod
    def now(cls, tz=None):
        return Real.now(tz) + datetime.timedelta(seconds=AHEAD)
    @classmethod
    def utcnow(cls):
        return Real.utcnow() + datetime.timedelta(seconds=AHEAD)
datetime.datetime = Shifted
"""


@dataclass(frozen=True)
class Outcome:
    """A row of the table.

    Attributes:
        fault: what was done.
        round: that was in flight then.
        seconds, rounds: until it was overcome, and rounds committed meanwhile.
        survived: whether it was.
        remark: how that shows.
    """

    fault: str
    round: int
    seconds: float
    rounds: int
    survived: bool
    remark: str


class Chaos:
    """A run on a deployment, and the faults that it can be given."""

    def __init__(self, deployment: Deployment, config: Config, folder: RunFolder, rng: random.Random) -> None:
        self.deployment, self.config, self.folder, self.rng = deployment, config, folder, rng
        self.run = 0
        self.wanted: dict[int, float] = {}  # nodes that are to be up -> when they were started last
        self.outcomes: list[Outcome] = []

    def start(self) -> None:
        self.deployment.start_link()
        self.deployment.start_superexec()
        for node in self.deployment.nodes:
            self.deployment.register(node)
        for node in self.deployment.nodes[:STEADY]:
            self.up(node)
        self.submit()

    def up(self, node: Node) -> None:
        """Starts a node, and again whenever it ends, as a machine's service manager does (`tend`)."""
        self.wanted[node.number] = time.monotonic()
        self.deployment.start_node(node)

    def tend(self) -> None:
        """Starts nodes that have ended: Flower refuses one for a while that it still believes to be there."""
        for node in self.deployment.nodes:
            if not node.up and time.monotonic() - self.wanted.get(node.number, float("inf")) > 6.0:
                self.up(node)

    def submit(self) -> None:
        self.run = self.deployment.submit(self.config, self.folder.path)

    @property
    def rounds(self) -> int:
        """Committed so far."""
        if not self.folder.ledger.exists():
            return 0
        with Ledger(self.folder.ledger) as ledger:
            return ledger.rounds

    def clients(self, since: int) -> set[int]:
        """Who contributed to the rounds from `since` on."""
        with Ledger(self.folder.ledger) as ledger:
            entries = ledger.read(since) if since < ledger.rounds else ()
            return {client for entry in entries for client in entry.clients}

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder.event_log)[0] if event["event"] == name]

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether it has come to be within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.tend()
            if done():
                return True
            time.sleep(0.5)
        return False

    def moment(self) -> int:
        """Waits for a moment while a round is in flight; that round."""
        before = self.rounds
        self.wait(lambda: self.rounds > before, RECOVERY)
        time.sleep(self.rng.uniform(0.5, 4.0))
        return self.rounds

    def inject(self, fault: str, act: Callable[[int], Callable[[], str]]) -> None:
        """Does something at some moment, and waits until it is overcome.

        Args:
            act: does it, given the round in flight; returns what says how it was overcome, "" while it is not.
        """
        round_, start = self.moment(), time.monotonic()
        print(f"{fault}: round {round_}", flush=True)
        overcome, remark = act(round_), ""

        def done() -> bool:
            nonlocal remark
            remark = overcome()
            return bool(remark)

        survived = self.wait(done, RECOVERY)
        took, rounds = time.monotonic() - start, self.rounds - round_
        self.outcomes.append(Outcome(fault, round_, round(took, 1), rounds, survived, remark or "not overcome"))
        print(
            f"    {'survived' if survived else 'NOT SURVIVED'} after {took:.0f} s, {rounds} rounds: {remark}",
            flush=True,
        )

    def back(self, node: Node, since: int) -> str:
        """Says when a node contributes again."""
        return f"client {node.number} contributes again" if node.number in self.clients(since) else ""

    def kept(self, node: Node) -> int:
        """The round of theta on a node's disk."""
        (path,) = (node.home / "state").glob("*/replica")
        return int(json.loads(path.read_bytes().partition(b"\n")[0])["rounds"])

    def any(self) -> Node:
        return self.rng.choice(self.deployment.nodes[:STEADY])

    def node_killed(self, round_: int) -> Callable[[], str]:
        node = self.any()
        self.deployment.kill(node.process)
        since = self.rounds + 1
        return lambda: self.back(node, since)

    def worker_killed(self, round_: int) -> Callable[[], str]:
        node = self.any()
        loads, pid = node.loads(), int(node.worker()["pid"])
        os.kill(pid, 9)
        since = self.rounds

        def overcome() -> str:
            fresh = node.worker()
            if not fresh or fresh["pid"] == pid or not self.back(node, since):
                return ""
            return f"client {node.number} contributes again; new worker, {node.loads() - loads} model load"

        return overcome

    def state_lost(self, round_: int) -> Callable[[], str]:
        node = self.any()
        self.deployment.kill(node.process)
        for worker in [node.worker()]:
            if worker:
                os.kill(int(worker["pid"]), 9)
        shutil.rmtree(node.home / "state", ignore_errors=True)
        since = self.rounds + 1
        return lambda: self.back(node, since)

    def late_joiner(self, round_: int) -> Callable[[], str]:
        node = self.deployment.nodes[LATE]
        self.up(node)
        return lambda: self.back(node, round_)

    def wrong_base(self, round_: int) -> Callable[[], str]:
        node = self.deployment.nodes[WRONG]
        self.up(node)

        def overcome() -> str:
            refused = [event for event in self.events("client-refused") if "fingerprint" in event["reason"]]
            if not refused or self.rounds < round_ + 2 or WRONG in self.clients(0):
                return ""
            return "refused at the handshake: its fingerprint"

        return overcome

    def server_killed(self, round_: int) -> Callable[[], str]:
        for pid in self.deployment.server_app():
            os.kill(pid, 9)
        since = self.rounds
        self.wait(lambda: self.deployment.outcome(self.run)[0].startswith("finished"), 120.0)
        self.submit()
        return lambda: f"went on from round {since} of the ledger" if self.rounds > since + 1 else ""

    def link_killed(self, round_: int) -> Callable[[], str]:
        self.deployment.kill(self.deployment.link)
        time.sleep(self.rng.uniform(1.0, 5.0))
        since = self.rounds
        self.deployment.start_link()

        def overcome() -> str:
            if self.deployment.outcome(self.run)[0].startswith("finished"):
                self.submit()
            return "the ServerApp went on when it was back" if self.rounds > since + 1 else ""

        return overcome

    def machine_killed(self, round_: int) -> Callable[[], str]:
        """Server process, SuperExec and SuperLink at once, the database of the SuperLink lost with them."""
        for pid in self.deployment.server_app():
            os.kill(pid, 9)
        self.deployment.kill(self.deployment.superexec)
        self.deployment.kill(self.deployment.link)
        self.deployment.forget()
        since = self.rounds
        self.deployment.start_link()
        self.deployment.start_superexec()
        for node in self.deployment.nodes:
            self.deployment.register(node)
        for node in self.deployment.nodes:  # their keys have new numbers at the new SuperLink
            if node.up:
                self.deployment.kill(node.process)
                self.up(node)
        self.submit()
        return lambda: f"went on from round {since} of the ledger" if self.rounds > since + 1 else ""

    def disk_full(self, round_: int) -> Callable[[], str]:
        node = self.any()
        pid, kept = int(node.worker()["pid"]), self.kept(node)
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))  # from now on no write to a file succeeds
        since, end = self.rounds, time.monotonic() + 25.0  # long enough that theta's file falls due

        def overcome() -> str:
            if time.monotonic() < end or self.rounds < since + 3 or not self.back(node, since + 1):
                return ""
            unwritten = self.kept(node) == kept
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
            return f"client {node.number} contributed, its theta stayed at round {kept} on disk" if unwritten else ""

        return overcome

    def clock_wrong(self, round_: int) -> Callable[[], str]:
        node = self.any()
        self.deployment.kill(node.process)
        ahead = self.rng.choice([-3 * 3600, 3 * 3600])
        shim = node.home / "clock"
        shim.mkdir(exist_ok=True)
        (shim / "sitecustomize.py").write_text(_CLOCK.format(ahead=ahead), encoding="utf-8")
        node.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(shim), os.environ.get("PYTHONPATH")]))
        since, end = self.rounds + 1, time.monotonic() + 90.0

        def overcome() -> str:
            if self.rounds < since + 3 or (not self.back(node, since) and time.monotonic() < end):
                return ""
            took_part = bool(self.back(node, since))
            node.environment.pop("PYTHONPATH")
            self.deployment.kill(node.process)
            what = "took part" if took_part else "was left out"
            return f"{ahead / 3600:+.0f} h: client {node.number} {what}, the others went on"

        return overcome

    def cut_off(self, round_: int) -> Callable[[], str]:
        node = self.any()
        node.relay.cut()
        time.sleep(self.rng.uniform(5.0, 15.0))
        node.relay.mend()
        since = self.rounds
        return lambda: self.back(node, since)


FAULTS: dict[str, Callable[[Chaos, int], Callable[[], str]]] = {
    "SuperNode killed and restarted": Chaos.node_killed,
    "worker killed": Chaos.worker_killed,
    "node killed, its state lost": Chaos.state_lost,
    "late joiner": Chaos.late_joiner,
    "node with another base model": Chaos.wrong_base,
    "ServerApp killed": Chaos.server_killed,
    "SuperLink killed and restarted": Chaos.link_killed,
    "server machine lost but for the ledger": Chaos.machine_killed,
    "disk of a client full": Chaos.disk_full,
    "clock of a client wrong": Chaos.clock_wrong,
    "network of a node cut": Chaos.cut_off,
}
QUICK = ("worker killed", "late joiner", "node with another base model", "ServerApp killed")


def settings(rounds: int, seed: int) -> Config:
    return load_config(
        None,
        [
            "model.source=embedded", f"seed={seed}", f"data.clients={WRONG + 1}", f"federation.rounds={rounds}",
            "federation.quorum=2", f"runtime.start_clients={STEADY}", "runtime.join_timeout=300",
            "runtime.round_timeout=25", "evaluation.every=0", "evaluation.divergence=0", "method.learning_rate=1e-4",
        ],
    )  # fmt: skip


def fresh(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """What a fedzo command says in a fresh process with an empty home and empty caches."""
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home, "FEDZO_CACHE": f"{home}/cache", "FEDZO_STATE": f"{home}/state"}
        command = [program("fedzo"), *arguments, str(folder), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"fedzo {arguments[0]} failed: {done.stderr.strip()}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=0, help="of the run; 0: 130, or 30 with --quick")
    parser.add_argument("--minutes", type=float, default=28.0, help="after which no fault is injected any more")
    parser.add_argument("--out", type=Path, default=None, help="run folder; none: a temporary one")
    parser.add_argument("--faults", nargs="*", default=None, metavar="NAME", help="some only")
    parser.add_argument("--quick", action="store_true", help="few faults")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder((options.out or Path(name) / "run").resolve())
        config = settings(options.rounds or (30 if options.quick else 130), options.seed)
        rng = random.Random(options.seed)
        names = options.faults or list(QUICK if options.quick else FAULTS)
        rng.shuffle(names)
        with Deployment(folder.path / "deployment", WRONG + 1) as deployment:
            other = Path(name) / "other"
            make_other_base(other)
            deployment.nodes[WRONG].config["model"] = str(other)
            chaos = Chaos(deployment, one_thread_each(config, STEADY), folder, rng)
            chaos.start()
            chaos.wait(lambda: chaos.rounds > 0, 600.0)
            for fault in names:
                if time.monotonic() - start < options.minutes * 60 and chaos.rounds < config.federation.rounds - 1:
                    chaos.inject(fault, lambda round_, act=FAULTS[fault]: act(chaos, round_))
                else:
                    chaos.outcomes.append(Outcome(fault, chaos.rounds, 0.0, 0, False, "not injected: no time was left"))
            finished = chaos.wait(
                lambda: deployment.outcome(chaos.run)[0].startswith("finished"), options.minutes * 60 + 600.0
            )
            status = deployment.outcome(chaos.run)[0]
            loads = [node.loads() for node in deployment.nodes]
            report(chaos, folder, finished and status == "finished:completed", loads, time.monotonic() - start)


def make_other_base(path: Path) -> None:
    """The embedded model with one weight changed."""
    from fedzo.models import load_model

    loaded = load_model("embedded", "causal")
    parameter = next(iter(loaded.model.parameters()))
    parameter.data.view(-1)[0] += 1.0
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)


def report(chaos: Chaos, folder: RunFolder, completed: bool, loads: list[int], seconds: float) -> None:
    """The table, what the ledger says, and the line of JSON."""
    with Ledger(folder.ledger) as ledger:
        head, rounds, planned = ledger.head.hex(), ledger.rounds, ledger.spec.rounds
        (last,) = ledger.read(rounds - 1)
        dropped: dict[str, int] = {}
        for summary in ledger.summaries():
            for reason, count in summary["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        empty = sum(not entry.clients for entry in ledger.read())
    verified = fresh(folder.path, ["verify"])
    replayed = fresh(folder.path, ["replay", "--out", str(folder.path / "replayed")])
    print(f"\n{'fault':40} {'round':>5} {'seconds':>8} {'rounds':>6}  survived  remark")
    for row in chaos.outcomes:
        said = "yes" if row.survived else "NO"
        print(f"{row.fault:40} {row.round:5} {row.seconds:8.1f} {row.rounds:6}  {said:8}  {row.remark}")
    print(f"\nverified by a fresh process: {verified}\nreplayed by a fresh process: {replayed}")
    same = replayed["theta_digest"] == last.digest.hex()
    figures = {
        "faults": len(chaos.outcomes), "survived": sum(row.survived for row in chaos.outcomes), "completed": completed,
        "rounds": rounds, "rounds_planned": planned, "rounds_without_quorum": empty, "dropped": dropped,
        "model_loads": loads, "ledger_hash": head, "theta_digest": last.digest.hex(), "replay_equal": same,
        "seconds": round(seconds, 1),
    }  # fmt: skip
    print(json.dumps(figures))
    if not (completed and same and rounds == planned and all(row.survived for row in chaos.outcomes)):
        sys.exit(1)


if __name__ == "__main__":
    main()
