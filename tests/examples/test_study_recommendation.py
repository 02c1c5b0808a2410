"""How the study counts right recommendations: made-up figures in which they help, and in which a
control does as well.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from examples.study.arms import HABIT_SFT
from examples.study.claims import arms_of, load_claims
from examples.study.figures import Figures, MissingFigures
from examples.study.recommendation import (
    CAPPED,
    CASES,
    FILE,
    SAMPLED,
    TOP_K,
    Case,
    Run,
    judge_loss,
    judge_warning,
    record,
    runs_of,
    section,
    without_top_k,
)
from lopd.cache.recommendation import LEAST_TOKENS
from lopd.cache.regime import RegimeFigures
from tests.cache.rollouts import publish_cache, regime_of, some_responses

SOFT = replace(regime_of(20, 0, LEAST_TOKENS), min_advantage=-9.0, top_k=8, top_k_coverage=0.999)
SHARP = replace(SOFT, min_advantage=-25.0, clipped_share=0.003)


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


CASES_MADE = [
    Case(
        name,
        f"{name}_sft",
        {SAMPLED: f"{name}_lightning", TOP_K: f"{name}_top_k", CAPPED: f"{name}_capped"},
    )
    for name in ("soft", "sharp")
]
MADE = {
    "soft_sft": 0.6,
    "soft_lightning": 0.9,
    "soft_top_k": 0.91,
    "sharp_sft": 0.7,
    "sharp_lightning": 0.5,
    "sharp_top_k": 0.8,
}


def made(accuracies: dict[str, float], caches: dict[str, dict[int, RegimeFigures]]) -> Figures:
    """Figures of two seeds: by arm the share of right answers at T=1, and the caches of cases."""
    values = {arm: {"sampled": {2: value, 3: value + 0.01}} for arm, value in accuracies.items()}
    files = {
        f"{name}_sft": {FILE: {seed: asdict(one) for seed, one in of.items()}}
        for name, of in caches.items()
    }
    return Figures(values, files=files)


def test_the_runs_are_those_with_a_cache_and_with_figures() -> None:
    caches = {"soft": {2: SOFT, 3: SOFT, 4: SOFT}, "sharp": {2: SHARP}}
    found = runs_of(made(MADE, caches), CASES_MADE)
    assert [(run.case, run.seed) for run in found] == [("soft", 2), ("soft", 3), ("sharp", 2)]
    assert [run.figures for run in found] == [SOFT, SOFT, SHARP]
    # Nobody has made the arm with the cap.
    assert found[0].reached == {SAMPLED: 0.9, TOP_K: 0.91}
    assert found[1].sft == pytest.approx(0.61)
    # With one arm alone there is nothing to be right about.
    alone = {name: value for name, value in MADE.items() if name != "sharp_top_k"}
    assert [run.case for run in runs_of(made(alone, caches), CASES_MADE)] == ["soft", "soft"]
    assert runs_of(made(MADE, {}), CASES_MADE) == []


def test_the_section_says_where_a_control_is_as_good() -> None:
    figures = made(MADE, {"soft": {2: SOFT}, "sharp": {2: SHARP}})
    heading, _, warned, loss, _, table, limits = section(figures, CASES_MADE)
    assert heading.startswith("## ")
    assert "rightly said or not said in 2 of 2 runs (always warned: 1 of 2, never" in warned
    assert "A control is as good" not in warned
    assert "A control is as good" in loss
    assert table.count("| soft teacher |") == table.count("| sharp teacher |") == 1
    assert "tiny models" in limits
    with pytest.raises(MissingFigures):
        section(made({}, {}), CASES_MADE)
    # The page can be made again from the figures that it keeps.
    assert section(Figures.from_json(figures.as_json()), CASES_MADE) == section(figures, CASES_MADE)


def test_the_caches_are_measured_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.study.arms.RUNS", tmp_path)
    arms = {case.sft: replace(HABIT_SFT, name=case.sft) for case in CASES_MADE}
    run = arms["sharp_sft"].place(2).run
    assert run.is_relative_to(tmp_path)
    responses = some_responses(20)
    logprobs = [response.sampling_logprobs - 12 for response in responses]
    publish_cache(run / "score", responses, logprobs)
    record(arms, (2, 3), CASES_MADE)
    assert [*tmp_path.rglob(FILE)] == [run / FILE]
    found = RegimeFigures(**json.loads((run / FILE).read_text()))
    assert found.clipped_share == 1.0
    assert found.mean_advantage == pytest.approx(-12)


def test_the_cases_name_arms_of_the_study() -> None:
    assert len({case.title for case in CASES}) == len(CASES) == 3
    for case in CASES:
        assert {SAMPLED, TOP_K} <= set(case.arms)
    every = arms_of(load_claims())
    assert {case.sft for case in CASES} <= {*every}
    assert {arm for case in CASES for arm in case.arms.values()} <= {*every}
