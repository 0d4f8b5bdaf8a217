"""The numbers of a secure sum: what fits through Flower's SecAgg+ exactly, and the masks that hide it.

SecAgg+ (Bell et al., CCS 2020) adds to each client's vector one mask of its own and one for every pair of clients,
modulo `MODULUS`; in the sum of all the pairs' masks cancel, and the server is helped to remove the others only.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedzo.errors import ConfigError, RunError
from fedzo.privacy.mechanisms import LEVELS, Ints

RANGE = 2**22  # Flower's target range: an entry v goes as v + LIMIT, in 0 to RANGE
LIMIT = RANGE // 2  # largest magnitude of an entry
MODULUS = 2**32
MOST_CLIENTS = (MODULUS - 1) // RANGE  # whose entries, and whose weights of RANGE each, add up to less than MODULUS
LEAST_CLIENTS = 3  # of two, each learns the other's vector from the sum

_LEAST_LEVELS = 16
_TAIL = 12.0  # standard deviations that an entry's noise has room for; a chance of 4e-33 that it needs more
_LABEL = b"fedzo secure sum: mask"


def expand(seed: bytes, modulus: int, shapes: Sequence[tuple[int, ...]]) -> list[Ints]:
    """Masks from a secret: SHAKE-256 (FIPS 202) of all of it, so that whoever lacks it has nothing to search.

    Array i is the output for a label, the length of the seed (u64), the seed and i (u64), as little-endian 64-bit words
    modulo `modulus`.

    Args:
        seed: at least 16 bytes.
        modulus: a power of two up to 2^63.
        shapes: of the arrays.

    Returns:
        int64 arrays, uniform over 0 to modulus - 1.

    Raises:
        ValueError: the seed is too short, or the modulus is none of these.
    """
    if len(seed) < 16:
        raise ValueError(f"a mask's seed has {len(seed)} bytes, wanted at least 16")
    if modulus < 1 or modulus & (modulus - 1) or modulus > 2**63:
        raise ValueError(f"a mask's modulus is {modulus}, wanted a power of two up to 2^63")
    head = _LABEL + len(seed).to_bytes(8, "little") + seed
    arrays = []
    for index, shape in enumerate(shapes):
        size = int(np.prod(shape, dtype=np.int64))
        stream = hashlib.shake_256(head + index.to_bytes(8, "little")).digest(8 * size)
        words = np.frombuffer(stream, dtype="<u8") & np.uint64(modulus - 1)
        arrays.append(words.astype(np.int64).reshape(shape))
    return arrays


def install(module: Any, user: str, weak: object) -> None:
    """Puts `expand` in the place of the mask generator that a module of Flower's imported.

    Flower's own folds the secret to the 32-bit seed of a Mersenne Twister, which can be searched.

    Args:
        module: as imported.
        user: dotted name in the module of the function that makes the masks.
        weak: Flower's generator.

    Raises:
        RunError: the place is not where it was in Flower 1.41.
    """
    function = module
    for name in user.split("."):
        function = getattr(function, name, None)
    used = "pseudo_rand_gen" in getattr(getattr(function, "__code__", None), "co_names", ())
    if not used or getattr(module, "pseudo_rand_gen", None) not in (weak, expand):
        raise RunError(
            f"{module.__name__} of this version of Flower makes its masks in another place than that of 1.41, and they "
            "could be searched for: install flwr 1.41, or set another privacy.mode"
        )
    module.pseudo_rand_gen = expand


def levels(noise_share: float, clients: int) -> int:
    """The finest grid on which a client's vector and its share of the noise fit into a secure sum.

    Args:
        noise_share: standard deviation of a client's noise in an entry over the bound on its vector: the largest of
            all entries.
        clients: of a round.

    Returns:
        Steps from 0 to the bound: the largest power of two up to 2^20 of which 1 + 12 `noise_share` times as many are
        at most LIMIT.

    Raises:
        ConfigError: there would be less than 16, or too few or many clients.
    """
    if not LEAST_CLIENTS <= clients <= MOST_CLIENTS:
        raise ConfigError(
            f"a secure sum of {clients} clients a round, wanted {LEAST_CLIENTS} to {MOST_CLIENTS}: set "
            "federation.clients_per_round"
        )
    found = LEVELS
    while found >= _LEAST_LEVELS:
        if found * (1.0 + _TAIL * noise_share) <= LIMIT:
            return found
        found //= 2
    raise ConfigError(
        f"a client's share of the noise is {noise_share:g} times its bound, too large for secure aggregation, which "
        f"has room for {(LIMIT / _LEAST_LEVELS - 1.0) / _TAIL:.0f} times: raise privacy.epsilon or the number of "
        "clients, or lower federation.rounds"
    )
