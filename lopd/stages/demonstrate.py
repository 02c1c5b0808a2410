"""Demonstrate: the teacher answers the SFT prompts. x ~ pi_T(. | q)."""

from __future__ import annotations

from lopd.artifacts.lineage import demonstrated_by
from lopd.stages.context import Stage, StageContext
from lopd.stages.domains import demonstrate_by_domain
from lopd.stages.sampling import sample_stage


def run(context: StageContext) -> None:
    if context.config.models.teachers:
        demonstrate_by_domain(context)
        return
    config, teacher = context.config, context.config.models.teacher
    identity = context.identity("teacher")
    writer = context.writer(
        models={"teacher": identity},
        sampling=context.sampling_record(config.demonstrate),
        lineage=demonstrated_by(identity),
        shard_size=config.demonstrate.shard_size,
    )
    sample_stage(
        context,
        writer,
        config.demonstrate,
        prompt_set="sft",
        role="teacher",
        model=teacher,
        title="demonstrations",
    )
    writer.finish(served=context.served)


STAGE = Stage(
    name="demonstrate",
    summary="The teacher, on SGLang, answers the SFT prompts.",
    kind="demonstrations",
    knobs=("task", "sglang", "demonstrate"),
    models=("teacher",),
    prompts=("sft",),
    parents=lambda config: (),
    run=run,
)
