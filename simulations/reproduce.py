"""The same run again: twice, with 1 and 2 threads, through Flower's simulation; then its ledger replayed.

    python simulations/reproduce.py [--config FILE] [--rounds N] [--no-flower] [--quick]

Ends with one line of JSON: the ledger hash of each way, whether all are equal, and what a replay of the whole ledger
and of its half gives against what the run recorded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fedzo.federation.ledger import Ledger


def fedzo(*arguments: str) -> dict[str, object]:
    """Runs the command line in a process of its own; returns the figures it prints."""
    command = [sys.executable, "-c", "from fedzo.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"fedzo {' '.join(arguments)} failed with exit code {done.returncode}:\n{done.stderr}")
    figures: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's simulation out")
    parser.add_argument("--quick", action="store_true", help="four rounds, without Flower")
    args = parser.parse_args()
    rounds = 4 if args.quick else args.rounds
    settings = ("run", "--config", args.config, "-o", f"federation.rounds={rounds}", "-o", "evaluation.every=0")
    ways = {"first": (), "again": (), "1 thread": ("-o", "runtime.threads=1"), "2 threads": ("-o", "runtime.threads=2")}
    if not (args.quick or args.no_flower):
        ways["flower"] = ("--engine", "flower")
    with tempfile.TemporaryDirectory() as scratch:
        hashes: dict[str, object] = {}
        for way, options in ways.items():
            figures = fedzo(*settings, *options, "--out", str(Path(scratch) / way.replace(" ", "-")))
            hashes[way] = figures["ledger_hash"]
            print(f"{way:<10} {figures['ledger_hash']}")
        run = Path(scratch) / "first"
        half = rounds // 2
        with Ledger(run / "ledger.sqlite") as ledger:
            recorded = {entry.round + 1: entry.digest.hex() for entry in ledger.read()}
            accuracy = ledger.evaluations("test")[rounds]["accuracy"]
        replayed = {
            at: fedzo("replay", str(run), "--round", str(at), "--out", str(Path(scratch) / f"model-{at}"))[
                "theta_digest"
            ]
            for at in (half, rounds)
        }
        evaluated = fedzo("evaluate", str(run), "--split", "test")
        verified = fedzo("verify", str(run))
    result = {
        "rounds": rounds,
        "ledger_hash": hashes,
        "ledgers_equal": len(set(hashes.values())) == 1,
        "replay_equals_run": replayed[rounds] == recorded[rounds],
        "half_replay_equals_round": replayed[half] == recorded[half],
        "accuracy_equal": evaluated["accuracy"] == accuracy,
        "digests_verified": verified["digests_compared"],
    }
    print(json.dumps(result))
    if not all(result[key] for key in result if key.endswith(("equal", "run", "round"))):
        sys.exit(1)


if __name__ == "__main__":
    main()
