"""What a private run has spent, of whose budget, and what that means in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.federation.ledger import Ledger
from fedzo.privacy.account import Kept, budget_file
from fedzo.privacy.accounting import Release, authority, cross_check, epsilon
from fedzo.privacy.terms import Terms


@dataclass(frozen=True)
class Spent:
    """What has been released of one client's data, or of everyone's.

    Attributes:
        client: its number; None: everyone, as who took part is nobody's to know.
        releases: charged before they were made.
        release: one of them, to a unit's accountant.
        epsilon: at the terms' delta.
        own: as the client itself counts; else as the server does, with the rate that the noise was planned for.
    """

    client: int | None
    releases: int
    release: Release
    epsilon: float
    own: bool


def spent(ledger: Ledger, budgets: Path) -> list[Spent]:
    """The budgets of a private run, by client; a run that is not private has none.

    Args:
        budgets: where the clients of this machine keep theirs; a client whose own is not there is taken at the server's
            word, which a client's own refusals bound by the terms.

    Raises:
        RunError: a client's budget cannot be read.
    """
    delta = 0.0 if ledger.spec.terms is None else ledger.spec.terms.delta
    return [
        Spent(client, releases, release, epsilon(release, releases, delta), own)
        for client, releases, release, own in _charged(ledger, budgets)
    ]


def epsilon_spent(ledger: Ledger, budgets: Path) -> float:
    """The largest epsilon of a client's, or of everyone's, so far; 0 of a run that is not private.

    Clients with no more releases than another, at no higher a rate, are not accounted for one by one, as `spent` does.

    Raises:
        RunError: as `spent`.
    """
    ahead: list[tuple[int, Release]] = []
    charged = ((releases, release) for _, releases, release, _ in _charged(ledger, budgets))
    for releases, release in sorted(charged, key=lambda one: (-one[0], -one[1].rate)):
        if not any(release.rate <= other.rate and release.units == other.units for _, other in ahead):
            ahead.append((releases, release))
    delta = 0.0 if ledger.spec.terms is None else ledger.spec.terms.delta
    return max((epsilon(release, releases, delta) for releases, release in ahead), default=0.0)


def _charged(ledger: Ledger, budgets: Path) -> list[tuple[int | None, int, Release, bool]]:
    """What `spent` tells, but for epsilon."""
    terms, sanitiser = ledger.spec.terms, ledger.spec.sanitiser
    if terms is None or sanitiser is None:
        return []
    charges, found = ledger.charges(), list[tuple[int | None, int, Release, bool]]()
    for client in [None] if terms.secret else range(ledger.spec.clients):
        releases, rate, own = charges[client], terms.rate, False
        units = ledger.spec.clients if client is None else round(ledger.spec.batch_size / terms.rate)
        if client is not None and (kept := Kept.read(budget_file(budgets, ledger.spec.run_id, client))) is not None:
            releases, rate, units, own = kept.releases, kept.rate, kept.units, True
        found.append((client, releases, terms.release(sanitiser.coordinates, rate, units), own))
    return found


def privacy_figures(ledger: Ledger, each: Sequence[Spent]) -> dict[str, Any]:
    """What is printed with every result of a private run; of any other run that it is not private."""
    terms = ledger.spec.terms
    if terms is None:
        return {"privacy": "none"}
    return {
        "privacy": terms.mode,
        "epsilon_spent": max((one.epsilon for one in each), default=0.0),
        "epsilon": terms.epsilon,
        "delta": f"{terms.delta:g}",
        "noise_multiplier": terms.noise_multiplier,
    }


_PROTECTED = {
    "example-local": (
        "each single example of each client's training data",
        "nobody: every client adds the noise before anything leaves its machine, so the statement holds against the "
        "server, the other clients and all who read the ledger, together",
    ),
    "client-central": (
        "all training data of each client, as a whole",
        "the server, which sees the clients' clipped scalars and adds the noise; the statement holds against the other "
        "clients and all who are given the ledger or the model",
    ),
    "client-local": (
        "all training data of each client, as a whole",
        "nobody: every client adds the noise before anything leaves its machine, so the statement holds against the "
        "server, the other clients and all who read the ledger, together",
    ),
    "client-secagg": (
        "all training data of each client, as a whole",
        "no single party: every client adds a share of the noise, and the server learns the sum of a round only "
        "(SecAgg+; it is trusted to follow that protocol)",
    ),
}


def assumptions(terms: Terms) -> list[str]:
    """What the statement rests on, beside the software being right."""
    unit = "example" if terms.of_examples else "client"
    found = []
    if terms.sampling == "fixed":
        found.append(f"neighbouring data sets differ by one {unit} being replaced by another")
    else:
        found.append(
            f"neighbouring data sets differ by one {unit} giving its contribution or nothing (zero-out); how many "
            f"{unit}s there are is taken as known"
        )
    if terms.sampling == "poisson":
        found.append(
            f"every {unit} takes part in a release independently of the others with the stated probability, by a draw "
            "from the operating system's entropy that nobody else learns"
        )
    elif terms.sampling == "fixed":
        found.append(
            f"a fixed number of {unit}s takes part in a release, by a draw from the operating system's entropy that "
            "nobody else learns"
        )
    else:
        found.append("who takes part in a release is taken as known: no amplification by sampling is claimed")
    if terms.mode == "client-secagg":
        found.append(
            f"of the {terms.asked} clients that are asked a round, at most {terms.tolerance} drop out or give their "
            "share of the noise away"
        )
    if terms.of_examples:
        found.append("an example's loss depends on the other examples of its batch by floating-point rounding at most")
    found.append("validation and test data, and the choice of all settings, are public or their owner's own affair")
    return found


def paragraph(ledger: Ledger, each: Sequence[Spent]) -> str:
    """The guarantee, for people who have to decide on it."""
    terms, sanitiser = ledger.spec.terms, ledger.spec.sanitiser
    if terms is None or sanitiser is None:
        return "This run is not private: the scalars that clients sent were neither clipped nor noised."
    protected, trusted = _PROTECTED[terms.mode]
    worst = max(each, key=lambda one: one.epsilon)
    law = "discrete Gaussian" if terms.mechanism == "gaussian" else "discrete Laplace"
    unit, norm = ("example" if terms.of_examples else "client"), f"L{terms.order} norm"
    bound = f"following the {terms.quantile:g} quantile of the norms from" if terms.adaptive else "of"
    sentences = [
        f"Training was done under ({_up(worst.epsilon):.3g}, {terms.delta:g})-differential privacy",
        f"It protects {protected}",
        f"It trusts {trusted}",
        f"At most {worst.releases:,} vectors of {sanitiser.coordinates} numbers were released"
        + (" of any client" if worst.client is not None else ""),
        f"Before each, the contribution of every {unit} was clipped to an {norm} {bound} {terms.clip:g}, and {law} "
        f"noise of {terms.noise.noise_multiplier:g} times that bound was added from the operating system's entropy",
        f"The chance of any {unit} to take part in a release is {worst.release.rate:.3g}",
        "The seeds of all random directions are public and not relied on",
        f"Assumed: {'; '.join(assumptions(terms))}",
        f"The budget of the run is ({terms.epsilon:g}, {terms.delta:g}); it is charged before each release and cannot "
        "be exceeded",
        f"Accounting: {authority(worst.release, terms.delta).source}",
    ]
    return ". ".join(sentences) + "."


def _up(value: float) -> float:
    """Rounded up to three digits: a statement may not promise more than holds."""
    if not 0.0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit


def checks(ledger: Ledger, each: Sequence[Spent]) -> dict[str, float]:
    """The largest epsilon by every accountant that covers it."""
    terms = ledger.spec.terms
    if terms is None:
        return {}
    worst = max(each, key=lambda one: one.epsilon)
    return cross_check(worst.release, worst.releases, terms.delta)
