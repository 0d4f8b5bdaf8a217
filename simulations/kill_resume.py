"""Kills `fedzo run` with -9 at random moments, resumes it each time, and compares the ledger with an uninterrupted run.

    python simulations/kill_resume.py [--kills 10] [--config FILE] [--quick]

Ends with one line of JSON: kills, rounds committed at each kill, the two ledger hashes and theta digests, identical.
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 40


def fedzo(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from fedzo.cli import main; main()", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> dict[str, object]:
    out, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"fedzo failed with exit code {process.returncode}:\n{err.decode()}")
    figures: dict[str, object] = json.loads(out.decode().strip().splitlines()[-1])
    return figures


def committed(folder: Path) -> int:
    ledger = folder / "ledger.sqlite"
    if not ledger.exists():
        return 0
    with sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True) as db:
        return int(db.execute("SELECT head_round FROM header").fetchone()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--quick", action="store_true", help="two kills, a short run")
    args = parser.parse_args()
    kills, rounds = (2, 20) if args.quick else (args.kills, ROUNDS)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        settings = ("--config", args.config, "-o", f"federation.rounds={rounds}", "-o", "evaluation.every=5",
                    "-o", "evaluation.limit=50", "--json")  # fmt: skip
        whole = Path(scratch) / "whole"
        started = time.monotonic()
        reference = finish(fedzo("run", *settings, "--out", str(whole)))
        duration = time.monotonic() - started
        print(f"uninterrupted: {rounds} rounds in {duration:.1f} s, ledger {str(reference['ledger_hash'])[:16]}")
        folder, at = Path(scratch) / "killed", []
        for number in range(kills):
            target = (
                1 + number * (rounds - 2) // kills
            )  # committed rounds to wait for: the kills are spread over the run
            exists = (folder / "config.toml").exists()
            command = ("resume", str(folder), "--json") if exists else ("run", *settings, "--out", str(folder))
            process = fedzo(*command)
            while process.poll() is None and committed(folder) < target:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, duration / rounds))  # anywhere within the next rounds, or loading again
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            at.append(committed(folder))
            print(f"kill {number + 1}: {at[-1]} rounds committed")
        resumed = finish(fedzo("resume", str(folder), "--json"))
        verified = finish(fedzo("verify", str(folder), "--json"))
    in_flight = [rounds_done for rounds_done in at if rounds_done < rounds]
    same = all(reference[key] == resumed[key] for key in ("ledger_hash", "theta_digest", "test_accuracy"))
    figures = {
        "kills": kills,
        "committed_at_kill": at,
        "kills_in_flight": len(in_flight),
        "ledger_hash": reference["ledger_hash"],
        "resumed_ledger_hash": resumed["ledger_hash"],
        "digests_verified": verified["digests_compared"],
        "identical": same,
    }
    print(json.dumps(figures))
    if not (same and in_flight):
        sys.exit(1)


if __name__ == "__main__":
    main()
