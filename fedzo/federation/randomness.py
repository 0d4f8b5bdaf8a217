"""All choices of a run that a seed decides: seeds of directions, sampled clients, batches.

Every choice is a pure function of the run's seed and of where it is made, so a resumed run makes the same ones.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from fedzo.directions import philox
from fedzo.optimizers import Seeds


def derive(seed: int, *place: str | int) -> int:
    """A 64-bit seed for one place in a run: the first 8 bytes of SHA-256 over the seed and the place's name."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def words64(seed: int, count: int) -> npt.NDArray[np.uint64]:
    """`count` uniform 64-bit words of the stream with this seed."""
    low_high = philox.words(seed, 2 * count).astype(np.uint64).reshape(-1, 2)
    words: npt.NDArray[np.uint64] = low_high[:, 0] | (low_high[:, 1] << np.uint64(32))
    return words


def shuffled(seed: int, total: int) -> npt.NDArray[np.int64]:
    """The indices below `total` in random order."""
    return np.argsort(words64(seed, total), kind="stable").astype(np.int64)


def choose(seed: int, total: int, count: int) -> npt.NDArray[np.int64]:
    """`count` different indices below `total`, sorted, every subset equally likely; all of them when count >= total."""
    if count >= total:
        return np.arange(total, dtype=np.int64)
    return np.sort(shuffled(seed, total)[:count])


def choose_weighted(seed: int, weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """`count` different indices, sorted: drawn one after the other, each by its weight among those not drawn yet.

    Draws with replacement whose repetitions are skipped, each a search for 53 random bits among the cumulative weights.

    Args:
        weights: float64 [N], positive; at least `count`.
    """
    edges, tried = np.cumsum(weights), 2 * count
    while True:
        uniform = (words64(seed, tried) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        drawn = np.searchsorted(edges, uniform * edges[-1], side="right")
        _, first = np.unique(drawn, return_index=True)
        if first.size >= count:
            return np.sort(drawn[np.sort(first)[:count]])
        tried *= 2


def bernoulli(seed: int, total: int, rate: float) -> npt.NDArray[np.int64]:
    """Each index below `total` with probability `rate`, independently (Poisson sampling); sorted."""
    hit = philox.words(seed, total).astype(np.float64) < rate * 2.0**32
    return np.flatnonzero(hit).astype(np.int64)


def sample_clients(place: int, clients: int, rate: float) -> npt.NDArray[np.int64]:
    """All client numbers in random order, or with a rate above 0 each with that probability, ascending."""
    return bernoulli(place, clients, rate) if rate > 0.0 else shuffled(place, clients)


def pool_seeds(seed: int, size: int) -> Seeds:
    """The fixed pool of `size` different direction seeds of a run."""
    words = words64(derive(seed, "pool"), size)
    if np.unique(words).size != size:  # a chance of size^2 / 2^65
        raise ValueError(f"seed {seed} draws a repeated direction among {size}; take another seed")
    return words


def round_seeds(
    seed: int,
    schedule: str,
    round_: int,
    client: int,
    shape: tuple[int, int],
    pool: Seeds | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> Seeds:
    """The direction seeds uint64 [K, P] that a client tries in a round.

    `shared`: the same for every client; `independent`: the client's own; `pool`: the client's own draw from the pool,
    without repetition within a step; `weighted-pool`: as `pool`, by the weights of its seeds.
    """
    steps, queries = shape
    if schedule == "shared":
        return words64(derive(seed, "directions", round_), steps * queries).reshape(shape)
    if schedule == "independent":
        return words64(derive(seed, "directions", round_, client), steps * queries).reshape(shape)
    assert pool is not None
    places = [derive(seed, "directions", round_, client, k) for k in range(steps)]
    if schedule == "pool":
        return pool[np.stack([choose(place, pool.size, queries) for place in places])]
    assert weights is not None
    return pool[np.stack([choose_weighted(place, weights, queries) for place in places])]
