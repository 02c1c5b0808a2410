"""Score: log pi_T(a_t | s_t) of every response token, by the SAME teacher that demonstrated, once,
into the cache. After this no teacher is needed.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import ArtifactWriter
from lopd.artifacts.lineage import check_same_tokenizer, check_scoring_teacher
from lopd.cache import logprob_loss
from lopd.megatron.weights.architecture import read_architecture
from lopd.records import Manifest, ModelIdentity
from lopd.stages.context import Stage, StageContext
from lopd.stages.domains import PartWriter, described, parts_in, role_of
from lopd.stages.sampling import end_token_ids, score_into
from lopd.stages.teacher import serve_teacher

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine


def run(context: StageContext) -> None:
    rollouts = context.manifest_of("rollout")
    if context.config.models.teachers:
        score_by_domain(context, rollouts)
        return
    lineage = check_teacher(context, rollouts)
    models = {"teacher": context.identity("teacher"), **sampler_of(rollouts)}
    writer = context.writer(models=models, sampling=rollouts.sampling, lineage=lineage)
    needed = writer.missing(len(rollouts.shards))  # none: workers have published all
    with serve_teacher(context) if needed else nullcontext() as engine:
        score_responses(
            context,
            writer,
            engine,
            context.folder_of("rollout"),
            rollouts,
            title="teacher log-probabilities",
        )


def sampler_of(rollouts: Manifest) -> dict[str, ModelIdentity]:
    """The student whose responses these are, where that is known."""
    return {"student": rollouts.models["student"]} if "student" in rollouts.models else {}


def check_teacher(context: StageContext, rollouts: Manifest) -> dict[str, Any]:
    """The lineage to record with the scores. ConsistencyError: another teacher, by content, than
    made the student's demonstrations; DataError: tokenizers.
    """
    teacher = context.identity("teacher")
    lineage = check_scoring_teacher(
        rollouts.lineage, teacher, allow_foreign=context.config.score.allow_foreign_teacher
    )
    if not lineage["consistent"]:
        context.log(
            "WARNING: the scoring teacher did not make the student's demonstrations (score.allow_foreign_teacher is set)"
        )
    check_same_tokenizer(teacher, context.identity("student"))
    return lineage


def score_responses(
    context: StageContext,
    writer: ArtifactWriter,
    engine: SGLangEngine | None,
    source: Path,
    rollouts: Manifest,
    *,
    title: str,
    **extra: Any,
) -> Manifest:
    """Scores what is not scored yet (where nothing is, it needs no engine), and completes the
    cache. source: folder of the rollouts. extra: figures for the manifest.
    """
    config = context.config
    score_into(
        writer,
        engine,
        source,
        rollouts,
        title=title,
        logprob_bits=config.score.logprob_bits,
        top_k=config.score.top_k,
    )
    return complete(
        context,
        writer,
        rollouts,
        vocab_size=read_architecture(config.models.teacher).vocab_size,
        **extra,
    )


def score_by_domain(context: StageContext, rollouts: Manifest) -> None:
    """Each domain's rollouts by the teacher that made that domain's demonstrations; every row names
    its teacher. All teachers are checked before any scores.
    """
    config = context.config
    parts = {part: part.context(context) for part in parts_in(rollouts)}
    lineages = {
        part.domain: check_teacher(own, part.rollouts(rollouts)) for part, own in parts.items()
    }
    foreign = any(lineage["allow_foreign_teacher"] for lineage in lineages.values())
    writer = context.writer(
        models={
            **{
                role_of(config, part.domain): own.identity("teacher") for part, own in parts.items()
            },
            **sampler_of(rollouts),
        },
        sampling=rollouts.sampling,
        lineage={
            "by_domain": lineages,
            "consistent": all(lineage["consistent"] for lineage in lineages.values()),
            "allow_foreign_teacher": foreign,
        },
    )
    for part, own in parts.items():
        mine = PartWriter(writer, part, own.identity("teacher").weights)
        if mine.missing(part.num_shards):
            title, score = (
                f"teacher log-probabilities, {part.domain or 'other domains'}",
                config.score,
            )
            with serve_teacher(own) as engine:
                source = context.folder_of("rollout")
                score_into(
                    mine,
                    engine,
                    source,
                    part.rollouts(rollouts),
                    title=title,
                    logprob_bits=score.logprob_bits,
                    top_k=score.top_k,
                )
    sizes = {read_architecture(own.config.models.teacher).vocab_size for own in parts.values()}
    complete(context, writer, rollouts, vocab_size=min(sizes), parts=described(list(parts)))


def complete(
    context: StageContext, writer: ArtifactWriter, rollouts: Manifest, **extra: Any
) -> Manifest:
    """Publishes the manifest of a cache whose shards are all there."""
    config = context.config
    tokens = sum(shard.tokens for shard in rollouts.shards)
    num_bytes = sum(path.stat().st_size for path in writer.folder.glob("shard-*.parquet"))
    return writer.finish(
        tokens=tokens,
        bytes=num_bytes,
        bytes_per_token=num_bytes / max(1, tokens),
        logprob_bits=config.score.logprob_bits,
        top_k=config.score.top_k,
        logprob_loss=logprob_loss(
            writer.folder
        ),  # of a 16-bit cache: how far values moved, in nats
        end_token_ids=end_token_ids(context.end_models),
        served=context.served,
        **extra,
    )


STAGE = Stage(
    name="score",
    summary="The same teacher's log-probability of every response token, once, into the cache.",
    kind="teacher_cache",
    knobs=("sglang", "score"),
    models=("teacher", "student"),
    prompts=(),
    parents=lambda config: ("rollout",),
    run=run,
)
