"""The stages of the method, one file each, in the order of the pipeline."""

from lopd.stages import demonstrate, distill, evaluate, export, rollout, score, sft
from lopd.stages.context import Stage, StageContext

STAGES: tuple[Stage, ...] = (
    demonstrate.STAGE,
    sft.STAGE,
    rollout.STAGE,
    score.STAGE,
    distill.STAGE,
    evaluate.STAGE,
    export.STAGE,
)

__all__ = ["STAGES", "Stage", "StageContext"]
