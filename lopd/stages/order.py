"""All stages, in the order of the pipeline."""

from __future__ import annotations

from lopd.config import Config
from lopd.stages import demonstrate, distill, evaluate, export, rollout, score, sft
from lopd.stages.context import Stage

# Each stage reads only stages before it, so running them in this order is always right.
STAGES: tuple[Stage, ...] = (
    demonstrate.STAGE,
    sft.STAGE,
    rollout.STAGE,
    score.STAGE,
    distill.STAGE,
    evaluate.STAGE,
    export.STAGE,
)


def stage_named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def is_needed(stage: Stage, config: Config) -> bool:
    """Return whether a run needs a stage.

    It does not where its result is given from elsewhere, or where evaluation is switched off.
    """
    # A student or demonstrations from elsewhere replace the teacher's demonstrations. A teacher
    # cache from elsewhere replaces the rollouts and their scores.
    given = {
        "demonstrate": config.sft.demonstrations or config.sft.checkpoint,
        "rollout": config.distill.cache,
        "score": config.distill.cache,
    }
    if stage.name == "evaluate":
        return config.evaluate.enabled
    return given.get(stage.name) is None
