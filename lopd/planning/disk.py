"""Bytes on disk of a run, by what takes them."""

from __future__ import annotations

from lopd.config import Config, TrainSection
from lopd.planning.assumptions import Assumptions
from lopd.planning.hours import Amounts
from lopd.planning.memory import SIZES

# Per parameter of a checkpoint besides the weights: two moments and the master weights of AdamW,
# each in float32.
CHECKPOINT_BYTES = 12
# Hugging Face folders of a run: SFT student, longer SFT, distilled student, export.
MODELS = 4


def disk_bytes(
    config: Config, parameters: int, amounts: Amounts, assumed: Assumptions
) -> dict[str, float]:
    """Return bytes on disk by what takes them.

    Args:
        config: The configuration of the run.
        parameters: Parameters of the student.
        amounts: Numbers of prompts and lengths of responses.
        assumed: Bytes per token of an artifact.
    """
    demonstrations = (
        amounts.sft_prompts * config.demonstrate.samples_per_prompt * amounts.demonstration_len
    )
    # Response tokens. Those of prompts are few beside them.
    rollouts = amounts.opd_prompts * config.rollout.samples_per_prompt * amounts.rollout_len
    # Teacher, base, SFT and distilled student answer, and the longer SFT if it is trained.
    evaluated = 5 if config.evaluate.equal_compute_baseline else 4
    answers = (
        amounts.eval_prompts * config.evaluate.samples_per_prompt * amounts.answer_len * evaluated
    )
    if not config.evaluate.enabled:
        answers = 0.0
    # What the configuration gives lies elsewhere.
    if config.sft.demonstrations is not None or config.sft.checkpoint is not None:
        demonstrations = 0.0
    if config.distill.cache is not None:
        rollouts = 0.0
    return {
        "checkpoints to resume from": _checkpoint_bytes(config, parameters),
        "models": float(MODELS * parameters * SIZES[config.distill.dtype]),
        "demonstrations": demonstrations * assumed.bytes_per_token,
        # The cache has all columns of the rollouts, and the teacher's log-probabilities besides.
        "rollouts and cache": 2 * rollouts * assumed.bytes_per_token,
        "answers": answers * assumed.bytes_per_token,
    }


def _checkpoint_bytes(config: Config, parameters: int) -> float:
    """Return the bytes of all checkpoints to resume from."""
    trainings: list[TrainSection] = [config.distill]
    if config.sft.checkpoint is None:
        trainings.append(config.sft)
    size = 0.0
    for settings in trainings:
        # At the end a model is exported, and no checkpoint is needed. So a training that saves
        # none before its last step has none.
        before_the_end = (settings.num_steps - 1) // settings.checkpoint_every
        # One more than is kept: the oldest is removed when the newest is whole.
        saved = min(before_the_end, settings.keep_checkpoints + 1)
        size += saved * parameters * (CHECKPOINT_BYTES + SIZES[settings.dtype])
    return size
