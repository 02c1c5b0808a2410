"""Bytes on disk of a run, by what takes them."""

from __future__ import annotations

from lopd.config import Config
from lopd.planning.assumptions import Assumptions
from lopd.planning.hours import Amounts
from lopd.planning.memory import SIZES

CHECKPOINT_BYTES = 12  # per parameter: two moments and the float32 copy
MODELS = 4  # SFT student, longer SFT, distilled student, export


def disk_bytes(
    config: Config, parameters: int, amounts: Amounts, assumed: Assumptions
) -> dict[str, float]:
    """Checkpoints to resume from (one more than is kept while one is written), models, and the
    responses as Parquet.

    A training needs no checkpoint to resume from where it saves none before its end.
    """
    checkpoints = 0.0
    for section in (
        (config.distill,) if config.sft.checkpoint is not None else (config.sft, config.distill)
    ):
        saved = min(
            (section.num_steps - 1) // section.checkpoint_every, section.keep_checkpoints + 1
        )
        checkpoints += saved * parameters * (CHECKPOINT_BYTES + SIZES[section.dtype])
    demonstrations = (
        amounts.sft_prompts * config.demonstrate.samples_per_prompt * amounts.demonstration_len
    )
    rollouts = amounts.opd_prompts * config.rollout.samples_per_prompt * amounts.rollout_len
    made = {
        "demonstrations": config.sft.demonstrations is None and config.sft.checkpoint is None,
        "rollouts": config.distill.cache is None,
    }
    models = 5 if config.evaluate.equal_compute_baseline else 4
    answers = (
        amounts.eval_prompts * config.evaluate.samples_per_prompt * amounts.answer_len * models
    )
    return {
        "checkpoints to resume from": checkpoints,
        "models": float(MODELS * parameters * SIZES[config.distill.dtype]),
        "demonstrations": demonstrations * assumed.bytes_per_token * made["demonstrations"],
        "rollouts and cache": 2 * rollouts * assumed.bytes_per_token * made["rollouts"],
        "answers": answers * assumed.bytes_per_token,
    }
