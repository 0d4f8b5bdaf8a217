"""Whether a run has diverged: it then stops, with all its rounds kept."""

import math
import shlex
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from fedzo.errors import DivergedError, RunError
from fedzo.federation.ledger import Ledger

# Rounds whose median loss is looked at.
_WINDOW = 5
# Nats. A loss of few hundredths may become many times that and still be the loss of a good model.
_LEAST = 1.0


class Watch:
    """Looks at a run's losses; at the same point of the same ledger it always says the same.

    Losses of rounds are of a few examples, reported by clients: they raise doubt, the validation loss decides.

    Args:
        factor: times the validation loss at the start (of 1 nat at least) that make a run diverged; 0: none do.

    Raises:
        RunError: the loss of the base model is not finite.
    """

    def __init__(self, ledger: Ledger, factor: float) -> None:
        self.ledger, self.factor = ledger, factor
        self._start = math.inf
        self._losses: deque[float] = deque(maxlen=_WINDOW)  # since the last evaluation
        self._still = 0  # the last so many rounds have no scalar but 0
        self._broken = 0  # in the last so many rounds no answer was finite
        self._why = ""
        evaluations = ledger.evaluations("validation")
        for rounds, summary in enumerate([None, *ledger.summaries()]):
            if summary is not None:
                self.round(summary)
            if rounds in evaluations:
                self.evaluation(rounds, evaluations[rounds]["loss"])

    @property
    def doubtful(self) -> bool:
        """Whether the validation loss should be looked at."""
        far = len(self._losses) == _WINDOW and median(self._losses) > self._limit
        return bool(self.factor) and (far or (self._still > 0 and self._still % _WINDOW == 0))

    @property
    def _limit(self) -> float:
        return self.factor * max(_LEAST, self._start)

    def round(self, summary: Mapping[str, Any]) -> None:
        """Takes what `RoundSummary` says of the round after the last."""
        self._why = ""
        self._still = self._still + 1 if summary["scalars"] and summary["max_scalar"] == 0.0 else 0
        dropped = summary["dropped"]
        if dropped is None:  # a private run tells nobody
            return
        answered = summary["sampled"] - dropped.get("no-reply", 0)
        broken = dropped.get("not-finite", 0)
        self._broken = self._broken + 1 if answered and broken == answered else 0
        # Fewer than half of the run's clients may be liars who alone were asked, or in time.
        if self._broken and (2 * answered > self.ledger.spec.clients or self._broken >= _WINDOW):
            self._why = f"not one loss or scalar of the {answered} clients that answered is finite"
        elif answered and broken + dropped.get("bound", 0) == answered:
            self._losses.append(math.inf)
        elif summary["loss"] is not None:
            self._losses.append(summary["loss"])

    def evaluation(self, rounds: int, loss: float) -> None:
        """Takes the validation loss after so many rounds.

        Raises:
            RunError: the loss of the base model is not finite.
        """
        self._losses.clear()
        if rounds == 0:
            self._start = loss
            if self.factor and not math.isfinite(loss):
                raise RunError(
                    "the base model's validation loss is not finite: check model.compute_dtype and the model's weights"
                )
        change = f"the validation loss is {loss:.4g}, at the start it was {self._start:.4g}"
        if not loss <= self._limit:
            self._why = f"{change}; evaluation.divergence is {self.factor:g}"
        elif self._still >= _WINDOW and loss > self._start:
            self._why = f"{change}, and all scalars of the last {self._still} rounds are 0"

    def check(self) -> None:
        """Raises DivergedError when the run has diverged."""
        if self._why and self.factor:
            raise diverged(self.ledger, self._why)


def diverged(ledger: Ledger, why: str) -> DivergedError:
    """The error that a diverged run ends in: why, and what to do."""
    run, rounds = shlex.quote(str(ledger.path.parent)), ledger.rounds
    return DivergedError(
        f"the run diverged at round {rounds}: {why}. Its learning rate is {ledger.spec.learning_rate:.3g}: start anew "
        'with a lower one, with method.learning_rate = "auto", or with what `fedzo tune` finds. All '
        f"{rounds} rounds are kept: `fedzo replay {run} --round best --out MODEL` rebuilds the best of them. With "
        f"evaluation.divergence = 0 in its config.toml `fedzo resume {run}` goes on all the same"
    )
