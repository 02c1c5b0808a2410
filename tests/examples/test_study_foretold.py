"""Claim 10 with made-up caches and outcomes: a rule that is right, one that is wrong, and too
little to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from examples.study import claim_10
from examples.study.figures import Figures, Interval, MissingFigures
from examples.study.foretold import FRESH, OLDER, PAIRS, SEEN
from examples.study.page import FIGURES, read_figures
from examples.study.recommendation import FILE
from lopd.cache.recommendation import HARMED
from lopd.cache.regime import RegimeFigures
from tests.examples.test_study_recommendation import SHARP, SOFT

DOCS = Path(__file__).resolve().parents[2] / "docs"
SEEDS = (2, 3, 4)
# Points of accuracy that differ between seeds, so that an interval has a width.
NOISE = dict(zip(SEEDS, (-0.01, 0.0, 0.01), strict=True))


def made(signs: Sequence[int], warned: Sequence[int]) -> Figures:
    """Return figures of all settings.

    Args:
        signs: What came of each of FRESH: 1 is a gain of 10 points, -1 harm, 0 nothing.
        warned: For how many of the three seeds of each the rule warns.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    files = {}
    # Those that are shown and not counted are all wrong.
    shown = (*OLDER, *SEEN)
    gains = [*(0.1 * sign for sign in signs), *(0.1 for _ in shown)]
    counts = [*warned, *(3 for _ in shown)]
    for one, gain, count in zip((*FRESH, *shown), gains, counts, strict=True):
        values[one.sft] = {"sampled": dict.fromkeys(SEEDS, 0.6)}
        after = {seed: 0.6 + gain + NOISE[seed] for seed in SEEDS}
        values[one.sampled] = {"sampled": after}
        caches = [SHARP if index < count else SOFT for index in range(len(SEEDS))]
        of_seeds = dict(zip(SEEDS, (asdict(cache) for cache in caches), strict=True))
        files[one.cache] = {FILE: of_seeds}
    return Figures(values, files=files)


# The first half gains, the second half is harmed.
HALF = len(FRESH) // 2
SIGNS = [1] * HALF + [-1] * (len(FRESH) - HALF)
RIGHT = [0] * HALF + [3] * (len(FRESH) - HALF)


def test_it_holds_where_each_outcome_was_foretold() -> None:
    verdict = claim_10.judge(made(SIGNS, RIGHT))
    assert verdict.answer == "holds"
    assert f"foretold {len(FRESH)} of the {len(FRESH)} outcomes" in verdict.summary
    controls = f"always warned: {len(FRESH) - HALF}, never warned: {HALF}"
    assert controls in verdict.summary
    assert "Wrong" not in verdict.summary
    # Two of three seeds are most of them.
    assert claim_10.judge(made(SIGNS, [1] * HALF + [2] * (len(FRESH) - HALF))).answer == "holds"


def test_one_that_is_wrong_is_named() -> None:
    verdict = claim_10.judge(made(SIGNS, [3, *RIGHT[1:]]))
    assert verdict.answer == "does not hold"
    assert f"foretold {len(FRESH) - 1} of" in verdict.summary
    assert f"Wrong: {FRESH[0].title} (a warning, then +10.0 [" in verdict.summary
    silent = claim_10.judge(made(SIGNS, [*RIGHT[:-1], 0]))
    assert f"Wrong: {FRESH[-1].title} (no warning, then -10.0 [" in silent.summary


def test_open_outcomes_are_not_counted_and_one_kind_alone_proves_nothing() -> None:
    verdict = claim_10.judge(made([0, *SIGNS[1:]], [3, *RIGHT[1:]]))
    assert verdict.answer == "holds"
    assert f"of the {len(FRESH) - 1} outcomes that are not open" in verdict.summary
    # A rule that always warns is right where everything is harmed.
    assert claim_10.judge(made([-1] * len(FRESH), [3] * len(FRESH))).answer == "open"


def test_other_rules_stand_beside_it(tmp_path: Path) -> None:
    # The share of all tokens is below the former limit, and that of the far tokens above ours.
    figures = made(SIGNS, RIGHT)
    deep = asdict(replace(SHARP, num_tokens=20_000, far_share=0.004, clipped_share=0.0006))
    for one in FRESH[HALF:]:
        figures.recorded(one.cache, FILE).update(dict.fromkeys(SEEDS, deep))
    verdict = claim_10.judge(figures)
    assert verdict.answer == "holds"
    rules = verdict.details[2]
    pairs = [sign for one, sign in zip(FRESH, SIGNS, strict=True) if one.title in PAIRS]
    assert len(pairs) == len(PAIRS) == 6

    def row(name: str) -> list[str]:
        """What a rule is right in: the first settings, the pairs, both, and with the older."""
        (found,) = [line for line in rules.splitlines() if line.startswith(f"| {name} |")]
        return [cell.strip() for cell in found.split("|")[2:-1]]

    count = len(FRESH)
    # The older ones gain in spite of a warning.
    assert row("the rule of this claim") == [
        f"{count - 6} of {count - 6}",
        "6 of 6",
        f"{count} of {count}",
        f"{count} of {count + len(OLDER)}",
    ]
    assert row("always warned")[1:3] == [f"{pairs.count(-1)} of 6", f"{count - HALF} of {count}"]
    former = row("the former rule (0.1% of all tokens beyond 10 nats)")
    assert former[2] == f"{HALF} of {count}"
    by_kind = [
        (one.kind != "has a bad habit") == (sign < 0)
        for one, sign in zip(FRESH, SIGNS, strict=True)
    ]
    assert row("the kind of the base student")[2] == f"{sum(by_kind)} of {count}"
    assert f"by the kind of the base student: {sum(by_kind)})" in verdict.summary
    # All of SEEN gain here, so no figure has a limit.
    assert "the least advantage" not in rules
    (plot,) = verdict.plots
    plot.draw(tmp_path / plot.file)
    assert (tmp_path / plot.file).read_text().startswith("<?xml")
    table = verdict.details[0]
    assert table.count("| gain |") == HALF + len(OLDER) + len(SEEN)
    assert table.count("| harm |") == len(FRESH) - HALF
    assert table.count("(the limit is from it)") == len(SEEN)


def outcome(sign: int, caches: RegimeFigures, sft: float) -> claim_10.Outcome:
    gain = Interval(0.1 * sign, 0.1 * sign - 0.01, 0.1 * sign + 0.01, 3)
    before = Interval(sft, sft, sft, 3)
    return claim_10.Outcome("one", "small", {2: caches}, {2: gain.mean}, gain, before)


def test_the_limit_of_another_figure_lies_between_what_was_seen() -> None:
    gained = outcome(1, replace(SOFT, min_advantage=-4.0), 0.5)
    harmed = outcome(-1, replace(SOFT, min_advantage=-16.0), 0.8)
    rules = claim_10.other_rules([gained, harmed])
    least = rules["the least advantage"]
    # The middle of 4 and 16 by the logarithm is 8.
    for depth, is_warned in ((-7.9, False), (-8.1, True)):
        one = outcome(1, replace(SOFT, min_advantage=depth), 0.5)
        assert least(one) == is_warned
        assert claim_10.num_right(least, [one]) == (not is_warned)
    right = rules["the SFT student's right answers at T=1"]
    assert right(outcome(1, SOFT, 0.7))
    assert not right(outcome(1, SOFT, 0.6))
    # Both have the same mean advantage, so it tells nothing.
    assert "the mean advantage" not in rules
    # A figure may also warn where it is low.
    turned = claim_10.other_rules(
        [replace(gained, sft=harmed.sft), replace(harmed, sft=gained.sft)]
    )
    assert turned["the SFT student's right answers at T=1"](outcome(1, SOFT, 0.6))


def test_the_counts_that_distill_says_are_those_of_the_page() -> None:
    """The counts of recommendation.py and of two pages, against the figures of the page."""
    figures, _ = read_figures(DOCS / FIGURES)
    every = claim_10.outcomes_of(figures, (*FRESH, *OLDER))
    assert all(one.sign for one in every), "an open outcome would count for neither"
    for regime, is_warned in (("sharp teacher", True), ("soft teacher", False)):
        those = [one for one in every if one.is_warned == is_warned]
        harmed = sum(one.sign < 0 for one in those)
        assert HARMED[regime] == (harmed, len(those)), regime
        for page in ("objectives.md", "understand.md"):
            words = " ".join((DOCS / page).read_text().split())
            assert f"{harmed} of {len(those)}" in words, (page, regime)


def test_without_figures_it_is_not_judged() -> None:
    with pytest.raises(MissingFigures):
        claim_10.judge(Figures({}))
