"""Which seeds of a pool were useful so far: the weights by which the seed schedule `weighted-pool` draws them."""

import numpy as np
import numpy.typing as npt

from fedzo.federation.ledger import LedgerRound
from fedzo.optimizers import Seeds

# 1 / 20! is below the last bit of e.
_TERMS = 20


class Amplitudes:
    """The mean magnitude of each seed's scalars in a ledger (FedKSeed-Pro, arXiv 2312.06353).

    A function of the ledger's rounds and of nothing else, summed in their order, so that a resumed run stands at the
    same bits; and of scalars that were released already, so that under differential privacy it costs nothing.

    Args:
        pool: the seeds, uint64 [N], all different.
    """

    def __init__(self, pool: Seeds) -> None:
        self._place = {seed: j for j, seed in enumerate(pool.tolist())}
        self._sums = np.zeros(pool.size, dtype=np.float64)
        self._counts = np.zeros(pool.size, dtype=np.int64)

    def add(self, entry: LedgerRound) -> None:
        """Takes in the next round. Its scalars hold their clients' shares, which the number of clients undoes."""
        magnitudes = np.abs(entry.records().projected.astype(np.float64)) * len(entry.clients)
        for seed, magnitude in zip(entry.seeds.ravel().tolist(), magnitudes.ravel().tolist(), strict=True):
            self._sums[self._place[seed]] += magnitude
            self._counts[self._place[seed]] += 1

    def weights(self) -> npt.NDArray[np.float64]:
        """float64 [N] in [1, e], the softmax of the amplitudes, rescaled to [0, 1], times its denominator.

        A seed that was never tried has the amplitude 0.
        """
        amplitudes = self._sums / np.maximum(self._counts, 1)
        low, high = amplitudes.min(), amplitudes.max()
        return _exp((amplitudes - low) / (high - low) if high > low else np.zeros_like(amplitudes))


def _exp(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """e^x for x in [0, 1] by IEEE additions, multiplications and divisions only: libm's differs between systems."""
    total = np.ones_like(x)
    for k in range(_TERMS, 0, -1):
        total = 1.0 + x * total / k
    return total
