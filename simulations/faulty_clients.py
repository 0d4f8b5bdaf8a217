"""Clients that answer wrongly in each way that the protocol names: what the server drops, and that nothing is hurt.

    python simulations/faulty_clients.py [--config FILE] [--rounds N] [--quick]

In every round the even clients answer rightly, client 0 twice, and one odd client after the other answers wrongly. The
ledger must equal, bit for bit, that of a run in which the faulty clients never answered. Ends with one line of JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedzo import engine
from fedzo.config import load_config
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator
from fedzo.federation.messages import Contribution, decode
from fedzo.report import summarise, verify
from fedzo.run_folder import RunFolder

Fault = Callable[[Contribution, bytes], list[bytes]]


def _scalars(value: float) -> Fault:
    def fault(right: Contribution, plan: bytes) -> list[bytes]:
        scalars = right.scalars.copy()
        scalars[0, 0] = value
        return [replace(right, scalars=scalars).to_bytes()]

    return fault


# Name -> the wrong messages made of a right contribution, and the reason with which the server must drop each.
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "random bytes": (lambda right, plan: [np.random.default_rng(0).bytes(200)], ("malformed",)),
    "cut short": (lambda right, plan: [right.to_bytes()[:-5]], ("malformed",)),
    "too long": (lambda right, plan: [right.to_bytes() + bytes(1000)], ("malformed",)),
    "the plan sent back": (lambda right, plan: [plan], ("malformed",)),
    "another run": (lambda right, plan: [replace(right, run_id=bytes(8)).to_bytes()], ("wrong-run",)),
    "an old round": (lambda right, plan: [replace(right, round=right.round + 7).to_bytes()], ("late",)),
    "in another's name": (lambda right, plan: [replace(right, client=right.client - 1).to_bytes()], ("not-asked",)),
    "a seed not asked for": (
        lambda right, plan: [replace(right, seeds=right.seeds + np.uint64(1)).to_bytes()],
        ("seeds",),
    ),
    "a seed missing": (
        lambda right, plan: [replace(right, seeds=right.seeds[:, 1:], scalars=right.scalars[:, 1:]).to_bytes()],
        ("shape",),
    ),
    "another example count": (lambda right, plan: [replace(right, examples=10**6).to_bytes()], ("examples",)),
    "NaN": (_scalars(float("nan")), ("not-finite",)),
    "infinity": (_scalars(float("inf")), ("not-finite",)),
    "beyond the bound": (_scalars(1e30), ("bound",)),
    "no answer": (lambda right, plan: [], ("no-reply",)),
}


def play(config_file: str, rounds: int, folder: Path, names: Sequence[str] | None) -> dict[str, object]:
    """A run in which odd clients answer wrongly (in the ways of `names`, in turn) or, for None, not at all."""
    overrides = (f"federation.rounds={rounds}", "evaluation.every=0", "evaluation.limit=50")
    config = load_config(Path(config_file), overrides).resolved()
    experiment = Experiment(config)
    turn = 0

    def connect(experiment: Experiment, coordinator: Coordinator) -> engine.Transport:
        right = engine.in_process(experiment, coordinator)

        def exchange(parcels: Sequence[engine.Parcel]) -> Iterable[engine.Parcel]:
            nonlocal turn
            plans = dict(parcels)
            for client, answer in right.exchange(parcels):
                if client % 2 == 0:
                    yield client, answer
                    if client == 0 and names is not None:
                        yield client, answer  # twice
                elif names is not None:
                    contribution = decode(answer)
                    assert isinstance(contribution, Contribution)
                    fault, _ = FAULTS[names[turn % len(names)]]
                    turn += 1
                    for wrong in fault(contribution, plans[client]):
                        yield client, wrong

        return engine.Transport(exchange)

    with engine.run(experiment, RunFolder.create(folder, config), connect=connect) as ledger:
        return {**summarise(ledger), "digests_verified": verify(ledger, experiment)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="three rounds")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as scratch:
        absent = play(args.config, rounds, Path(scratch) / "absent", None)
        faulty = play(args.config, rounds, Path(scratch) / "faulty", list(FAULTS))
    expected = {"duplicate": rounds}
    wrong = rounds * 5  # of the ten clients five are odd
    for turn in range(wrong):
        (reason,) = FAULTS[list(FAULTS)[turn % len(FAULTS)]][1]
        expected[reason] = expected.get(reason, 0) + 1
        if reason == "late":  # an answer to another round leaves this one without
            expected["no-reply"] = expected.get("no-reply", 0) + 1
    print(f"{'reason':<14}{'dropped':>8}{'expected':>10}")
    dropped = faulty["dropped"]
    assert isinstance(dropped, dict)
    for reason in sorted({*expected, *dropped}):
        print(f"{reason:<14}{dropped.get(reason, 0):>8}{expected.get(reason, 0):>10}")
    same = faulty["ledger_hash"] == absent["ledger_hash"] and faulty["theta_digest"] == absent["theta_digest"]
    print(f"ledger equal to that of a run without the faulty clients: {same}")
    figures = {
        "rounds": rounds,
        "faults": len(FAULTS) + 1,
        "dropped": dropped,
        "as_expected": dropped == expected,
        "ledger_unhurt": same,
        "digests_verified": faulty["digests_verified"],
    }
    print(json.dumps(figures))
    if not (same and dropped == expected):
        sys.exit(1)


if __name__ == "__main__":
    main()
