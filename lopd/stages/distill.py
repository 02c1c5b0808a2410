"""Distill: Lightning OPD. theta += lr * E[ sum_t A_t * grad log pi_theta(a_t | s_t) ], A_t =
clip(log pi_T - log pi_theta), on frozen rollouts.

The teacher's side comes from the cache; the objective is lopd.objective.lightning. Every
``distill.sync_every`` steps the weights go into a running SGLang server, which answers held-out
prompts. With ``distill.refresh`` the rollouts thaw: every so often the current student answers the
next prompts, and the same teacher scores them (lopd.stages.refresh).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lopd.artifacts import identify_model, read_manifest
from lopd.artifacts.lineage import check_given_cache
from lopd.cache.checks import require_sound
from lopd.stages.context import Stage, StageContext
from lopd.stages.refresh import Refresher
from lopd.stages.refreshed import Refresh, describe
from lopd.stages.training import MODEL, TrainingJob, train
from sglang_rollout.servers.shared_gpus import training_settings


def run(context: StageContext) -> None:
    config, sft_model = context.config, context.folder_of("sft") / MODEL
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
    refreshed = config.distill.refresh.is_on
    if (config.distill.sync_every or refreshed) and not job.result.exists():
        with (
            context.serve("student", sft_model, training_settings(config)) as engine,
            Refresher(context, engine, sft_model) if refreshed else nullcontext() as refresher,
        ):
            result = train(
                job, engine=engine, attend=None if refresher is None else refresher.attend
            )
    else:
        result = train(job)
    writer.finish(
        files=(path for path in job.model.iterdir() if path.is_file()),
        **_described(result, context),
    )


def cache_of(context: StageContext, sft_model: Path) -> tuple[Path, Mapping[str, Any]]:
    """What is learnt from, and its lineage: the cache of the score stage, or distill.cache once it
    is found sound and this student's.

    ConsistencyError: it is another student's, or its teacher is not that of the demonstrations, nor
    corrected for it. LopdError: it is not sound.
    """
    given = context.config.distill.cache
    if given is None:
        return context.folder_of("score"), context.manifest_of("score").lineage
    manifest, student = read_manifest(given), identify_model(sft_model)
    lineage = check_given_cache(
        manifest, given, student, allow_foreign=context.config.distill.allow_foreign_cache
    )
    require_sound(given)
    context.log(f"learns from {given} ({manifest.rows:,} responses): {lineage['cache']['note']}")
    return given, lineage


def _described(result: dict[str, Any], context: StageContext) -> dict[str, Any]:
    """The training's figures; of refreshes also where and what they are."""
    if "refreshes" not in result:
        return result
    made = [Refresh(**fields) for fields in result["refreshes"]]
    return {name: value for name, value in result.items() if name != "refresh_due"} | {
        "refreshes": describe(made, context.folder)
    }


STAGE = Stage(
    name="distill",
    summary="The Lightning OPD update on Megatron-Core, with weight syncs into a running SGLang server.",
    kind="distilled_student",
    knobs=("distill",),
    models=("student",),
    prompts=(),
    parents=lambda config: ("sft",) if config.distill.cache is not None else ("sft", "score"),
    run=run,
)
