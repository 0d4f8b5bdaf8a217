"""The audit's statistics against closed forms, and its attack on real and broken runs.

Noise and draws of private runs cannot be seeded: what is asked of them holds but for a chance of less than 1e-6.
"""

import itertools
import json
import math
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("opendp")
pytest.importorskip("dp_accounting")

from audit_privacy import (
    CASES,
    Case,
    Lab,
    Setting,
    audit,
    epsilon_bound,
    expected,
    log_ratio,
    lower_bound,
    main,
    most,
    scores,
    upper_limit,
)
from scipy.optimize import brentq
from scipy.stats import laplace, norm

SURE = 1.0 - 1e-7
CENTRAL = Case("client-central", clients=4, rate=0.5, rounds=3)
CENTRAL_SEEDED = Case("client-central", flaw="seeded noise", clients=4, rate=0.5, rounds=3)


def test_clopper_pearson_has_its_known_values() -> None:
    assert upper_limit(0, 60, 0.975) == pytest.approx(1.0 - 0.025 ** (1 / 60))
    assert upper_limit([5, 50, 100], 100, 0.975) == pytest.approx([0.112835, 0.601678, 1.0], abs=1e-6)
    # It is the rate at which so few errors have a chance of 2.5%.
    chance = sum(math.comb(40, k) * 0.3**k * 0.7 ** (40 - k) for k in range(8))
    assert upper_limit(7, 40, 1.0 - chance) == pytest.approx(0.3)


def test_the_bound_is_that_of_the_errors_limits() -> None:
    positive, negative = upper_limit(3, 500, 0.975), upper_limit(100, 500, 0.975)
    assert epsilon_bound(3, 100, 500, 0.01, 0.95) == pytest.approx(np.log((0.99 - negative) / positive))
    assert epsilon_bound(100, 3, 500, 0.01, 0.95) == pytest.approx(np.log((0.99 - negative) / positive))
    assert epsilon_bound([250, 500], [250, 500], 500, 0.01, 0.95).tolist() == [0.0, 0.0]
    none = 1.0 - 0.025 ** (1 / 500)
    assert most(1000, 0.01) == pytest.approx(math.log((0.99 - none) / none))


@pytest.mark.parametrize(("shift", "delta"), [(1.0, 0.05), (2.0, 0.01)])
def test_of_gaussian_scores_it_is_below_epsilon_and_near_it(shift: float, delta: float) -> None:
    def beyond(epsilon: float) -> float:  # Balle and Wang, arXiv 1805.06530, theorem 8
        return float(
            norm.cdf(shift / 2 - epsilon / shift) - np.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift) - delta
        )

    true, rng = brentq(beyond, 0.0, 50.0), np.random.default_rng(5)
    absent, present = rng.normal(size=300_000), rng.normal(shift, size=300_000)
    assert 0.75 * true < lower_bound(absent, present, delta, SURE) < true
    assert lower_bound(absent, present, delta, SURE) < lower_bound(absent, present, delta, 0.95)


def test_scores_that_tell_nothing_give_no_bound() -> None:
    drawn = np.random.default_rng(2).normal(size=(2, 4000))
    assert lower_bound(*drawn, delta=1e-5, confidence=SURE) == 0.0
    assert lower_bound(np.zeros(100), np.zeros(100), 1e-5) == 0.0


def test_the_threshold_is_not_judged_by_the_trials_that_chose_it() -> None:
    absent, present = np.zeros(400), np.ones(400)
    assert lower_bound(absent, present, 1e-5) == pytest.approx(most(400, 1e-5))
    present[200:] = 0.0
    assert lower_bound(absent, present, 1e-5) == 0.0


@pytest.mark.parametrize("chance", [1.0, 0.3])
@pytest.mark.parametrize(("order", "law"), [(2, norm), (1, laplace)])
def test_scores_are_likelihood_ratios(order: int, law: Any, chance: float) -> None:
    rest, part = np.random.default_rng(1).normal(size=(7, 3)), np.array([0.5, -1.0, 2.0])
    absent = law.pdf(rest, scale=1.3).prod(axis=1)
    present = law.pdf(rest - part, scale=1.3).prod(axis=1)
    wanted = np.log((1.0 - chance) * absent + chance * present) - np.log(absent)
    assert log_ratio(rest, part, 1.3, order, chance) == pytest.approx(wanted)
    assert log_ratio(rest, part, 1.3, order, 0.0).tolist() == [0.0] * 7


def test_what_is_expected_is_below_the_statement() -> None:
    setting = Setting.of(CASES["examples-laplace"], 1.0, 1e-3)
    assert setting.stated == pytest.approx(1.0)
    assert 0.4 < expected(setting, 4000, SURE) < 1.0


@pytest.mark.parametrize("name", ["examples", "client", "clients-secure-sum"])
def test_the_attack_sees_all_of_the_canary_and_nothing_but_the_stated_noise(name: str) -> None:
    setting, trials = Setting.of(CASES[name], 8.0, 1e-3), 60
    mu = math.sqrt(setting.releases) / setting.terms.noise_multiplier
    # The log-likelihood ratios of two Gaussians mu apart are normal around -mu^2 / 2 and mu^2 / 2, with deviation mu.
    for present, sign in ((False, -1.0), (True, 1.0)):
        found = np.array(scores(setting, present, trials))
        assert abs(found.mean() - sign * mu**2 / 2.0) < 6.0 * mu / math.sqrt(trials)
        assert 0.3 < found.std() / mu < 2.0
    assert mu**2 / 2.0 > 6.0 * mu / math.sqrt(trials)  # so that the two worlds, and half of the noise, are told apart


def test_a_canary_is_what_the_seed_draws_most_and_only_where_it_is_present() -> None:
    lab = Lab(Setting.of(CASES["examples-drawn"], 1.0, 1e-3))
    present, absent = lab.data(0, True), lab.data(0, False)
    assert np.flatnonzero((present != absent).any(axis=1)).tolist() == [lab.canary]
    assert not absent[lab.canary].any()


def test_real_runs_are_not_accused_and_broken_ones_are_caught() -> None:
    cases = [CASES["examples"], CENTRAL, CASES["examples-seeded-noise"], CASES["examples-unclipped"], CENTRAL_SEEDED]
    settings = [Setting.of(case, 0.5, 1e-3) for case in cases]
    findings = list(audit(settings, 200, SURE))
    assert [finding.verdict for finding in findings] == ["holds"] * 2 + ["caught"] * 3
    assert all(0.49 < finding.setting.stated <= 0.5 for finding in findings)
    assert all(finding.bound == pytest.approx(finding.most) for finding in findings[2:4])


def test_the_command_tells_by_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["audit_privacy.py", "--jobs", "1", "--epsilon", "2"]
    monkeypatch.setattr(sys, "argv", [*common, "--trials", "100", "--only", "examples,examples-seeded-noise"])
    main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["right"] and [row["verdict"] for row in figures["rows"]] == ["holds", "caught"]
    # Of 10 trials without an error no bound is above 2.
    monkeypatch.setattr(sys, "argv", [*common, "--trials", "20", "--only", "examples-seeded-noise"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert "NOT CAUGHT" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_the_trials() -> None:
    settings = [Setting.of(CASES[name], 0.5, 1e-3) for name in ("examples-unclipped", "clients-seeded-draw")]
    findings = list(itertools.islice(audit(settings, 150, SURE, jobs=2, chunk=40), 2))
    assert findings[0].bound == pytest.approx(findings[0].most)
    assert findings[1].trials == 150
