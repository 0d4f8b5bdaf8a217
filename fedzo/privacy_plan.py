"""From a configuration to the terms of a private run: how often a unit is released, and the noise that this needs."""

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedzo.config import Config
from fedzo.errors import ConfigError
from fedzo.federation.randomness import derive, sample_clients
from fedzo.privacy.accounting import Sampling, calibrate, epsilon
from fedzo.privacy.mechanisms import LEVELS, require_opendp
from fedzo.privacy.sanitiser import Sanitiser
from fedzo.privacy.secure_sum import levels
from fedzo.privacy.terms import Terms


def make_terms(config: Config, sizes: Sequence[int], scalars: int) -> Terms:
    """The terms of a configuration that has a privacy mode, with a nonce of their own.

    Without a `privacy.noise_multiplier` of its own, a run has the least noise with which a unit that takes part as
    planned is within epsilon and delta after all rounds.

    Args:
        sizes: examples of each client; none: the server does not know.
        scalars: C, of a query.

    Raises:
        ConfigError: a library for privacy is missing, delta is above 1 over a client's examples, one release is beyond
            epsilon, or the noise is too large for a secure sum.
    """
    require_opendp()
    privacy, federation, method, mode = config.privacy, config.federation, config.method, config.privacy.mode
    sampling: Sampling = "none"
    rate, asked, units = 1.0, 0, 0
    releases = federation.rounds
    if mode == "example-local":
        if not sizes and not privacy.sampling_rate:
            raise ConfigError(
                f"the noise of {mode} follows from the share of a client's examples that a step draws, and the server "
                "does not know how many they are: set privacy.sampling_rate to the largest share, batch_size over the "
                "fewest examples of a client"
            )
        largest = max(sizes, default=math.ceil(method.batch_size / privacy.sampling_rate) if not sizes else 0)
        if privacy.delta > 1.0 / largest:
            raise ConfigError(
                f"privacy.delta is {privacy.delta:g}, above 1 / {largest} examples of a client: it would allow one of "
                f"them to be published whole; set it well below {1.0 / largest:g}"
            )
        rate = privacy.sampling_rate or min(1.0, method.batch_size / min(size for size in sizes if size))
        sampling, units, releases = privacy.sampling, round(method.batch_size / rate), releases * federation.local_steps
    elif mode == "client-central":
        asked, units = federation.clients_per_round, config.data.clients
        rate = federation.client_rate or (asked or units) / units
        sampling = privacy.sampling if rate < 1.0 else "none"
    else:
        asked = (federation.clients_per_round or config.data.clients) if mode == "client-secagg" else 0
        releases = most_rounds(config)
    terms = Terms(
        mode=mode,
        mechanism=privacy.mechanism,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        noise_multiplier=privacy.noise_multiplier or 1.0,
        clip=privacy.clip,
        clipping=privacy.clipping,
        quantile=privacy.quantile,
        clip_rate=privacy.clip_rate,
        clip_share=privacy.clip_share,
        sampling=sampling,
        rate=rate,
        releases=releases,
        tolerance=privacy.tolerance,
        asked=asked,
        levels=LEVELS,
        nonce=secrets.token_hex(8),
    )
    width = scalars * method.queries
    sanitiser = Sanitiser(terms, federation.local_steps, width, method.batch_size, config.data.clients)
    if privacy.noise_multiplier:
        terms = _on_grid(terms)
        one = epsilon(terms.release(sanitiser.coordinates, units=units), 1, terms.delta)
        if one > terms.epsilon:
            raise ConfigError(
                f"privacy.noise_multiplier is {privacy.noise_multiplier:g}, with which one release takes epsilon "
                f"{one:.3g}, more than privacy.epsilon {terms.epsilon:g}: raise either, or leave the multiplier at 0"
            )
        return terms
    release = replace(terms.release(sanitiser.coordinates, units=units), slack=0.0)
    while True:
        noise = calibrate(release, releases, terms.epsilon, terms.delta)
        terms = _on_grid(replace(terms, noise_multiplier=noise, levels=LEVELS))
        release = terms.release(sanitiser.coordinates, units=units)
        if epsilon(release, releases, terms.delta) <= terms.epsilon:  # with the slack of its grid
            return terms


def _on_grid(terms: Terms) -> Terms:
    """With a grid that a secure sum can carry, where there is one."""
    if terms.mode != "client-secagg":
        return terms
    share = max(terms.noise.noise_multiplier, terms.count_noise.noise_multiplier / 2.0 if terms.adaptive else 0.0)
    return replace(terms, levels=levels(share / math.sqrt(terms.survivors), terms.asked))


def most_rounds(config: Config) -> int:
    """Rounds that the client takes part in that takes part in most, if all are there; the run's seed decides it."""
    federation, count = config.federation, Counter[int]()
    if not federation.client_rate and not federation.clients_per_round:
        return federation.rounds
    for round_ in range(federation.rounds):
        place = derive(config.seed, "sampling", round_)
        drawn = sample_clients(place, config.data.clients, federation.client_rate)
        count.update(drawn[: federation.clients_per_round or None].tolist())
    return max(count.values(), default=1)
