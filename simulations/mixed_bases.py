"""One sparse run on many bases: clients in nf4, int8 and float32 against all clients in float32.

    python simulations/mixed_bases.py [--config FILE] [--override KEY=VALUE] [--rounds N] [--engine flower] [--quick]

Without --config: the embedded model, of which the 0.1% most sensitive weights are trained. The same run twice, with one
mask: every client on float32, and clients on nf4, int8 and float32 in turn (or what `model.client_quantisation` of
the configuration says). Then theta of every party of the mixed run: the server's, each base's replica as it moved along
the run, and a replay by a party on each base from nothing but the ledger and the base model. With --engine flower the
mixed run goes once more through Flower's simulation. Ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedzo import engine
from fedzo.config import Config, Quantisation, load_config
from fedzo.experiment import Experiment, open_experiment
from fedzo.federation.coordinator import Coordinator, replay
from fedzo.federation.ledger import Ledger
from fedzo.flower import run_flower
from fedzo.report import summarise
from fedzo.run_folder import RunFolder
from fedzo.runtime import keep_memory

BASES: tuple[Quantisation, ...] = ("nf4", "int8", "none")
EMBEDDED = (
    "space.kind=sparse", "space.mask=sensitive", "space.density=0.001", "space.exclude=*embed*", "data.clients=9",
    "method.queries=4", "method.learning_rate=0.1", "evaluation.every=0",
)  # fmt: skip


def on_bases(config: Config, bases: tuple[Quantisation, ...]) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"client_quantisation": bases})})


def played(experiment: Experiment, folder: RunFolder) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of a run, and the digest of each base's replica after its last round."""
    kept: list[engine.Bases] = []

    def connect(experiment: Experiment, coordinator: Coordinator) -> engine.Transport:
        own = engine.Bases(
            experiment.config, coordinator.spec, lambda config: experiment.on_base(config.model.quantisation)
        )
        kept.append(own)
        return engine.in_process(experiment, coordinator, own)

    with engine.run(experiment, folder, connect=connect) as ledger:
        digests = {}
        for base, (_, replica) in kept[0].kept.items():
            replica.apply(entry.records() for entry in ledger.read(replica.rounds))  # the round after the last plan
            digests[base] = replica.digest().hex()
        return summarise(ledger), digests


def replayed(config: Config, folder: RunFolder) -> tuple[str, float | None]:
    """Theta's digest and the accuracy on test data, of a party that has this base and the ledger."""
    with Ledger(folder.ledger) as ledger:
        party = open_experiment(config, ledger)
        engine.check_same(ledger, party)
        replica = party.replica(ledger.spec)
        replay(ledger, replica)
        accuracy = party.evaluate(replica.theta, party.test)["accuracy"] if party.test is not None else None
        return replica.digest().hex(), accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, help="default: 60, or what the configuration says")
    parser.add_argument("--engine", choices=("local", "flower"), default="local")
    parser.add_argument("--quick", action="store_true", help="four rounds, few examples")
    args = parser.parse_args()
    keep_memory()
    overrides = [] if args.config else [*EMBEDDED, "federation.rounds=60"]
    overrides += [f"federation.rounds={args.rounds}"] if args.rounds else []
    if args.quick:
        overrides += ["federation.rounds=4", "data.limit=200", "evaluation.limit=50", "space.calibration_examples=16"]
    config = load_config(args.config, [*overrides, *args.override]).resolved()
    bases = config.model.client_quantisation or BASES

    with tempfile.TemporaryDirectory() as scratch:
        first = Experiment(on_bases(config, ()).on_base("none"))
        if first.mask is not None:
            print(f"mask: {first.mask.size} of {first.spec().parameters} entries, method {first.mask.method}")
        same = RunFolder.create(Path(scratch) / "same", first.config)
        plain, _ = played(first, same)
        print(f"{'clients on':<24}{'accuracy before':>16}{'after':>9}{'theta':>16}")
        print(_row("none", plain))

        mixed_config = on_bases(first.config, bases)
        folder = RunFolder.create(Path(scratch) / "mixed", mixed_config)
        mixed, replicas = played(Experiment(mixed_config, first.mask), folder)
        print(_row(", ".join(f"{base} {count}" for base, count in mixed["bases"].items()), mixed))

        print(f"\n{'party of the mixed run':<24}{'accuracy':>16}{'theta':>25}")
        print(f"{'server':<40}{mixed['theta_digest'][:16]:>25}")
        for base, digest in replicas.items():
            print(f"{f'clients on {base}':<40}{digest[:16]:>25}")
        alone = {base: replayed(mixed_config.on_base(base), folder) for base in dict.fromkeys((*bases, "none"))}
        for base, (digest, accuracy) in alone.items():
            shown = float("nan") if accuracy is None else accuracy
            print(f"{f'replay on {base}':<24}{shown:>16.4f}{digest[:16]:>25}")
        digests = {"server": mixed["theta_digest"], **{f"clients on {base}": d for base, d in replicas.items()}}
        digests |= {f"replay on {base}": digest for base, (digest, _) in alone.items()}
        figures: dict[str, Any] = {
            "rounds": mixed["rounds"],
            "clients": mixed["clients"],
            "bases": mixed["bases"],
            "trainable": mixed["trainable"],
            "accuracy_before": plain.get("test_accuracy_before"),
            "accuracy_float32": plain.get("test_accuracy"),
            "accuracy_mixed": mixed.get("test_accuracy"),
            "accuracy_of_replays": {base: accuracy for base, (_, accuracy) in alone.items()},
            "accepted": mixed["accepted"],
            "dropped": mixed["dropped"],
            "theta_digests": digests,
        }
        if args.engine == "flower":
            run_flower(mixed_config, Path(scratch) / "flower")
            with Ledger(Path(scratch) / "flower" / "ledger.sqlite") as ledger:
                flower = summarise(ledger)
            digest, _ = replayed(mixed_config, RunFolder(Path(scratch) / "flower"))
            print(f"{'Flower: server':<40}{flower['theta_digest'][:16]:>25}")
            print(f"{'Flower: replay on none':<40}{digest[:16]:>25}")
            figures["flower"] = {
                "bases": flower["bases"],
                "accepted": flower["accepted"],
                "dropped": flower["dropped"],
                "accuracy": flower.get("test_accuracy"),
                "replay_equals_run": digest == flower["theta_digest"],
                "ledger_equals_local": flower["ledger_hash"] == mixed["ledger_hash"],
            }
    figures["one_theta"] = len(set(digests.values())) == 1 and figures.get("flower", {}).get("replay_equals_run", True)
    print(json.dumps(figures))
    if not figures["one_theta"] or mixed["dropped"]:
        sys.exit(1)


def _row(bases: str, figures: dict[str, Any]) -> str:
    before, after = (figures.get(name, float("nan")) for name in ("test_accuracy_before", "test_accuracy"))
    return f"{bases:<24}{before:>16.4f}{after:>9.4f}{figures['theta_digest'][:12]:>16}"


if __name__ == "__main__":
    main()
