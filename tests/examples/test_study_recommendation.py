"""How the study counts right recommendations: made-up figures in which they help, and in which a
control does as well.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from examples.study.figures import Figures, MissingFigures
from examples.study.recommendation import (
    CAPPED,
    CASES,
    SAMPLED,
    TOP_K,
    Case,
    Run,
    judge_loss,
    judge_warning,
    runs_of,
    section,
    without_top_k,
)
from lopd.cache.recommendation import LEAST_TOKENS, SHARP_SHARE
from lopd.cache.regime import RegimeFigures

SOFT = RegimeFigures(
    num_tokens=LEAST_TOKENS,
    num_shards=1,
    num_shards_in_cache=1,
    mean_advantage=-0.07,
    min_advantage=-9.0,
    far_share=0.01,
    clipped_share=0.0,
    top_k=8,
    top_k_coverage=0.999,
)
SHARP = replace(SOFT, min_advantage=-25.0, clipped_share=3 * SHARP_SHARE)


def run_of(figures: RegimeFigures, sampled: float, top_k: float, capped: float = 0.71) -> Run:
    return Run("a case", 2, figures, 0.7, {SAMPLED: sampled, TOP_K: top_k, CAPPED: capped})


# The sampled token does harm with the sharp teacher and is as good as the top-K with the soft one.
BOTH = [run_of(SOFT, 0.93, 0.94)] * 2 + [run_of(SHARP, 0.5, 0.8)] * 2


def counts(scores: dict[str, object]) -> dict[str, str]:
    return {name: str(score) for name, score in scores.items()}


def test_a_rule_that_helps_is_better_than_its_controls() -> None:
    assert counts({**judge_warning(BOTH)}) == {
        "by the cache": "4 of 4",
        "always warned": "2 of 4",
        "never warned": "2 of 4",
    }
    # With a top-K in the cache the recommended loss is the same in both, so a control is as good.
    assert counts({**judge_loss(BOTH)}) == {
        "recommended": "4 of 4",
        "always lightning": "2 of 4",
        "always lightning, importance cap": "0 of 4",
        "always top_k_reverse_kl": "4 of 4",
    }
    assert counts({**judge_loss([without_top_k(run) for run in BOTH])}) == {
        "recommended": "4 of 4",
        "always lightning": "2 of 4",
        "always lightning, importance cap": "2 of 4",
    }


def test_a_rule_that_is_wrong_is_counted_as_wrong() -> None:
    # The other way round: harm with the soft teacher.
    wrong = [run_of(SOFT, 0.5, 0.8), run_of(SHARP, 0.93, 0.90)]
    assert str(judge_warning(wrong)["by the cache"]) == "0 of 2"
    # The top-K is 3 points behind in the second run.
    assert str(judge_loss(wrong)["recommended"]) == "1 of 2"


def test_a_recommended_way_without_an_arm_is_not_counted() -> None:
    without = [replace(run, reached={SAMPLED: 0.5, TOP_K: 0.8}) for run in BOTH]
    assert judge_loss([without_top_k(run) for run in without])["recommended"].of == 0


class Made(Figures):
    """Figures of two seeds: by arm the share of right answers at T=1."""

    def __init__(self, accuracies: dict[str, float]) -> None:
        self.accuracies = accuracies

    def values(self, arm: str, metric: str) -> dict[int, float]:
        assert metric == "sampled"
        if arm not in self.accuracies:
            raise MissingFigures(arm)
        return {2: self.accuracies[arm], 3: self.accuracies[arm] + 0.01}


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return [
        Case(
            name,
            lambda seed, name=name: tmp_path / name / str(seed),  # type: ignore[misc]
            f"{name}_sft",
            {SAMPLED: f"{name}_lightning", TOP_K: f"{name}_top_k", CAPPED: f"{name}_capped"},
        )
        for name in ("soft", "sharp")
    ]


def measure(folder: Path) -> RegimeFigures:
    return SHARP if "sharp" in folder.parts else SOFT


MADE = {
    "soft_sft": 0.6,
    "soft_lightning": 0.9,
    "soft_top_k": 0.91,
    "sharp_sft": 0.7,
    "sharp_lightning": 0.5,
    "sharp_top_k": 0.8,
}


def test_the_runs_are_those_with_a_cache_and_with_figures(
    cases: list[Case], tmp_path: Path
) -> None:
    for name, seed in (("soft", 2), ("soft", 3), ("sharp", 2)):
        (tmp_path / name / str(seed)).mkdir(parents=True)
    found = runs_of(Made(MADE), cases, measure)
    assert [(run.case, run.seed) for run in found] == [("soft", 2), ("soft", 3), ("sharp", 2)]
    # Nobody has made the arm with the cap.
    assert found[0].reached == {SAMPLED: 0.9, TOP_K: 0.91}
    assert found[1].sft == pytest.approx(0.61)
    # With one arm alone there is nothing to be right about.
    alone = {name: value for name, value in MADE.items() if name != "sharp_top_k"}
    assert [run.case for run in runs_of(Made(alone), cases, measure)] == ["soft", "soft"]


def test_the_section_says_where_a_control_is_as_good(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("soft", "sharp"):
        (tmp_path / name / "2").mkdir(parents=True)
    monkeypatch.setattr("examples.study.recommendation.measure_regime", measure)
    text = section(Made(MADE), cases)
    warned, loss = text.split("\n\n")[1].split(" The recommended loss", 1)
    assert "rightly said or not said in 2 of 2 runs (always warned: 1 of 2, never" in warned
    assert "A control is as good" not in warned
    assert "A control is as good" in loss
    assert text.count("| soft teacher |") == text.count("| sharp teacher |") == 1
    with pytest.raises(MissingFigures):
        section(Made({}), cases)


def test_the_cases_name_arms_of_the_study() -> None:
    assert len({case.title for case in CASES}) == len(CASES) == 3
    for case in CASES:
        assert {SAMPLED, TOP_K} <= set(case.arms)
        assert case.cache(2).name == "score"
        assert case.cache(2) != case.cache(3)
