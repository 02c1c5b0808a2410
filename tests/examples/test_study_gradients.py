"""What claim 4 takes from the trainer for the gap of two gradients, on one rank, and the responses
that it is taken on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.study import gradient_gap
from examples.study.arms import HABIT, LIGHTNING, MODELS
from examples.study.gradient_control import differences_of, exchanged
from examples.study.gradient_gap import Gradients, job_with, measured, sample_and_score, samples_of
from lopd.config import load_config
from lopd.megatron.ranks import parallel
from tests.limits import close
from tests.megatron import trainer_cases
from tests.megatron.launch import run_ranks
from tests.stand_ins import StandIns

MODEL = MODELS / "small_student"


def body(folder: str) -> dict[str, float]:
    """What the figures of a model are made of, and what they must be by the trainer's own step."""
    overrides = [*HABIT.overrides(2), *LIGHTNING, f"run.dir={folder}"]
    job = job_with(load_config(HABIT.config, overrides), Path(folder), MODEL)
    parallel.initialize(job.settings.parallel, seed=1, timeout_s=500)
    gradients = Gradients(job, MODEL)
    samples = trainer_cases.samples_of(0, 8, vocab_size=32)
    others = trainer_cases.samples_of(1, 8, vocab_size=32)
    before = gradients.weights()
    whole, figures = gradients.gradient(samples)
    halves = [gradients.gradient(samples[part])[0] for part in (slice(0, 4), slice(4, 8))]
    home = before + 0.01
    found = measured(gradients, samples, others, home)
    same = measured(gradients, samples, samples, home)
    return {
        "moved": float(np.abs(gradients.weights() - before).max()),
        "norm": float(np.linalg.norm(whole)),
        "grad_norm": figures["grad_norm"],
        # The loss is a mean over responses, so the gradient is the mean of those of two halves.
        "off": float(np.abs((halves[0] + halves[1]) / 2 - whole).max() / np.abs(whole).max()),
        "log_weight": float(gradients.log_weights(samples).mean()),
        "sequence_log_weight": figures["sequence_log_weight"],
        "gap_squared": found["gap_squared"],
        "by_prompt": exchanged(differences_of(gradients, samples, others), seed=1)["gap_squared"],
        "same": same["gap_squared"],
        "same_pull": same["pull"],
        "pull": found["pull"],
        "bound": found["bound"],
        "rms": found["rms_gradient"],
        "chi_square": found["sequence_chi_square"],
    }


def test_gradients_are_the_trainers_and_change_no_weight(tmp_path: Path) -> None:
    (found,) = run_ranks(body, 1, folder=str(tmp_path))
    assert found["moved"] == 0.0
    assert found["norm"] == pytest.approx(found["grad_norm"], rel=1e-5)
    assert found["norm"] > 1e-3
    assert found["off"] < 1e-4
    assert found["log_weight"] == pytest.approx(found["sequence_log_weight"], rel=1e-5)
    # The same responses on both sides: no gap, to the bit. The control has other ones.
    assert (found["same"], found["same_pull"]) == (0.0, 0.0)
    assert found["gap_squared"] != 0.0
    # The control's square, from the gradients of single responses, is the same square.
    close(found["by_prompt"], found["gap_squared"], rel=1e-3)
    assert found["pull"] != 0.0
    assert found["bound"] == pytest.approx(found["rms"] * max(0.0, found["chi_square"]) ** 0.5)


def test_each_model_samples_and_the_teacher_scores_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins = StandIns().install(monkeypatch)
    few = "prompts.eval={num_prompts=6,seed=3}"
    config = load_config(HABIT.config, [*HABIT.overrides(2), few, f"run.dir={tmp_path}"])
    models = {"sft": MODELS / "student", "step-0": MODELS / "student"}
    sample_and_score(config, models, config.models.teacher)
    assert len(stand_ins.served) == 1, "one server for all of them"
    assert stand_ins.engine.answered == 2 * (6 + 6)
    frozen, fresh = (samples_of(tmp_path / name / "scores") for name in models)
    # The same prompts in the same order, and draws of their own, even of the same model.
    assert [one.key for one in frozen] == [one.key for one in fresh]
    assert not any(
        np.array_equal(one.token_ids, other.token_ids)
        for one, other in zip(frozen, fresh, strict=True)
    )
    assert frozen[0].teacher_logprobs is not None
    sample_and_score(config, models, config.models.teacher)
    assert stand_ins.engine.answered == 2 * (6 + 6), "what is published is not made again"


def test_the_gap_names_its_figures_as_the_page_reads_them() -> None:
    from examples.study import claim_4

    written = {"gap", "gap_squared", "fresh_norm", "frozen_norm", "pull", "chi_square"}
    written |= {"effective_sample_share", "sequence_chi_square", "rms_gradient", "bound"}
    assert set(claim_4.GAP_COLUMNS) <= written
    half = gradient_gap.Half(np.ones(2), np.zeros(2))
    assert set(gradient_gap.gap_of(half, half)) <= written


def test_exchanges_tell_a_gap_from_noise() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(200, 30)).astype(np.float32)
    nothing = exchanged(noise, seed=1)
    # The product of two means of 100 such rows, in 30 dimensions.
    assert nothing["deviation"] == pytest.approx(30**0.5 / 100, rel=0.2)
    assert nothing["share_as_large"] > 0.05
    # The control: a difference of 0.2 in every weight, whose square is 1.2.
    there = exchanged(noise + np.float32(0.2), seed=1)
    assert there["gap_squared"] == pytest.approx(1.2, abs=0.3)
    assert there["share_as_large"] < 0.01
