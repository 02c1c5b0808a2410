"""Distill: Lightning OPD. The student learns from its own responses, which its teacher has scored.

    theta += lr * E[ sum_t A_t * grad log pi_theta(a_t | s_t) ]
    A_t = clip(log pi_T(a_t | s_t) - log pi_theta(a_t | s_t), -clip, clip)

The responses were sampled once from pi_ref, the SFT student, and log pi_T comes from the cache. So
no teacher runs beside the training. With ``distill.refresh`` the current student samples anew every
so often, and the same teacher scores its responses (lopd.stages.refresh_service).

``train`` below is the loop; every rank runs it. ``run`` starts the ranks and the servers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopd.artifacts import identify_model, read_manifest
from lopd.artifacts.lineage import check_given_cache
from lopd.cache.checks import require_sound
from lopd.cache.reader import CacheReader
from lopd.cache.recommendation import goes_against, recommend, told
from lopd.cache.regime import measure_regime
from lopd.report.metrics import read_metrics
from lopd.stages.between_steps import StepHooks
from lopd.stages.context import Stage, StageContext
from lopd.stages.refresh_record import RefreshRecord, describe
from lopd.stages.refresh_service import RefreshService
from lopd.stages.training import MODEL, TrainingJob, require_batch, train_on_ranks
from lopd.stages.training_data import distillation_objective, kept_rows, load_samples
from lopd.stages.training_kl import rises_of
from sglang_rollout.servers.shared_gpus import training_settings


def train(job: TrainingJob) -> None:
    """Train the student. Every rank calls this function with the same job."""
    # Imported here, because the parent process imports this file and needs no Megatron-Core.
    from lopd.stages.training_rank import Training

    # Servers that share the GPUs give their memory back here, before the trainer is built.
    between_steps = _between_steps(job)
    # Prompts q, responses a ~ pi_ref(. | q), and log pi_T(a_t | s_t) of every response token.
    samples = load_samples(job)
    # The update above is the negative gradient of a Huber loss on log pi_T - log pi_theta. This is
    # that loss (lopd.objective.lightning), with the pieces that distill.objective adds to it.
    loss = distillation_objective(job)
    training = Training(job, samples, loss, entropy=job.config.distill.student_entropy)
    between_steps.begin(training)
    # After a kill it continues at the newest checkpoint, with the batches that it would have had.
    for step in training.remaining_steps():
        # A weight sync with an evaluation, then a refresh of the responses, where they are needed.
        between_steps.before_step(step)
        batch = training.batches.of_step(step)
        # Per microbatch one forward pass, which gives log pi_theta, then the loss, and one backward
        # pass; after all of them one update of the weights. No second forward pass for "old"
        # log-probabilities is needed: with one update per batch they are those of this pass.
        result = training.trainer.train_step(batch.microbatches)
        training.record(result, batch, between_steps.after_step(result))
        training.save_checkpoint_if_needed()
    training.trainer.finish_checkpoint()
    between_steps.end()
    training.publish_model()


def _between_steps(job: TrainingJob) -> StepHooks:
    """Return what happens before a step, in this order. Plain Lightning OPD has nothing there."""
    from lopd.stages.held_out import HeldOutEvaluation
    from lopd.stages.refresh_requester import RefreshRequester
    from lopd.stages.student import GpusToTrainer, StudentServer

    if job.student is None:
        return StepHooks()
    # The order matters: the student comes first, because the other hooks use it.
    student = StudentServer(job, job.student)
    evaluation = [HeldOutEvaluation(job, student)] if job.config.evaluates_at_syncs else []
    refreshes = [RefreshRequester(job, student)] if job.config.distill.refresh.is_on else []
    # An evaluation comes right before a refresh, so one weight sync serves both. The GPUs go back
    # to the trainer after both.
    return StepHooks(student, *evaluation, *refreshes, GpusToTrainer(student))


def run(context: StageContext) -> None:
    """Publish the distilled student."""
    config = context.config
    sft_model = context.folder_of("sft") / MODEL
    # Checked first: with another teacher's scores the gradient is wrong from the first step on.
    data, lineage = cache_of(context, sft_model)
    writer = context.writer(models={"student": context.identity("student")}, lineage=lineage)
    job = TrainingJob(
        objective="distill",
        config=config,
        folder=context.folder,
        data=data,
        initial=sft_model,
        init="checkpoint",
        num_steps=config.distill.num_steps,
        order_seed=config.run.seed,
    )
    require_batch(job, _num_kept(context, job))
    warnings = _say_regime(context, data)
    result = _train_beside_servers(context, job)
    # The model is part of the artifact: its files stand in the manifest with their checksums.
    evals = read_metrics(config.run.dir, kind="eval", stage=job.stage)
    warnings += rises_of(evals)
    writer.finish(files=job.files, warnings=warnings, **_figures(result, context))


def _train_beside_servers(context: StageContext, job: TrainingJob) -> dict[str, Any]:
    """Run ``train`` on the ranks, with the servers that it needs, and return its result."""
    # A finished training needs no server: only its result is read. The servers outlive the ranks,
    # because the ranks send them weights until their last line.
    distill = context.config.distill
    needs_student = context.config.evaluates_at_syncs or distill.refresh.is_on
    if job.result.exists() or not needs_student:
        return train_on_ranks(job)
    with context.serve("student", job.initial, training_settings(context.config)) as student:
        if not distill.refresh.is_on:
            return train_on_ranks(job, student)
        with RefreshService(context, student, job.initial) as service:
            return train_on_ranks(job, student, serve_requests=service.serve_requests)


def cache_of(context: StageContext, sft_model: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the folder and the lineage of the teacher cache that the student learns from.

    It is the score stage's cache, or ``distill.cache`` after it has been checked.

    Raises:
        ConsistencyError: The given cache has the responses of another student; or its teacher did
            not make the demonstrations, and the scores are not corrected for that.
        LopdError: The given cache is damaged or not complete.
    """
    given = context.config.distill.cache
    if given is None:
        return context.folder_of("score"), context.manifest_of("score").lineage
    # A cache from elsewhere has no parent in this run. So its student and its teacher are compared
    # by content, and its rows are verified once.
    manifest = read_manifest(given)
    student = identify_model(sft_model)
    allow_foreign = context.config.distill.allow_foreign_cache
    lineage = check_given_cache(manifest, given, student, allow_foreign=allow_foreign)
    require_sound(given)
    note = lineage["cache"]["note"]
    context.log(f"learns from {given} ({manifest.rows:,} responses): {note}")
    return given, lineage


def _num_kept(context: StageContext, job: TrainingJob) -> int:
    """Return how many responses are learnt from, and say so where it is not all of them."""
    reader = CacheReader(job.data)
    num_kept = len(kept_rows(reader, job))
    if num_kept < len(reader):
        context.log(
            f"learns from {num_kept:,} of {len(reader):,} responses: the teacher fails the prompts "
            "of the others (distill.teacher_verdicts)"
        )
    return num_kept


def _say_regime(context: StageContext, data: Path) -> list[str]:
    """Say how far the teacher is from the student and whether the loss suits it.

    Returns:
        The same as a warning, where the loss does not. What is trained is as configured.
    """
    # From a part of the cache: the ranks read all of it, and it may have 60 GB.
    figures = measure_regime(data)
    recommendation = recommend(figures)
    if figures is None or recommendation is None:
        return []
    line = told(recommendation, context.config.distill)
    is_wrong = goes_against(recommendation, context.config.distill)
    part = f"(from {figures.num_tokens:,} tokens of {figures.num_shards} of "
    context.log(
        f"{'WARNING: ' if is_wrong else ''}{line} {part}{figures.num_shards_in_cache} shards)"
    )
    return [line] if is_wrong else []


def _figures(result: dict[str, Any], context: StageContext) -> dict[str, Any]:
    """Return the training's metrics for the manifest, and of each refresh where and what it is."""
    if "refreshes" not in result:
        return result
    made = [RefreshRecord(**fields) for fields in result["refreshes"]]
    # The last step may have asked for a refresh that no further step needs.
    figures = {name: value for name, value in result.items() if name != "refresh_due"}
    return {**figures, "refreshes": describe(made, context.folder)}


STAGE = Stage(
    name="distill",
    summary=(
        "The Lightning OPD update on Megatron-Core, with weight syncs into a running SGLang server."
    ),
    kind="distilled_student",
    knobs=("distill",),
    models=("student",),
    prompts=(),
    parents=lambda config: ("sft",) if config.distill.cache is not None else ("sft", "score"),
    run=run,
)

if __name__ == "__main__":
    from lopd.stages.training_rank import run_rank

    run_rank(train)
