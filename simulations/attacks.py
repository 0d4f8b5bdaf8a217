"""Clients that attack: what the validator drops, what each aggregation absorbs, and what it costs in accuracy.

    python simulations/attacks.py [--config FILE] [-o KEY=VALUE] [--rounds N] [--seeds N] [--share S] [--attacks NAMES]
                                  [--aggregations NAMES] [--out DIR] [--quick] [--report]

A share of the clients, drawn anew with each seed, attacks in every round. They collude and see everything: all right
answers of the round, the bounds, the aggregation. Their answers are messages of the protocol and go through the
coordinator's own checks. Each attack meets mean, median, trimmed-mean (trim = the share) and norm-bound (the median of
the round's norms). A run that diverges stops, as any run does; its accuracy is that of the theta where it stopped.

Accuracy is on test data, after the last round. Results are JSON files under --out: what was stopped goes on where it
was. Writes table.md and attacks.png there, and ends with one line of JSON.
"""

import fedzo  # noqa: F401  # isort: skip  (before torch: it sets what OpenMP reads when it loads)

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cells import MissingError, Player, Result, percent
from matplotlib.figure import Figure

from fedzo import engine
from fedzo.config import Config, load_config
from fedzo.errors import DivergedError
from fedzo.experiment import Experiment
from fedzo.federation.coordinator import Coordinator, replay
from fedzo.federation.ledger import Ledger
from fedzo.federation.messages import Contribution, decode
from fedzo.run_folder import RunFolder, strict_json

AGGREGATIONS = ("mean", "median", "trimmed-mean", "norm-bound")  # in this order and colour
CLAIM = 10**6  # examples
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """What an attacker sees when it answers.

    Attributes:
        honest: the right scalars of those who do not attack, float64 [n, K, P].
        attackers: how many clients attack.
        bound: the largest magnitude that the validator lets through.
        earlier: its own right answer of the round before; None in the first round.
        rng: shared by the attackers.
    """

    honest: Array
    attackers: int
    bound: float
    earlier: Contribution | None
    rng: np.random.Generator


# A right answer and what is seen -> the answer that is sent; None: none is.
Attack = Callable[[Contribution, View], Contribution | None]


def _with(right: Contribution, scalars: Array) -> Contribution:
    return replace(right, scalars=scalars.astype(np.float32))


def absent(right: Contribution, view: View) -> None:
    """No answer: what the attackers' data is worth, and all that dropping them costs."""


def scaled(right: Contribution, view: View, factor: float) -> Contribution:
    return _with(right, right.scalars.astype(np.float64) * factor)


def gaussian(right: Contribution, view: View, factor: float) -> Contribution:
    """Noise of the honest scalars' root mean square, times a factor."""
    scale = factor * math.sqrt(np.mean(view.honest**2))
    return _with(right, scale * view.rng.normal(size=right.scalars.shape))


def not_a_number(right: Contribution, view: View) -> Contribution:
    """All attackers in the same entry."""
    scalars = right.scalars.astype(np.float64)
    scalars[0, 0] = math.nan
    return _with(right, scalars)


def stale(right: Contribution, view: View, forged: Sequence[str] = ()) -> Contribution:
    """The answer of the round before, some of its fields forged to those of this round."""
    earlier = view.earlier or right
    return replace(earlier, **{name: getattr(right, name) for name in forged})


def little(right: Contribution, view: View) -> Contribution:
    """Away from the mean by as many standard deviations as hide in the crowd (Baruch et al., arXiv 1902.06635)."""
    n, m = len(view.honest) + view.attackers, view.attackers
    supporters = n // 2 + 1 - m
    z = statistics.NormalDist().inv_cdf((n - m - supporters) / (n - m))
    mean, deviation = view.honest.mean(axis=0), view.honest.std(axis=0)
    return _with(right, mean - z * deviation * np.sign(mean))


def opposed(right: Contribution, view: View) -> Contribution:
    """Against the honest mean, with the median of the honest norms: as much as norm-bound leaves as it is."""
    norms = np.sort(np.sqrt((view.honest**2).sum(axis=(1, 2))))
    return _with(right, _against(view) * norms[(len(norms) - 1) // 2])


def extreme(right: Contribution, view: View) -> Contribution:
    """Against the honest mean, as far as the validator lets through."""
    against = _against(view)
    return _with(right, against / np.abs(against).max() * view.bound * 0.999)


def _against(view: View) -> Array:
    """The unit vector [K, P] that undoes the honest mean."""
    mean = view.honest.mean(axis=0)
    away: Array = -mean / np.linalg.norm(mean)
    return away


ATTACKS: dict[str, Attack | None] = {
    "none": None,
    "absent": absent,
    "NaN": not_a_number,
    "stale": stale,
    "stale, round forged": partial(stale, forged=("round",)),
    "stale, seeds forged too": partial(stale, forged=("round", "seeds")),
    "Gaussian": partial(gaussian, factor=1.0),
    "Gaussian x100": partial(gaussian, factor=100.0),
    "sign flip": partial(scaled, factor=-1.0),
    "sign flip, overstated": partial(scaled, factor=-1.0),
    "x1000": partial(scaled, factor=1000.0),
    "a little is enough": little,
    "opposed": opposed,
    "opposed, extreme": extreme,
}
# These also claim to have many examples, from the handshake on.
OVERSTATED = {"sign flip, overstated"}
# These compare the clients' answers to one seed.
OF_SHARED_SEEDS = {"a little is enough", "opposed", "opposed, extreme"}


@dataclass(frozen=True)
class Cell:
    """A run."""

    attack: str
    aggregation: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.attack.replace(',', '').replace(' ', '-')}_{self.aggregation}_s{self.seed}"


def choose_attackers(clients: int, share: float, seed: int) -> frozenset[int]:
    """Which clients attack."""
    drawn = np.random.default_rng(seed).choice(clients, round(share * clients), replace=False)
    return frozenset(drawn.tolist())


def connect(
    experiment: Experiment, coordinator: Coordinator, *, name: str, attackers: frozenset[int], seed: int
) -> engine.Transport:
    """The transport of one process, between which and the coordinator the attackers sit."""
    right, attack, bound = engine.in_process(experiment, coordinator), ATTACKS[name], coordinator.spec.scalar_bound
    rng, earlier = np.random.default_rng([seed, 1]), dict[int, Contribution]()
    if name in OVERSTATED:
        for client in attackers:
            hello = experiment.worker(client, coordinator.replica).hello()
            coordinator.admit(replace(hello, examples=CLAIM))

    def exchange(parcels: Sequence[engine.Parcel]) -> Iterable[engine.Parcel]:
        answers = [(client, data, decode(data)) for client, data in right.exchange(parcels)]
        honest = [
            answer.scalars.astype(np.float64)
            for client, _, answer in answers
            if isinstance(answer, Contribution) and client not in attackers
        ]
        for client, data, answer in answers:
            if attack is None or client not in attackers or not honest or not isinstance(answer, Contribution):
                yield client, data
                continue
            view = View(np.stack(honest), len(attackers), bound, earlier.get(client), rng)
            own = replace(answer, examples=CLAIM) if name in OVERSTATED else answer
            sent, earlier[client] = attack(own, view), own
            if sent is not None:
                yield client, sent.to_bytes()

    return engine.Transport(exchange)


class Comparison:
    """Plays cells; holds one experiment, of the last seed, which a cell's process inherits.

    Args:
        config: of a seed, and of an aggregation.
        share: of the clients, that attack.
        out: folder of the results.
    """

    def __init__(self, config: Callable[[int, str], Config], share: float, out: Path) -> None:
        self._config, self._share = config, share
        self._held: tuple[int, Experiment] | None = None
        self._play = Player(out, self._work, "fork", lambda found: f"accuracy {found['accuracy']:.1%}")

    def __call__(self, cell: Cell) -> Result:
        if self._held is None or self._held[0] != cell.seed:
            experiment = Experiment(self._config(cell.seed, cell.aggregation))
            for number in range(experiment.config.data.clients):
                experiment.client_data(number)
            _ = experiment.validation, experiment.test, experiment.theta0_digest
            self._held = cell.seed, experiment
        return self._play(cell)

    def _work(self, cell: Cell) -> Result:
        assert self._held is not None
        torch.set_num_threads(1)
        experiment = self._held[1]
        experiment.config = self._config(cell.seed, cell.aggregation)
        attackers = choose_attackers(experiment.config.data.clients, self._share, cell.seed)
        meet = partial(connect, name=cell.attack, attackers=attackers, seed=cell.seed)
        stopped = False
        with TemporaryDirectory() as scratch:
            folder = RunFolder.create(Path(scratch) / "run", experiment.config)
            try:
                engine.run(experiment, folder, connect=meet).close()
            except DivergedError:
                stopped = True
            with Ledger(folder.ledger) as ledger:
                summaries, tests, rounds = ledger.summaries(), ledger.evaluations("test"), ledger.rounds
                if stopped and experiment.test is not None:
                    replica = experiment.replica(ledger.spec)
                    replay(ledger, replica)
                    tests[rounds] = experiment.evaluate(replica.theta, experiment.test)
        dropped = Counter[str]()
        for summary in summaries:
            dropped.update(summary["dropped"])
        return {
            "accuracy_before": tests[0]["accuracy"],
            "accuracy": tests[rounds]["accuracy"],
            "loss": tests[rounds]["loss"],
            "stopped": stopped,
            "rounds": rounds,
            "attackers": sorted(attackers),
            "answers": 0 if ATTACKS[cell.attack] is None else rounds * len(attackers),
            "dropped": dict(sorted(dropped.items())),
            "largest_record": max(summary["max_scalar"] for summary in summaries),
        }


def rows_of(results: Mapping[Cell, Result]) -> list[Result]:
    """One row for each attack and aggregation: means over the seeds and, of accuracies, the lowest and the highest."""
    rows = []
    for attack, aggregation in dict.fromkeys((c.attack, c.aggregation) for c in results):
        own = [found for c, found in results.items() if (c.attack, c.aggregation) == (attack, aggregation)]
        accuracies, dropped = [r["accuracy"] for r in own], Counter[str]()
        for found in own:
            dropped.update(found["dropped"])
        rows.append(
            {
                "attack": attack,
                "aggregation": aggregation,
                "seeds": len(own),
                "accuracy": statistics.fmean(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "accuracy_before": statistics.fmean(r["accuracy_before"] for r in own),
                "stopped": sum(r["stopped"] for r in own),
                "rounds": sum(r["rounds"] for r in own),
                "answers": sum(r["answers"] for r in own),
                "dropped": dict(sorted(dropped.items())),
                "largest_record": max(r["largest_record"] for r in own),
            }
        )
    return rows


def dropped_of(rows: Sequence[Result]) -> str:
    """Of an attack's rows: for each reason the share of the attackers' answers, the least and the largest."""
    told = []
    for reason in sorted({reason for r in rows for reason in r["dropped"]}):
        shares = [r["dropped"].get(reason, 0) / max(1, r["answers"]) for r in rows]
        low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
        told.append(f"{reason} {high}%" if low == high else f"{reason} {low} to {high}%")
    return ", ".join(told) or "nothing"


def table(rows: Sequence[Result]) -> str:
    """Markdown."""
    played = [aggregation for aggregation in AGGREGATIONS if any(r["aggregation"] == aggregation for r in rows)]
    lines = [f"| attack | dropped | {' | '.join(played)} |", f"|---|---|{'---|' * len(played)}"]
    for attack in dict.fromkeys(r["attack"] for r in rows):
        own = {r["aggregation"]: r for r in rows if r["attack"] == attack}
        told = []
        for aggregation in played:
            r = own.get(aggregation)
            text = "-" if r is None else percent(r["accuracy"], r["lowest"], r["highest"])
            told.append(f"{text}, {r['stopped']} of {r['seeds']} stopped" if r is not None and r["stopped"] else text)
        lines.append(f"| {attack} | {dropped_of(list(own.values()))} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Result], path: Path) -> None:
    """Accuracy of each attack, a mark for each aggregation."""
    attacks = list(dict.fromkeys(r["attack"] for r in rows))
    figure = Figure(figsize=(8.0, 1.2 + 0.42 * len(attacks)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (aggregation, marker) in enumerate(zip(AGGREGATIONS, "osD^", strict=True)):
        own = [r for r in rows if r["aggregation"] == aggregation]
        at = [attacks.index(r["attack"]) + 0.17 * (i - 1.5) for r in own]
        mean = [r["accuracy"] for r in own]
        low = [max(0.0, r["accuracy"] - r["lowest"]) for r in own]
        high = [max(0.0, r["highest"] - r["accuracy"]) for r in own]
        if own:
            style = {"fmt": marker, "color": f"C{i}", "capsize": 2, "markersize": 4.5, "label": aggregation}
            axes.errorbar(mean, at, xerr=[low, high], **style)
    axes.axvline(statistics.fmean(r["accuracy_before"] for r in rows), color="C7", ls="--", lw=0.8, label="base model")
    for edge in range(1, len(attacks)):
        axes.axhline(edge - 0.5, color="C7", lw=0.4, alpha=0.4)
    axes.set_yticks(range(len(attacks)), attacks)
    axes.set(xlabel="accuracy on test data (mean and range over the seeds)", ylim=(len(attacks) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, ncols=len(AGGREGATIONS) + 1, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.toml"))
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="of the configuration"
    )
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.3, help="of the clients, that attack; below 0.5")
    parser.add_argument("--attacks", default=";".join(ATTACKS), help="separated by ;")
    parser.add_argument("--aggregations", default=",".join(AGGREGATIONS), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--quick", action="store_true", help="three rounds, one seed")
    parser.add_argument("--report", action="store_true", help="plays nothing: table and plot of what is there")
    options = parser.parse_args()
    rounds, seeds = (3, 1) if options.quick else (options.rounds, options.seeds)
    attacks, aggregations = options.attacks.split(";"), options.aggregations.split(",")
    for found, known in ((attacks, ATTACKS), (aggregations, AGGREGATIONS)):
        if unknown := [name for name in found if name not in known]:
            parser.error(f"unknown name {unknown[0]!r}; there are {'; '.join(known)}")

    def config(seed: int, aggregation: str) -> Config:
        keys: dict[str, Any] = {
            "seed": seed, "federation.rounds": rounds, "federation.aggregation": aggregation,
            "federation.trim": options.share, "evaluation.every": 0, "evaluation.limit": 100,
            "runtime.device": "cpu", "runtime.threads": 1,
        }  # fmt: skip
        told = [f"{key}={value}" for key, value in keys.items()] + options.override
        return load_config(options.config, told).resolved()

    if config(0, aggregations[0]).federation.seeds != "shared" and (unfit := OF_SHARED_SEEDS & set(attacks)):
        parser.error(
            f"{'; '.join(sorted(unfit))} would need the same seeds for all clients: leave them out of --attacks"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    play = Player(options.out, None) if options.report else Comparison(config, options.share, options.out)
    results: dict[Cell, Result] = {}
    for seed, attack, aggregation in product(range(seeds), attacks, aggregations):
        cell = Cell(attack, aggregation, seed)
        try:
            results[cell] = play(cell)
        except MissingError as error:
            print(f"missing: {error}")
    rows = rows_of(results)
    (options.out / "table.md").write_text(table(rows), encoding="utf-8")
    plot(rows, options.out / "attacks.png")
    print(table(rows))
    print(strict_json({"rounds": rounds, "share": options.share, "rows": rows}))


if __name__ == "__main__":
    main()
