"""Claim 10 with made-up caches and outcomes: a rule that is right, one that is wrong, and too
little to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from examples.study import claim_10
from examples.study.figures import Figures, MissingFigures
from examples.study.foretold import FRESH, SEEN
from examples.study.recommendation import FILE
from tests.examples.test_study_recommendation import SHARP, SOFT

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
    gains = [*(0.1 * sign for sign in signs), *(0.1 for _ in SEEN)]
    counts = [*warned, *(3 for _ in SEEN)]
    before: dict[str, float] = {}
    for one, gain, count in zip((*FRESH, *SEEN), gains, counts, strict=True):
        before.setdefault(one.sft, 0.6)
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


def test_the_former_rule_is_a_control(tmp_path: Path) -> None:
    # The share of all tokens is below the former limit, and that of the far tokens above ours.
    figures = made(SIGNS, RIGHT)
    deep = asdict(replace(SHARP, num_tokens=20_000, far_share=0.004, clipped_share=0.0006))
    for one in FRESH[HALF:]:
        figures.recorded(one.cache, FILE).update(dict.fromkeys(SEEDS, deep))
    verdict = claim_10.judge(figures)
    assert verdict.answer == "holds"
    assert f"the former rule: {HALF})" in verdict.summary
    (plot,) = verdict.plots
    plot.draw(tmp_path / plot.file)
    assert (tmp_path / plot.file).read_text().startswith("<?xml")
    table = verdict.details[0]
    assert table.count("| gain |") == HALF + len(SEEN)
    assert table.count("| harm |") == len(FRESH) - HALF
    assert table.count("(the limit is from it)") == len(SEEN)


def test_without_figures_it_is_not_judged() -> None:
    with pytest.raises(MissingFigures):
        claim_10.judge(Figures({}))
