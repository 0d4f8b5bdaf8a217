"""What a round costs in Flower's deployment engine when the clients have next to nothing to do.

    python simulations/bench_rounds.py [--nodes 2] [--rounds 20] [--quick]

SuperLink and SuperNodes on loopback, with TLS and authentication (`fedzo.deployment`); the embedded model, one query on
one example. A round is timed by the server from the plan's making to the commit. The same round in one process is the
baseline: what it takes is work, the rest is the transport's. Says how many local steps of the embedded default's size
make the transport's part less than 10% of a round. Ends with one line of JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from fedzo import engine
from fedzo.config import Config, load_config
from fedzo.deployment import Deployment, play
from fedzo.events import read_events
from fedzo.experiment import Experiment
from fedzo.run_folder import RunFolder

SHARE = 0.1  # of a round, that the transport may take


def seconds(folder: RunFolder) -> list[float]:
    """Of each round after the first, which waits for nodes to load their model."""
    events, _ = read_events(folder.event_log)
    return [event["seconds"] for event in events if event["event"] == "round-committed"][1:]


def in_one_process(config: Config, path: Path) -> list[float]:
    folder = RunFolder.create(path, config)
    engine.run(Experiment(config), folder).close()
    return seconds(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    common = [f"data.clients={options.nodes}", f"federation.rounds={rounds}", "evaluation.every=0", "data.test="]
    common += ["data.limit=200", "evaluation.limit=16", "runtime.threads=1", "data.partition=iid"]
    idle = load_config(None, [*common, "method.queries=1", "method.batch_size=1"])
    with tempfile.TemporaryDirectory() as name:
        alone = in_one_process(idle, Path(name) / "alone")
        step = median(in_one_process(load_config(None, common), Path(name) / "step")) / options.nodes
        folder = RunFolder(Path(name) / "deployed")
        with Deployment(folder.path / "deployment", options.nodes) as deployment:
            start = time.monotonic()
            deployment.start()
            started = time.monotonic() - start
            # Seldom shown: what shows it takes processor time from what is measured.
            wire = play(deployment, idle, folder, lambda state: None, pause=10.0)
        deployed = seconds(folder)
    over = median(deployed) - median(alone) / options.nodes
    steps = int((1 - SHARE) / SHARE * over / step) + 1
    figures: dict[str, Any] = {
        "nodes": options.nodes, "rounds": rounds, "start_seconds": round(started, 2),
        "round_seconds_median": round(median(deployed), 3), "round_seconds_least": round(min(deployed), 3),
        "round_seconds_most": round(max(deployed), 3), "one_process_round_seconds": round(median(alone), 4),
        "transport_seconds": round(over, 3), "local_step_seconds": round(step, 4), "local_steps_for_10_percent": steps,
        "wire_per_client_and_round": wire["wire_per_client_and_round"], "model_loads": wire["model_loads"],
    }  # fmt: skip
    for name, value in figures.items():
        print(f"{name:28} {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
