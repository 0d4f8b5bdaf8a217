"""The private core, attacked part by part: clipping, noise, draws, sanitiser, terms, budgets.

Noise and draws cannot be seeded: what is asked of them holds but for a chance of less than 1e-6.
"""

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_runs import fedzo, make_data, options
from tiny import make_terms

from fedzo.errors import ConfigError, LedgerError, RunError
from fedzo.privacy import sampling
from fedzo.privacy.account import Account, Budget
from fedzo.privacy.accounting import Release, epsilon
from fedzo.privacy.mechanisms import LEVELS, MECHANISMS, Gaussian, Ints, Laplace, Mechanism, require_opendp
from fedzo.privacy.sanitiser import Sanitiser
from fedzo.privacy.terms import Terms

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("opendp")
pytest.importorskip("dp_accounting")

LAWS: list[type[Mechanism]] = [Gaussian, Laplace]
Floats = npt.NDArray[np.float64]


def integer_norm(steps: Ints, order: int) -> list[int]:
    """Of each column the sum of |q|^p, in integers that do not overflow."""
    return [sum(abs(int(q)) ** order for q in column) for column in steps.T]


# -- clipping: an integer norm of at most `levels`, exactly


def awkward() -> st.SearchStrategy[Floats]:
    """float64 [d, n]: of all magnitudes, some not finite, some one magnitude throughout."""
    any_float = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
    scales = st.sampled_from([5e-324, 1e-310, 1e-160, 1e-9, 1.0, 1e9, 1e160, 1.7e308])
    near = st.floats(-1.0, 1.0)
    shape = st.tuples(st.integers(1, 200), st.integers(1, 4))

    def scaled(values: Floats, scale: float) -> Floats:
        return values * scale

    return st.one_of(
        shape.flatmap(lambda s: arrays(np.float64, s, elements=any_float)),
        st.builds(scaled, shape.flatmap(lambda s: arrays(np.float64, s, elements=near)), scales),
    )


@pytest.mark.parametrize("law", LAWS)
@settings(max_examples=250, deadline=None)
@given(values=awkward(), bound=st.floats(1e-6, 1e6), levels=st.sampled_from([16, 2**12, LEVELS]))
@example(values=np.full((200, 1), 1.0), bound=math.sqrt(200.0), levels=LEVELS)  # on the sphere but for rounding
@example(values=np.full((3, 1), 0.1), bound=0.1 * math.sqrt(3.0), levels=LEVELS)
@example(values=np.full((7, 1), 1 / 7), bound=1.0, levels=LEVELS)
@example(values=np.array([[np.nextafter(1.0, 2.0)]]), bound=1.0, levels=LEVELS)
@example(values=np.array([[1.7e308], [-1.7e308]]), bound=1.0, levels=LEVELS)
@example(values=np.array([[5e-324], [5e-324]]), bound=1.0, levels=LEVELS)
def test_clip(law: type[Mechanism], values: Floats, bound: float, levels: int) -> None:
    """Against vectors made to slip through the rounding of norm, scaling or cast."""
    mechanism = law(1.0, levels)
    steps, within = mechanism.clip(values, bound)
    assert steps.dtype == np.int64 and steps.shape == values.shape and within.shape == (values.shape[1],)
    for j, norm in enumerate(integer_norm(steps, law.order)):
        column, finite = values[:, j], bool(np.isfinite(values[:, j]).all())
        assert norm <= levels**law.order
        if not finite:
            assert norm == 0 and not within[j]
            continue
        with np.errstate(over="ignore"):
            given_norm = float(np.linalg.norm(column / bound, ord=law.order))
        assert within[j] == (given_norm <= 1.0) or abs(given_norm - 1.0) < 1e-9
        released = mechanism.values(steps, bound)[:, j]
        # No entry grows, and so no norm does.
        assert (np.abs(released) * (1.0 - 1e-9) <= np.abs(column)).all()
        assert (np.sign(released) * np.sign(column) >= 0.0).all()
        step = bound / levels
        if within[j]:  # cut towards zero, by less than a step of the grid
            assert (np.abs(released - column) < step * (1.0 + 1e-9)).all()
        elif given_norm < 1e300:  # cut to the sphere, in the same direction
            assert (np.abs(released - column / given_norm) < step * (1.0 + 1e-6)).all()


def test_clip_takes_each_vector_by_itself() -> None:
    values = np.random.default_rng(0).normal(size=(5, 6)) * 10.0 ** np.arange(-3, 3)
    for law in LAWS:
        steps, within = law(1.0).clip(values, 1.0)
        for j in range(6):
            alone, fits = law(1.0).clip(values[:, j : j + 1], 1.0)
            assert np.array_equal(alone[:, 0], steps[:, j]) and fits[0] == within[j]


def test_clip_of_nothing() -> None:
    for law in LAWS:
        assert law(1.0).clip(np.zeros((3, 0)), 1.0)[0].shape == (3, 0)
        assert law(1.0).clip(np.zeros((0, 2)), 1.0)[1].tolist() == [True, True]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("bound", [5e-324, 1e-310, 1e-303, 1e-170, 1e-160, 1e300, 1.7e308])
def test_clip_at_a_bound_that_a_hostile_server_chose(law: type[Mechanism], bound: float) -> None:
    """A plan may hold any bound above 0. Below 6e-303 levels / bound overflows; 0 times that is no number, which casts
    to -2^63: a unit that gives nothing would outshout the noise, and show in the signs of what is released. Below
    1e-160 the squares of what is within it underflow, so that a norm of 0 is found of vectors beyond it."""
    values = np.array([[0.0, bound / 2, bound / 3, 1e-160, 1e-165, 1.0], [0.0, 0.0, bound / 3, 1e-165, 1e-165, -1.0]])
    steps, _ = law(1.0).clip(values, bound)
    assert all(norm <= LEVELS**law.order for norm in integer_norm(steps, law.order))
    assert not steps[:, 0].any()
    assert (np.abs(steps[:, 5] / LEVELS) <= 1.0 / bound).all()


# -- noise: OpenDP's, of the right law, from nothing that can be repeated


def gaussian_chances(scale: float) -> Callable[[npt.NDArray[np.int64]], Floats]:
    support = np.arange(-40 * math.ceil(scale), 40 * math.ceil(scale) + 1)
    total = np.exp(-(support**2) / (2.0 * scale**2)).sum()
    return lambda at: np.exp(-(at.astype(float) ** 2) / (2.0 * scale**2)) / total


def laplace_chances(scale: float) -> Callable[[npt.NDArray[np.int64]], Floats]:
    ratio = math.exp(-1.0 / scale)
    return lambda at: (1.0 - ratio) / (1.0 + ratio) * ratio ** np.abs(at).astype(float)


@pytest.mark.parametrize(
    ("law", "chances"), [(Gaussian, gaussian_chances), (Laplace, laplace_chances)], ids=["gaussian", "laplace"]
)
@pytest.mark.parametrize("multiplier", [0.25, 1.5])
def test_each_integer_has_its_chance(law: type[Mechanism], chances: Any, multiplier: float) -> None:
    """On a grid so coarse that each step is seen: 4 and 24 / 16 of a step."""
    scale, count = multiplier * 16, 20_000
    drawn = law(multiplier, 16).draw(count)
    assert drawn.dtype == np.int64
    edge = math.ceil(2.5 * scale)
    inner = np.arange(-edge, edge + 1)
    wanted = chances(scale)(inner) * count
    found = np.array([(drawn == value).sum() for value in inner])
    wanted, found = np.append(wanted, count - wanted.sum()), np.append(found, count - found.sum())
    assert wanted.min() > 5
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    assert stats.chi2.sf(statistic, len(wanted) - 1) > 1e-8
    assert stats.chi2.cdf(statistic, len(wanted) - 1) > 1e-8  # too good is no noise either


@pytest.mark.parametrize("law", LAWS)
def test_on_the_real_grid_it_is_the_continuous_law(law: type[Mechanism]) -> None:
    count, multiplier = 20_000, 1.7
    drawn = law(multiplier).draw(count) / LEVELS
    cdf = stats.norm(scale=multiplier).cdf if law is Gaussian else stats.laplace(scale=multiplier).cdf
    assert stats.kstest(drawn, cdf).statistic < 3.1 / math.sqrt(count)  # chance 2 exp(-2 3.1^2) = 1e-8
    # In standard errors; the fourth moment of Laplace noise is 6.
    assert abs(drawn.mean()) < 6.0 * law(multiplier).deviation / math.sqrt(count)
    fourth = 3.0 if law is Gaussian else 6.0
    assert abs(drawn.std() / law(multiplier).deviation - 1.0) < 6.0 * math.sqrt((fourth - 1.0) / count) / 2.0
    halves = drawn.reshape(2, -1)
    assert abs(np.corrcoef(halves)[0, 1]) < 6.0 / math.sqrt(count / 2)


@pytest.mark.parametrize("law", LAWS)
def test_another_multiplier_scales_the_noise(law: type[Mechanism]) -> None:
    drawn = law(1.0).draw(4000, 30.0) / LEVELS
    assert abs(drawn.std() / (30.0 * law(1.0).deviation) - 1.0) < 0.2


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: Gaussian(1.0).draw(16).tolist(),
        lambda: Laplace(1.0).draw(16).tolist(),
        lambda: sampling.poisson(200, 0.5).tolist(),
        lambda: sampling.fixed(200, 100).tolist(),
    ],
    ids=["gaussian", "laplace", "poisson", "fixed"],
)
def test_no_seed_repeats_noise_or_draws(draw: Callable[[], list[int]]) -> None:
    """Against an attacker who knows every seed: neither do the generators of Python, numpy and torch decide on what is
    drawn, nor does a draw move them."""
    seed_all()
    before = generators()
    first = draw()
    assert generators() == before
    seed_all()
    assert draw() != first


def test_noise_that_64_bits_do_not_hold_is_refused() -> None:
    """OpenDP saturates at +-2^63, and an integer sum with that wraps around to the other sign: there the noise hides
    nothing. A header of a hostile server may say any multiplier and any number of levels."""
    for law in LAWS:
        for multiplier, levels in ((1e14, LEVELS), (1.0, 2**62), (1e300, LEVELS)):
            with pytest.raises(ConfigError, match="noise"):
                law(multiplier, levels).draw(4)
            with pytest.raises(ConfigError, match="noise"):
                law(1.0, levels).draw(4, multiplier * 1e3)


@pytest.fixture
def without_opendp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenDP were not installed: no finder finds it, and it was not imported before."""
    found = importlib.machinery.PathFinder.find_spec

    def hidden(fullname: str, path: Any = None, target: Any = None) -> Any:
        return None if fullname.partition(".")[0] == "opendp" else found(fullname, path, target)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", hidden)
    for name in [name for name in sys.modules if name.partition(".")[0] == "opendp"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("without_opendp")
def test_without_opendp_there_is_no_noise_and_no_other() -> None:
    assert importlib.util.find_spec("opendp") is None
    with pytest.raises(ConfigError, match=r"pip install .*fedzo\[privacy\].*No other generator"):
        require_opendp()
    for law in LAWS:
        with pytest.raises(ConfigError, match="opendp, which is not installed"):
            law(1.0).draw(3)
    one = np.ones((2, 3))
    releases: dict[str, Callable[[Sanitiser], object]] = {
        "example-local": lambda party: party.examples(np.ones((3, 1)), 1.0),
        "client-central": lambda party: party.total([party.clipped(one, 1.0)], 1.0),
        "client-local": lambda party: party.step(one[0], 1.0),
        "client-secagg": lambda party: party.share(one, 1.0),
    }
    for mode, release in releases.items():
        with pytest.raises(ConfigError, match="opendp"):
            release(sanitiser(make_terms(mode)))


@pytest.mark.usefixtures("without_opendp")
@pytest.mark.parametrize("mode", ["example-local", "client-central", "client-local", "client-secagg"])
def test_the_command_line_without_opendp(mode: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    answer = fedzo("run", *options(data, privacy__mode=mode, privacy__delta=1e-3), "--out", tmp_path / "run")
    assert answer.code == 2 and "Traceback" not in answer.err + answer.out
    assert "opendp, which is not installed" in answer.err and "fedzo[privacy]" in answer.err
    assert not (tmp_path / "run").exists()


# -- draws


def test_a_poisson_draw_takes_each_by_chance() -> None:
    rounds, rate = 4000, 0.3
    drawn = [sampling.poisson(10, rate) for _ in range(rounds)]
    assert all(d.dtype == np.int64 and (np.diff(d) > 0).all() for d in drawn)
    hits = np.zeros((rounds, 10))
    for row, d in zip(hits, drawn, strict=True):
        row[d] = 1.0
    wrong = math.sqrt(rate * (1.0 - rate) / rounds)
    assert np.abs(hits.mean(axis=0) - rate).max() < 6.0 * wrong
    assert abs(hits.sum(axis=1).var() / (10 * rate * (1.0 - rate)) - 1.0) < 0.2  # its size is not fixed
    assert np.abs(np.corrcoef(hits.T) - np.eye(10)).max() < 6.5 / math.sqrt(rounds)
    assert sampling.poisson(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert sampling.poisson(0, 0.5).tolist() == sampling.poisson(0, 1.0).tolist() == []
    assert len(sampling.poisson(1000, 1e-300)) == 0
    assert len(sampling.poisson(1000, 1.0 - 2.0**-53)) == 1000


def test_a_fixed_draw_takes_so_many() -> None:
    rounds, hits = 3000, np.zeros(8)
    for _ in range(rounds):
        drawn = sampling.fixed(8, 3)
        assert len(drawn) == 3 and (np.diff(drawn) > 0).all() and drawn.dtype == np.int64
        hits[drawn] += 1.0
    assert np.abs(hits / rounds - 3 / 8).max() < 6.0 * math.sqrt(15 / 64 / rounds)
    assert sampling.fixed(4, 9).tolist() == [0, 1, 2, 3] and sampling.fixed(0, 3).tolist() == []


# -- sensitivity: a unit more or less moves the integer sum before noise by at most `levels`


def sanitiser(terms: Terms, steps: int = 2, width: int = 3, batch: int = 5, clients: int = 4) -> Sanitiser:
    return Sanitiser(terms, steps, width, batch, clients)


class Seen:
    """What was released, in grid steps, and at which scales noise was asked for."""

    def __init__(self) -> None:
        self.released: list[Ints] = []
        self.scales: list[float] = []


def silence(patch: pytest.MonkeyPatch) -> Seen:
    """The real code with noise of 0: what is left is what the noise has to hide."""
    seen = Seen()

    def hushed(law: type[Mechanism]) -> type[Mechanism]:
        class Silent(law):
            def _draw(self, count: int, scale: float) -> list[int]:
                seen.scales.append(scale)
                return [0] * count

            def values(self, steps: Ints, bound: float) -> Floats:
                seen.released.append(steps.copy())
                found: Floats = super().values(steps, bound)
                return found

        return Silent

    for name, law in list(MECHANISMS.items()):
        patch.setitem(MECHANISMS, name, hushed(law))
    return seen


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return silence(monkeypatch)


MECHANISM = pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
contributions = arrays(
    np.float64,
    st.tuples(st.just(6), st.integers(1, 5)),
    elements=st.one_of(st.floats(-10.0, 10.0), st.floats(allow_nan=True, allow_infinity=True)),
)


def distance(one: Ints, other: Ints, order: int) -> int:
    return integer_norm((one - other).reshape(-1, 1), order)[0]


@MECHANISM
@settings(max_examples=60, deadline=None)
@given(values=contributions, bound=st.floats(1e-3, 1e3), which=st.integers(0, 4))
def test_an_example_moves_a_release_by_at_most_levels(mechanism: str, values: Floats, bound: float, which: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        seen = silence(patch)
        party = sanitiser(make_terms("example-local", mechanism=mechanism), width=6)
        without = np.delete(values, which % values.shape[1], axis=1)
        party.examples(values, bound)
        party.examples(without, bound)
        whole, rest = seen.released
        assert distance(whole, rest, party.terms.order) <= LEVELS**party.terms.order
        # To give zeros is to give nothing.
        zeroed = values.copy()
        zeroed[:, which % values.shape[1]] = 0.0
        party.examples(zeroed, bound)
        assert np.array_equal(seen.released[-1], rest)


@MECHANISM
@settings(max_examples=60, deadline=None)
@given(values=contributions, bound=st.floats(1e-3, 1e3), which=st.integers(0, 4))
def test_a_client_moves_the_server_s_sum_by_at_most_levels(
    mechanism: str, values: Floats, bound: float, which: int
) -> None:
    """The server clips once more: a client that does not, or whose scalars were rounded upwards, has no more weight."""
    with pytest.MonkeyPatch.context() as patch:
        seen = silence(patch)
        party = sanitiser(make_terms("client-central", mechanism=mechanism))
        with np.errstate(over="ignore"):
            hostile = [(v.reshape(2, 3).astype(np.float32), np.zeros(0, dtype=np.float32)) for v in values.T]
        honest = [party.clipped(v.reshape(2, 3), bound) for v in values.T]
        for parts in (hostile, honest):
            which %= len(parts)
            seen.released.clear()
            party.total(parts, bound)
            party.total(parts[:which] + parts[which + 1 :], bound)
            whole, rest = seen.released
            assert distance(whole, rest, party.terms.order) <= LEVELS**party.terms.order


@MECHANISM
@settings(max_examples=60, deadline=None)
@given(values=contributions, bound=st.floats(1e-3, 1e3))
def test_a_client_s_steps_together_are_within_one_bound(mechanism: str, values: Floats, bound: float) -> None:
    """client-local: a round of K steps is one release. With noise z b in each step its K parts, each over its own bound
    b / K^(1/p), must add up to what one vector of norm b would tell: sum over steps of (norm / noise)^p <= z^-p."""
    with pytest.MonkeyPatch.context() as patch:
        seen = silence(patch)
        steps = values.shape[1]
        party = sanitiser(make_terms("client-local", mechanism=mechanism, noise_multiplier=1.5), steps, width=6)
        order = party.terms.order
        for column in values.T:
            scalars, _ = party.step(column, bound)
            own = bound / steps ** (1.0 / order)
            assert np.linalg.norm(scalars.astype(np.float64), ord=order) <= own * (1.0 + 1e-6)
        told = sum(
            integer_norm(released.reshape(-1, 1), order)[0] / scale**order
            for released, scale in zip(seen.released, seen.scales, strict=True)
        )
        assert told <= 1.5**-order * (1.0 + 1e-12)
        # In units of the scalars: every step's noise is that of the whole.
        assert [scale * bound / steps ** (1.0 / order) / LEVELS for scale in seen.scales] == pytest.approx(
            [1.5 * bound] * steps
        )


@MECHANISM
@settings(max_examples=60, deadline=None)
@given(values=contributions, bound=st.floats(1e-3, 1e3))
def test_a_share_is_within_the_bound(mechanism: str, values: Floats, bound: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        silence(patch)
        party = sanitiser(make_terms("client-secagg", mechanism=mechanism, asked=5, tolerance=2))
        for column in values.T:
            share = party.share(column.reshape(2, 3), bound)
            assert share.shape == (6,) and share.dtype == np.int64
            assert integer_norm(share.reshape(-1, 1), party.terms.order)[0] <= LEVELS**party.terms.order


# -- adaptive clipping: scalars and count are one release


@MECHANISM
@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_scalars_and_count_share_one_budget(mechanism: str, share: float, silent: Seen) -> None:
    """z^-p is the sum of both, each with the noise that is really drawn over how far one unit moves it."""
    for mode in ("example-local", "client-central", "client-local", "client-secagg"):
        terms = make_terms(
            mode, mechanism=mechanism, clipping="adaptive", clip_share=share, noise_multiplier=1.3, asked=4
        )
        party, p = sanitiser(terms, steps=4, width=3), terms.order
        assert terms.noise.noise_multiplier**-p + terms.count_noise.noise_multiplier**-p == pytest.approx(1.3**-p)
        silent.scales.clear()
        one = np.ones((4, 3))
        if mode == "example-local":
            party.examples(one[0][:, None], 1.0)
            told = [(LEVELS, silent.scales[0]), (LEVELS / 2, silent.scales[1])]
        elif mode == "client-central":
            party.total([party.clipped(one, 1.0)], 1.0)
            told = [(LEVELS, silent.scales[0]), (LEVELS / 2, silent.scales[1])]
        elif mode == "client-local":
            for row in one:
                party.step(row, 1.0)
            parts = 4 ** (1.0 / p)
            told = [
                move for at in range(0, 8, 2)
                for move in ((LEVELS, silent.scales[at]), (LEVELS / 2, silent.scales[at + 1]))
            ]  # fmt: skip
            assert silent.scales[0] == pytest.approx(terms.noise.noise_multiplier * LEVELS * parts)
        else:  # the noise of four clients' shares
            party.share(one, 1.0)
            told = [(LEVELS, silent.scales[0] * 2.0), (LEVELS / 2, silent.scales[1] * 2.0)]
        assert sum((moved / scale) ** p for moved, scale in told) == pytest.approx(1.3**-p)


def test_a_unit_moves_the_count_by_a_half(silent: Seen) -> None:
    terms = make_terms("example-local", clipping="adaptive")
    party = sanitiser(terms, batch=8)
    inside, outside = np.full((3, 1), 0.1), np.full((3, 1), 9.0)
    for units, halves in (([], 0.0), ([inside], 0.5), ([outside], -0.5), ([inside] * 5 + [outside] * 2, 1.5)):
        values = np.concatenate([np.zeros((3, 0)), *units], axis=1)
        assert party.examples(values, 1.0)[1] == pytest.approx(halves / 8)
    central = sanitiser(make_terms("client-central", clipping="adaptive"), clients=4)
    # A count that lies about its size has the weight of a half.
    parts = [(np.zeros((2, 3), dtype=np.float32), np.array([count], dtype=np.float32)) for count in (1e4, 0.5, -77.0)]
    assert central.total(parts, 1.0)[1][0] == pytest.approx(0.5 / 4)
    shared = sanitiser(make_terms("client-secagg", clipping="adaptive"))
    total = (
        shared.share(np.zeros((2, 3)), 1.0)
        + shared.share(np.full((2, 3), 9.0), 1.0)
        + shared.share(np.zeros((2, 3)), 1.0)
    )
    assert shared.unpack(total, 1.0)[1][0] == pytest.approx(0.5 / 4)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_bound_finds_the_quantile(quantile: float) -> None:
    terms = make_terms("example-local", clipping="adaptive", quantile=quantile, clip=30.0, noise_multiplier=0.05)
    party, rng, bound = sanitiser(terms, width=3, batch=200), np.random.default_rng(1), terms.clip
    norms = rng.lognormal(0.0, 0.5, size=4000)
    for _ in range(150):
        directions = rng.normal(size=(3, 200))
        drawn = rng.choice(norms, 200)
        _, count = party.examples(directions / np.linalg.norm(directions, axis=0) * drawn, bound)
        bound = party.next_bound(bound, count)
    assert bound == pytest.approx(np.quantile(norms, quantile), rel=0.3)


def test_the_bound_stays_a_number_above_0() -> None:
    party = sanitiser(make_terms("client-local", clipping="adaptive", clip_rate=1.0, clip=2.0))
    for count in (1e9, -1e9, 0.0):
        bound = 2.0
        for _ in range(200):
            bound = party.next_bound(bound, count)
        assert 2e-4 <= bound <= 2e4


# -- the noise of a secure sum


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
def test_shares_add_up_to_the_planned_noise(missing: int, clipping: str) -> None:
    """With `tolerance` clients gone the sum has the planned noise, before that more."""
    terms = make_terms("client-secagg", asked=6, tolerance=2, noise_multiplier=2.0, clipping=clipping)
    party = Sanitiser(terms, 1, 500, 5, 6)
    shares = [party.share(np.zeros((1, 500)), 1.0) for _ in range(6 - missing)]
    repeats = 8
    for _ in range(repeats - 1):
        shares = [
            np.append(share, party.share(np.zeros((1, 500)), 1.0)) for share in shares
        ]  # fmt: skip
    total = np.sum(shares, axis=0).reshape(repeats, -1) / LEVELS
    wanted = terms.noise.noise_multiplier * math.sqrt((6 - missing) / 4)
    noise = total[:, :500]
    assert abs(noise.std() / wanted - 1.0) < 6.0 / math.sqrt(2 * noise.size)
    assert noise.std() >= terms.noise_multiplier * (1.0 - 6.0 / math.sqrt(2 * noise.size))


# -- terms


@pytest.mark.parametrize("mode", ["example-local", "client-central", "client-local", "client-secagg"])
def test_terms_survive_the_header(mode: str) -> None:
    terms = make_terms(mode, clipping="adaptive")
    assert Terms.from_header(json.loads(json.dumps(terms.to_header()))) == terms


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "none"},
        {"mode": "everything"},
        {"mechanism": "uniform"},
        {"epsilon": 0.0},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"clip": 0.0},
        {"levels": 0},
        {"clip": "much"},
        {"extra": 1},
    ],
    ids=str,
)
def test_terms_that_are_none(change: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="privacy terms"):
        Terms.from_header({**make_terms("client-local").to_header(), **change})


HOSTILE = {
    "no bound": {"clip": math.nan},
    "no budget": {"epsilon": math.nan},
    "unlimited": {"epsilon": math.inf},
    "noise beyond 64 bits": {"noise_multiplier": 1e14},
    "a grid beyond 64 bits": {"levels": 2**62},
    "a grid of halves": {"levels": 2.5},
    "amplified though the server knows who takes part": {"sampling": "poisson", "rate": 1e-6},
    "an unknown draw": {"sampling": "often"},
    "more than all the budget for the count": {"clipping": "adaptive", "clip_share": 1.5},
    "less than none for it": {"clipping": "adaptive", "clip_share": -3.0},
    "delta of one": {"delta": 1.0},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_terms_of_a_hostile_server(name: str) -> None:
    """client-local trusts nobody: what a header may say is what a client can hold it to. Amplification by a draw that
    the server makes would let it ask for a thousand rounds at the price of one."""
    with pytest.raises(LedgerError, match="privacy terms"):
        Terms.from_header({**make_terms("client-local").to_header(), **HOSTILE[name]})


def test_a_sum_with_a_negative_tolerance_has_no_noise() -> None:
    with pytest.raises(LedgerError, match="privacy terms"):
        Terms.from_header({**make_terms("client-secagg").to_header(), "tolerance": -1000})


@pytest.mark.parametrize("mode", ["client-local", "client-secagg"])
def test_no_amplification_where_the_server_knows_who_takes_part(mode: str) -> None:
    release = make_terms(mode).release(6)
    assert release.chance == 1.0
    assert epsilon(release, 4, 1e-3) > epsilon(release, 1, 1e-3) > 1.0


# -- budgets


def budget(releases: int = 5, **changes: Any) -> Budget:
    """Of exactly so many releases."""
    release = Release("gaussian", 2.0)
    terms = make_terms("client-local", noise_multiplier=2.0, releases=releases, **changes)
    terms = dataclasses.replace(terms, epsilon=epsilon(release, releases, terms.delta) * 1.0001)
    return Budget(terms, release)


def test_a_budget_affords_what_the_accountant_says() -> None:
    for order in (range(1, 12), range(11, 0, -1), (1, 11, 5, 6, 4, 7, 5)):
        fresh = budget()
        for count in order:
            assert fresh.affords(count) == (epsilon(fresh.release, count, fresh.terms.delta) <= fresh.terms.epsilon)
            assert fresh.affords(count) == (count <= 5)
    few = budget(releases=3)
    generous = Budget(dataclasses.replace(few.terms, releases=1), few.release)  # planned for less than it lasts for
    assert [generous.affords(n) for n in (1, 2, 3, 4, 3)] == [True, True, True, False, True]
    assert budget().affords(0)


RUN = b"\1\2\3\4\5\6\7\10"


def test_an_account_is_kept_and_refuses_beyond(tmp_path: Path) -> None:
    path = tmp_path / "budgets" / "run" / "3.json"
    account = Account(path, RUN, budget())
    assert not path.exists() and account.releases == 0
    assert account.charge(2) and path.exists()
    assert path.parent.stat().st_mode & 0o077 == 0
    again = Account(path, RUN, budget())
    assert again.releases == 2
    assert not again.charge(4)  # all or none
    assert again.releases == 2 and Account(path, RUN, budget()).releases == 2
    assert again.charge(3) and not again.charge(1)
    assert not Account(path, RUN, budget()).charge(1)
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")) == ["3.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "3", "\0\0\0\0", '{"run": "%s"}']
    + [f'{{"run": "%s", "releases": {value}}}' for value in ('"x"', "null", "true", "-3", "1.5", "1e999")],
)
def test_a_damaged_account_is_refused(text: str, tmp_path: Path) -> None:
    """A crash or an edit may not give the budget back."""
    path = tmp_path / "3.json"
    path.write_text(text.replace("%s", RUN.hex()))
    with pytest.raises(RunError, match=r"3\.json cannot be read .*restore it from a copy"):
        Account(path, RUN, budget())


def test_another_run_s_account_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "3.json"
    assert Account(path, RUN, budget()).charge(1)
    with pytest.raises(RunError, match="budget of another run"):
        Account(path, bytes(8), budget())


def test_an_account_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "3.json").mkdir()
    with pytest.raises(RunError, match="cannot be read"):
        Account(tmp_path / "3.json", RUN, budget())
    (tmp_path / "file").write_text("")
    account = Account(tmp_path / "folder" / "3.json", RUN, budget())
    (tmp_path / "folder").write_text("")  # in the way
    with pytest.raises(RunError, match="cannot write the privacy budget"):
        account.charge(1)
    assert account.releases == 0


def test_two_processes_of_a_client_share_its_account(tmp_path: Path) -> None:
    """A server that sends two plans at a time must not be charged once for both."""
    one, other = (Account(tmp_path / "3.json", RUN, budget()) for _ in range(2))
    granted = sum(account.charge(1) for _ in range(5) for account in (one, other))
    assert granted == 5
    assert Account(tmp_path / "3.json", RUN, budget()).releases == 5
