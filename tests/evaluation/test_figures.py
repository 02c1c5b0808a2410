"""avg@k, pass@k and intervals against enumeration, exact expectations and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from lopd.config import load_config
from lopd.tasks.accuracy import (
    accuracy_figures,
    bootstrap_interval,
    ks_of,
    pass_at,
    pass_shares,
    shares,
)
from tests.stand_ins import ROOT


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        samples = [True] * num_right + [False] * (num_samples - num_right)
        for k in range(1, num_samples + 1):
            draws = [any(draw) for draw in itertools.combinations(samples, k)]
            assert pass_at(num_samples, num_right, k) == pytest.approx(np.mean(draws), abs=1e-12)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_pass_at_k_is_unbiased(p: float) -> None:
    """Control: putting the share into 1 - (1 - p)^k is not."""
    n = 16
    k = 8
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(chance * pass_at(n, c, k) for c, chance in enumerate(chances))
    naive = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(naive - (1 - (1 - p) ** k)) > (0.01 if p < 0.5 else 1e-9)


def test_pass_at_k_of_k_outside() -> None:
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k} is not between 1 and 4"):
            pass_at(4, 1, k)
    assert ks_of(1) == [1]
    assert ks_of(6) == [1, 2, 4, 6]
    assert ks_of(32) == [1, 2, 4, 8, 16, 32]


def test_intervals_cover_what_they_promise() -> None:
    """Problems of very different difficulty, 8 samples each. Control: drawing responses instead of
    problems covers far too little.
    """
    rng = np.random.default_rng(5)
    truth = 0.5
    by_problem = 0
    by_response = 0
    for trial in range(200):
        difficulty = rng.beta(0.5, 0.5, 50)
        right = rng.random((50, 8)) < difficulty[:, None]
        low, high = bootstrap_interval(right.mean(axis=1), resamples=500, seed=trial)
        by_problem += low <= truth <= high
        low, high = bootstrap_interval(right.astype(float).ravel(), resamples=500, seed=trial)
        by_response += low <= truth <= high
    assert 0.90 <= by_problem / 200 <= 0.98
    assert by_response / 200 < 0.75


def test_intervals_repeat_and_narrow() -> None:
    values = np.random.default_rng(1).random(400)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    narrow = bootstrap_interval(values)
    wide = bootstrap_interval(values[:40])
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)
    assert bootstrap_interval(values, confidence=0.5)[1] < narrow[1]


def test_figures_of_a_small_evaluation() -> None:
    right = [[True, True], [True, False], [False, False]]
    figures = accuracy_figures(right, lengths=[1, 2, 3, 4, 5, 9], truncated=[False] * 5 + [True])
    assert figures["mean"] == pytest.approx(0.5)
    assert figures["standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert figures["pass_at"] == pytest.approx({"1": 0.5, "2": 2 / 3})
    assert figures["response_len"] == 4
    assert figures["response_len_quantiles"]["1"] == 9
    assert figures["truncated_share"] == pytest.approx(1 / 6)
    low, high = figures["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert shares(right).tolist() == [1, 0.5, 0]
    assert pass_shares(right, 2).tolist() == [1, 1, 0]


def test_a_single_problem_has_no_standard_error() -> None:
    assert math.isnan(accuracy_figures([[True]], [1], [False])["standard_error"])


def test_presets_give_the_papers_sampling_below_what_is_set() -> None:
    config = load_config(
        ROOT / "examples" / "tiny_moe.toml", ["evaluate={preset='paper_math', top_p=0.9}"]
    ).evaluate
    assert (config.temperature, config.top_p, config.samples_per_prompt, config.max_new_tokens) == (
        0.6,
        0.9,
        32,
        32768,
    )
    code = load_config(
        ROOT / "examples" / "tiny_moe.toml", ["evaluate={preset='paper_code'}"]
    ).evaluate
    assert (code.temperature, code.top_p, code.samples_per_prompt, code.max_new_tokens) == (
        0.6,
        0.95,
        4,
        40960,
    )
    assert (
        load_config(
            ROOT / "examples" / "tiny_moe.toml", ["evaluate.preset=paper_math"]
        ).evaluate.samples_per_prompt
        == 2
    ), "the file's own keys stand"


def solved_score_equation(num_right: int, count: int) -> list[float]:
    """Return the two shares p for which |share - p| is z standard deviations of p."""
    share = num_right / count
    z = 1.959963984540054

    def lies_outside(p: float) -> bool:
        return abs(share - p) > z * math.sqrt(p * (1 - p) / count)

    ends = []
    for outer in (0.0, 1.0):
        # At 0 the deviation is 0 too, so a share of 0 is its own lower end.
        inside = share
        while abs(outer - inside) > 1e-13:
            middle = (outer + inside) / 2
            outer, inside = (middle, inside) if lies_outside(middle) else (outer, middle)
        ends.append(inside)
    return ends


@pytest.mark.parametrize(
    ("num_right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_verdicts_have_wilsons_interval(
    num_right: int, count: int, low: float, high: float
) -> None:
    """The reference is the score equation itself, solved here by bisection.

    The rounded figures were also computed with scipy 1.17.1's ``proportion_ci(method="wilson")``.
    """
    assert [low, high] == pytest.approx(solved_score_equation(num_right, count), abs=6e-5)
    right = [[index < num_right] for index in range(count)]
    figures = accuracy_figures(right, [1] * count, [False] * count)
    assert figures["interval"] == pytest.approx(solved_score_equation(num_right, count), abs=1e-9)
    assert figures["interval_method"] == "wilson"
    # The control: the simple interval of a normal distribution is another one.
    share = num_right / count
    half = 1.959964 * math.sqrt(share * (1 - share) / count)
    assert figures["interval"] != pytest.approx([share - half, share + half], abs=1e-3)


@pytest.mark.parametrize("num_right", [0, 8])
def test_equal_verdicts_are_not_known_for_certain(num_right: int) -> None:
    """The control: a bootstrap of equal verdicts is empty."""
    right = [[index < num_right] for index in range(8)]
    low, high = accuracy_figures(right, [1] * 8, [False] * 8)["interval"]
    assert high - low == pytest.approx(0.3244, abs=1e-4)
    empty = bootstrap_interval(shares(right))
    assert empty[0] == empty[1]


def test_shares_of_several_samples_have_a_bootstrap_unless_all_are_equal() -> None:
    spread = accuracy_figures([[True, False], [True, True], [False, False]], [1], [False])
    assert spread["interval_method"] == "bootstrap"
    # Every problem is right in half of its samples: resamples of them would all be the same.
    equal = accuracy_figures([[True, False]] * 8, [1], [False])
    assert equal["interval_method"] == "wilson"
    low, high = equal["interval"]
    assert low < 0.3
    assert high > 0.7
