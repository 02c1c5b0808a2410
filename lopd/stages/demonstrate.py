"""Demonstrate: the teacher answers the SFT prompts. x ~ pi_T(. | q)."""

from __future__ import annotations

from lopd.artifacts import identify_tokenizer
from lopd.artifacts.lineage import demonstrated_by
from lopd.megatron.weights.architecture import read_architecture
from lopd.stages.context import Stage, StageContext
from lopd.stages.domains import demonstrate_by_domain
from lopd.stages.sample_shards import sample_stage
from lopd.stages.tokenizer_bridge import demonstrate_in_student_tokens, tokenizer_figures
from lopd.stages.truncation import truncation_figures


def run(context: StageContext) -> None:
    """Publish the demonstrations."""
    config = context.config
    if config.models.teachers:
        # Each domain's prompts have shards and a teacher of their own.
        demonstrate_by_domain(context)
        return
    # By content: a teacher in another folder is the same teacher, an updated one is not.
    teacher = context.identity("teacher")
    models = {"teacher": teacher}
    if config.aligns_tokenizers:
        # Whose tokens the rows have.
        models["base_student"] = identify_tokenizer(config.models.student)
    writer = context.writer(
        models=models,
        sampling=context.sampling_record(config.demonstrate),
        # Every later artifact carries this on, so that the score stage knows the teacher.
        lineage=demonstrated_by(teacher),
        shard_size=config.demonstrate.shard_size,
    )
    if config.aligns_tokenizers:
        # The teacher answers in its own tokens, and the student learns the text in its own.
        demonstrate_in_student_tokens(context, writer)
        more = {
            **tokenizer_figures(config),
            "vocab_size": read_architecture(config.models.student).vocab_size,
        }
        writer.finish(served=context.served, **more, **truncation_figures(context, writer.folder))
        return
    sample_stage(
        context,
        writer,
        config.demonstrate,
        prompt_set="sft",
        role="teacher",
        model=config.models.teacher,
        title="demonstrations",
    )
    writer.finish(served=context.served, **truncation_figures(context, writer.folder))


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
