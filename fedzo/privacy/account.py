"""Budgets: what may still be released, and the file in which a client keeps its own."""

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from fedzo.errors import RunError
from fedzo.privacy.accounting import Release, affordable, epsilon
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

    def spent(self, releases: int) -> float:
        """epsilon after so many releases, at the terms' delta."""
        return epsilon(self.release, releases, self.terms.delta)


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
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["run"] != self._run:
                raise RunError(f"{self.path} is the budget of another run: give this one another folder")
            releases = kept["releases"]
            if not isinstance(releases, int) or isinstance(releases, bool) or releases < 0:
                raise ValueError
            return releases
        except FileNotFoundError:
            return 0
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"the privacy budget {self.path} cannot be read ({type(error).__name__}): restore it from a "
                f"copy; without "
                "it nothing may be released"
            ) from None

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
                kept = {"run": self._run, "releases": total, "rate": release.rate, "units": release.units}
                _write_durably(self.path, json.dumps(kept) + "\n")
        except OSError as error:
            raise RunError(f"cannot write the privacy budget {self.path}: {error.strerror}") from error
        self.releases = total
        return True


def _write_durably(path: Path, text: str) -> None:
    """Replaces a file, so that after a crash it is the old or the new one, and once this returns the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
