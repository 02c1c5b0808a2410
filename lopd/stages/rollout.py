"""Rollout: the SFT student answers each OPD prompt once. a ~ pi_ref(. | q).

Lightning OPD keeps these responses as they are while distill learns from them.
"""

from __future__ import annotations

from lopd.artifacts import identify_model
from lopd.stages.context import Stage, StageContext
from lopd.stages.dialogues import turns_of
from lopd.stages.domains import roll_out_by_domain
from lopd.stages.given_rollouts import check_given_rollouts, take_given_rollouts
from lopd.stages.sample_shards import sample_stage
from lopd.stages.training import MODEL
from lopd.stages.truncation import truncation_figures


def run(context: StageContext) -> None:
    """Publish the rollouts."""
    # The SFT student, not the base student: its policy pi_ref is what the method starts from.
    config = context.config
    student = context.folder_of("sft") / MODEL
    identity = identify_model(student)
    sampling = context.sampling_record(config.rollout)
    models = {"student": identity}
    given = None
    if config.rollout.responses is not None:
        given = check_given_rollouts(context, identity)
        sampling = given.sampling
        models = dict(given.models)
    writer = context.writer(
        models={"base_student": context.identity("student"), **models},
        # Whoever corrects for the sampling later, or audits it, must know how it was done.
        sampling=sampling,
        # The score stage compares its teacher with the one that is named here.
        lineage=context.manifest_of("sft").lineage,
        shard_size=config.rollout.shard_size,
    )
    if given is not None:
        take_given_rollouts(context, writer)
        cut = truncation_figures(context, writer.folder, is_wanted=True)
        writer.finish(given=given.note, **cut)
        return
    if config.models.teachers:
        # A domain's responses go into shards of their own, so that its teacher can score them
        # alone.
        parts = roll_out_by_domain(context, writer, student)
        cut = truncation_figures(context, writer.folder)
        writer.finish(served=context.served, parts=parts, **cut)
        return
    sample_stage(
        context,
        writer,
        config.rollout,
        prompt_set="opd",
        role="student",
        model=student,
        title="rollouts",
        turns_of=turns_of,
    )
    writer.finish(served=context.served, **truncation_figures(context, writer.folder))


STAGE = Stage(
    name="rollout",
    summary="The SFT student, on SGLang, answers each OPD prompt once.",
    kind="rollouts",
    knobs=("task", "sglang", "rollout"),
    models=(),
    prompts=("opd",),
    parents=lambda config: ("sft",),
    run=run,
)
