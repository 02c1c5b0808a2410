"""The study's claims about two teachers: what the arms are made of, and the judgements of made-up
figures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from examples.study import claim_2, claim_5, corrected_cache, second_teacher
from examples.study.arms import HABIT, SMALL, Arm, Place
from examples.study.figures import Figures
from examples.study.two_teachers import (
    MEASURED_MODELS,
    OFFLINE,
    ONLINE,
    SETTINGS,
    SFT_A,
    SFT_B,
    SFT_WEAK,
    WEAK,
)
from lopd import cache
from lopd.cache.row_checks import RESIDUALISED
from lopd.config import Config, load_config
from lopd.records import float32
from lopd.tasks.register_arithmetic import NUM_PARTITIONS
from tests.cache.rollouts import publish_cache, some_responses

SEEDS = (2, 3, 4, 5, 6)
ARMS = {arm.name: arm for claim in (claim_2.CLAIM, claim_5.CLAIM) for arm in claim.arms}
# Different from seed to seed, with a mean of 0: half an interval is 0.6 points wide.
NOISE = (-0.006, -0.003, 0.0, 0.003, 0.006)


def place_of(arm: Arm, seed: int = 3) -> Place:
    folder = Path("/runs") / f"seed-{seed}"
    return Place(seed, folder / arm.name, folder)


def configs_of(arm: Arm) -> dict[str, Config]:
    """Return the configuration of each verb that makes an arm."""
    place = place_of(arm)
    return {
        verb: load_config(
            arm.setting.config,
            [f"run.dir={place.run}", *arm.setting.overrides(place.seed), *arguments],
        )
        for kind, verb, *arguments in arm.commands(place)
        if kind == "lopd"
    }


def test_no_setting_has_prompts_of_another_one_or_of_written_demonstrations() -> None:
    # 1 to 3 and 11 to 15 are those of the examples and of the texts that made their models.
    used = {1, 2, 3, *range(11, 16), *(recipe.seed for recipe in second_teacher.RECIPES)}
    for setting in (HABIT, SMALL, SETTINGS["a"]):
        for seed in SEEDS:
            prompts = load_config(setting.config, setting.overrides(seed)).prompts
            for of_set in (prompts.sft.seed, prompts.opd.seed):
                assert of_set not in used
                assert of_set < NUM_PARTITIONS, "the task has no such prompts"
                used.add(of_set)


def test_there_are_no_more_arms_than_the_study_has_time_for() -> None:
    assert len(ARMS) == 14
    assert all(name.startswith(("c2_", "c5_")) for name in ARMS)
    for arm in ARMS.values():
        for other in (*(name for name, _ in arm.copied), *arm.after):
            assert other in ARMS


@pytest.mark.parametrize("name", ARMS)
def test_the_configuration_accepts_the_commands_of_an_arm(name: str) -> None:
    arm = ARMS[name]
    configs = configs_of(arm)
    assert configs
    for config in configs.values():
        assert config.distill.objective.loss == "lightning"
        assert config.sglang.replicas == 1
        # The generator of problems has 256 partitions, and those below 30 have other uses.
        assert {config.prompts.sft.seed, config.prompts.opd.seed} == {143, 163}


def test_a_cell_has_the_student_of_one_teacher_and_the_scores_of_another() -> None:
    for pair, arm in OFFLINE.items():
        sft = SFT_A if pair[0] == "a" else SFT_B
        configs = configs_of(arm)
        assert [*configs] == ["score", "distill"]
        for config in configs.values():
            assert config.models.teacher.parent.parent.name == f"teacher_{pair[1]}"
            assert config.sft.demonstrations == place_of(sft).run / "demonstrate"
            # Where the teacher is the same, the guard stays: an override would hide a mistake.
            assert config.score.allow_foreign_teacher == (pair[0] != pair[1])
            assert not config.distill.refresh.is_on
        assert arm.copied == ((sft.name, "sft"), (sft.name, "rollout"))
        assert configs_of(ONLINE[pair])["distill"].distill.refresh.every == 1
        # SFT itself knows one teacher alone.
        made = configs_of(sft)["sft"]
        assert made.models.teacher.parent.parent.name == f"teacher_{pair[0]}"
        assert made.sft.num_steps == configs["score"].sft.num_steps
    assert configs_of(SFT_WEAK)["sft"].sft.num_steps < made.sft.num_steps
    assert configs_of(WEAK)["distill"].sft == configs_of(SFT_WEAK)["rollout"].sft


def figures(
    sampled: Mapping[str, float], *, start: Mapping[str, float] | None = None, noise: float = 1.0
) -> Figures:
    """Return figures in which arms have the mean accuracies that are given, and others 0.9."""
    distances = start or {}
    values = {}
    steps = {}
    for index, name in enumerate(ARMS):
        mean = sampled.get(name, 0.9)
        # Another order for each arm, so that the noise is no common one.
        noises = np.roll(NOISE, index) * noise
        of_seeds = {seed: mean + extra for seed, extra in zip(SEEDS, noises, strict=True)}
        values[name] = {
            "sampled": of_seeds,
            "greedy": of_seeds,
            "reverse_kl": dict.fromkeys(SEEDS, 0.01),
        }
        points = [(0, distances.get(name, 0.06)), (1, 0.01)]
        steps[name] = {"reverse_kl": dict.fromkeys(SEEDS, points)}
    of_model = {"sampled": 0.97, "greedy": 0.98, "reverse_kl": 0.05, "tokens": 50.0}
    pairs = ("teacher_a_by_teacher_b", "teacher_b_by_teacher_a", "two_notations_by_teacher_a")
    measured = dict.fromkeys(pairs, of_model)
    files = {SFT_A.name: {MEASURED_MODELS: dict.fromkeys(SEEDS, measured)}}
    return Figures(values, steps, files=files)


CROSSED = ("c2_ab", "c2_ba", "c2_ab_online", "c2_ba_online")
COSTLY = dict.fromkeys(CROSSED, 0.8)


def test_a_cost_that_the_distance_does_not_explain_is_one_of_consistency() -> None:
    verdict = claim_2.judge(figures(COSTLY))
    assert verdict.answer == "holds"
    assert "+10.0" in verdict.summary
    assert "the distance alone does not explain it" in verdict.summary


def test_a_cost_that_the_weaker_student_has_too_is_one_of_distance() -> None:
    verdict = claim_2.judge(figures({**COSTLY, "c2_weak": 0.8}))
    assert verdict.answer == "does not hold"
    assert "beyond the distance" in verdict.summary


def test_without_a_cost_the_claim_does_not_hold_and_with_wide_intervals_it_is_open() -> None:
    verdict = claim_2.judge(figures({}))
    assert verdict.answer == "does not hold"
    assert "no gain larger than" in verdict.summary
    assert claim_2.judge(figures({}, noise=20)).answer == "open"
    # Only offline.
    assert claim_2.judge(figures({"c2_ab": 0.8, "c2_ba": 0.8})).answer == "open"


def test_a_control_at_another_distance_decides_nothing() -> None:
    verdict = claim_2.judge(figures(COSTLY, start={"c2_weak": 0.03}))
    assert verdict.answer == "open"
    assert "not matched: the ratio is 2.00" in verdict.summary
    # A better teacher or a better student alone is no consistency.
    better = {"c2_ba": 0.8, "c2_bb": 0.8, "c2_ba_online": 0.8, "c2_bb_online": 0.8}
    assert claim_2.judge(figures(better)).answer == "does not hold"


def test_the_correction_holds_only_where_something_was_lost() -> None:
    lost = {"c2_ba": 0.8}
    verdict = claim_5.judge(figures({**lost, "c5_foreign": 0.88, "c5_own": 0.85}))
    assert verdict.answer == "holds"
    assert "+8.0" in verdict.summary
    assert "(worse)" in verdict.summary
    assert claim_5.judge(figures({"c5_foreign": 0.95})).answer == "open"
    assert claim_5.judge(figures({**lost, "c5_foreign": 0.8})).answer == "does not hold"
    assert claim_5.judge(figures({"c5_foreign": 0.8})).answer == "does not hold"
    assert claim_5.judge(figures({}, noise=20)).answer == "open"


def test_every_table_has_as_many_cells_as_titles() -> None:
    for claim in (claim_2.CLAIM, claim_5.CLAIM):
        tables = [text for text in claim.judge(figures(COSTLY)).details if text.startswith("|")]
        assert len(tables) == 1
        assert len({line.count("|") for line in tables[0].splitlines()}) == 1


def test_the_page_says_how_good_and_how_far_apart_the_teachers_are() -> None:
    text = claim_2.judge(figures({})).details[0]
    assert "teacher B in 97.0%" in " ".join(text.split())
    assert "0.0500 nats per token (2.50 a response)" in " ".join(text.split())


def test_the_corrected_cache_has_other_scores_and_the_same_responses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = some_responses(60)
    teacher = [float32(response.sampling_logprobs - 0.5) for response in responses]
    publish_cache(tmp_path / "score", responses, teacher)
    out = tmp_path / "corrected"
    monkeypatch.setattr(sys, "argv", ["corrected_cache", str(tmp_path / "score"), str(out)])
    corrected_cache.main()
    rows = [*cache.read_rows(out)]
    assert len(rows) == len(responses)
    for (found, scores), response, before in zip(rows, responses, teacher, strict=True):
        assert found.prompt_id == response.prompt_id
        np.testing.assert_array_equal(found.token_ids, response.token_ids)
        np.testing.assert_array_equal(found.sampling_logprobs, response.sampling_logprobs)
        assert scores is not None
        # All that this teacher has is the same half nat everywhere.
        np.testing.assert_allclose(scores, before + 0.5, atol=1e-5)
    assert json.loads((out / "manifest.json").read_text())["kind"] == RESIDUALISED
    # After a kill, and after it is finished, the same call goes on.
    corrected_cache.main()


def test_the_models_are_made_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(second_teacher, "MADE", tmp_path)
    monkeypatch.setattr(second_teacher, "RESULT", tmp_path / "teachers.json")
    monkeypatch.setattr(second_teacher, "make", lambda: calls.append("make"))
    monkeypatch.setattr(second_teacher, "measured", lambda: {})
    monkeypatch.setattr(sys, "argv", ["second_teacher", str(tmp_path / "run" / "copy.json")])
    second_teacher.main()
    second_teacher.main()
    assert json.loads((tmp_path / "run" / "copy.json").read_text()) == {}
    assert calls == ["make"]
    changed = (*second_teacher.RECIPES[:2], second_teacher.RECIPES[0])
    monkeypatch.setattr(second_teacher, "RECIPES", changed)
    second_teacher.main()
    assert calls == ["make", "make"]


def test_the_teachers_are_made_alike_and_differ_in_the_notation() -> None:
    made = {recipe.name: recipe for recipe in second_teacher.RECIPES}
    a, b = made["teacher_a"], made["teacher_b"]
    assert a.semicolons == pytest.approx(1 - b.semicolons)
    for field in ("begins_with", "num_steps", "lr", "skip"):
        assert getattr(a, field) == getattr(b, field)
    for recipe in made.values():
        _, train = recipe.commands()
        config = load_config(train[2], train[3:])
        assert config.sft.num_steps * config.sft.batch_size == 64 * recipe.num_steps
        assert config.run.dir.name == recipe.name
