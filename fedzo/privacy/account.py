"""Budgets: what may still be released, and the file in which a client keeps its own."""

import fcntl
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedzo.errors import RunError
from fedzo.files import write_atomically
from fedzo.privacy.accounting import Release, affordable
from fedzo.privacy.terms import Terms


@dataclass
class Budget:
    """How many releases of a unit stay within the terms."""

    terms: Terms
    release: Release
    _within: int = field(default=0, init=False)
    _beyond: int | None = field(default=None, init=False)

    def affords(self, releases: int) -> bool:
        """Whether so many releases of a unit in all stay within its epsilon and delta."""
        while releases > self._within and (self._beyond is None or releases < self._beyond):
            # As planned, and then, for rounds that a crash made anew, a few more.
            most = self.terms.releases if releases <= self.terms.releases else releases
            found = affordable(self.release, self.terms.epsilon, self.terms.delta, most)
            self._within = max(self._within, found)
            if found < most:
                self._beyond = found + 1
        return releases <= self._within


@dataclass(frozen=True)
class Kept:
    """What a client's budget file holds.

    Attributes:
        run: id of the run, in hex.
        releases: charged.
        rate, units: of the draw, as in `Release`.
    """

    run: str
    releases: int
    rate: float
    units: int

    @staticmethod
    def read(path: Path) -> "Kept | None":
        """The file's; None: there is none.

        Raises:
            RunError: it is damaged, or cannot be read.
        """
        try:
            kept = Kept(**json.loads(path.read_text(encoding="utf-8")))
            counts = kept.releases, kept.units
            if not all(type(count) is int and count >= 0 for count in counts) or not 0.0 < kept.rate <= 1.0:
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise RunError(
                f"the privacy budget {path} cannot be read ({type(error).__name__}): restore it from a copy; without "
                "it nothing may be released"
            ) from None
        return kept


class Account:
    """A client's own budget in one run: counts its releases in a file, before each is made.

    Nobody else is trusted with it: a server that asks too often, or forgets that it has asked, is answered no more.

    Args:
        path: the file; it and its folder are made at the first charge.
        run_id: of the run.
        budget: of a unit of this client.

    Raises:
        RunError: the file is damaged, of another run, or cannot be read.
    """

    def __init__(self, path: Path, run_id: bytes, budget: Budget) -> None:
        self.path, self.budget, self._run = path, budget, run_id.hex()
        self.releases = self._read()

    def _read(self) -> int:
        kept = Kept.read(self.path)
        if kept is not None and kept.run != self._run:
            raise RunError(f"{self.path} is the budget of another run: give this one another folder")
        return 0 if kept is None else kept.releases

    def charge(self, releases: int) -> bool:
        """Writes down releases that are about to be made; False: they would exceed the budget, none may be made.

        Raises:
            RunError: the file cannot be written.
        """
        release = self.budget.release
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two processes may be this client at once
                total = self._read() + releases
                if not self.budget.affords(total):
                    return False
                kept = Kept(self._run, total, release.rate, release.units)
                write_atomically(self.path, json.dumps(asdict(kept)) + "\n")
        except OSError as error:
            raise RunError(f"cannot write the privacy budget {self.path}: {error.strerror}") from error
        self.releases = total
        return True


def budget_file(folder: Path, run_id: bytes, client: int) -> Path:
    """Where a client keeps its budget in a run, below the folder for all runs."""
    return folder / run_id.hex() / f"{client}.json"
