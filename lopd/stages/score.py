"""Score: log pi_T(a_t | s_t) of every response token goes into the cache, once.

The teacher must be the SAME one that made the demonstrations. Afterwards no teacher is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import ArtifactWriter
from lopd.artifacts.lineage import OR_ALIGNED, check_same_tokenizer, check_scoring_teacher
from lopd.cache import logprob_loss
from lopd.cache.reader import CacheReader
from lopd.errors import ConfigError
from lopd.megatron.weights.architecture import read_architecture
from lopd.records import Manifest, ModelIdentity
from lopd.stages.context import Stage, StageContext
from lopd.stages.domains import PartWriter, described, parts_in, role_of
from lopd.stages.sample_shards import end_token_ids
from lopd.stages.score_shards import score_into
from lopd.stages.teacher import serve_teacher
from lopd.stages.teacher_prompts import prompts_for_scoring
from lopd.stages.tokenizer_bridge import alignment_figures, bridge_for
from lopd.stages.vocabulary import num_shared_ids

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine

# The folder in the stage's own that has the scores of the teacher's base.
BASE_SCORES = "base"


def run(context: StageContext) -> None:
    """Publish the teacher cache."""
    rollouts = context.manifest_of("rollout")
    if context.config.models.teachers:
        # The shards of each domain have a teacher of their own.
        _score_by_domain(context, rollouts)
        return
    # Before the teacher is started, which may take minutes.
    lineage = check_teacher(context, rollouts.lineage)
    _check_ids(context)
    # The models stand in the manifest from the beginning, so that a killed stage says who was
    # scoring.
    models = {"teacher": context.identity("teacher"), **_base_of(context), **_sampler_of(rollouts)}
    writer = context.writer(models=models, sampling=rollouts.sampling, lineage=lineage)
    # Before the teacher, whose start takes longest.
    writer.expect(len(rollouts.shards))
    # Workers may have published all shards. Then no teacher is started.
    needs_teacher = bool(writer.missing(len(rollouts.shards)))
    # The base first: the teacher's shards are complete only with its column.
    base = _score_by_base(context, rollouts) if "base" in models else None
    with serve_teacher(context) if needs_teacher else nullcontext() as engine:
        score_responses(
            context,
            writer,
            engine,
            context.folder_of("rollout"),
            rollouts,
            title="teacher log-probabilities",
            base=base,
        )
        complete_cache(context, writer, rollouts)


def _score_by_base(context: StageContext, rollouts: Manifest) -> ArtifactWriter:
    """Score the responses by the teacher's base, into a folder of their own, and return its writer.

    The teacher's shards take their last column from it. Both models need not fit on the GPUs
    together.
    """
    # The same inputs as the whole stage, so a killed command continues here too.
    part = context.writer(folder=context.folder / BASE_SCORES, kind="base_scores")
    if part.missing(len(rollouts.shards)):
        base = context.config.models.teacher_base
        models = context.config.models.model_copy(update={"teacher": base})
        config = context.config.model_copy(update={"models": models})
        # As if the base were the teacher. It is served and scored by the same means.
        with serve_teacher(dataclasses.replace(context, config=config)) as engine:
            score_into(
                part,
                engine,
                context.folder_of("rollout"),
                rollouts,
                title="log-probabilities of the teacher's base",
                asked=prompts_for_scoring(context),
            )
    part.finish()
    return part


def _base_of(context: StageContext) -> dict[str, ModelIdentity]:
    """Return the teacher's base for the manifest, after it was checked.

    Raises:
        ConfigError: It is the teacher itself.
        DataError: It has another tokenizer.
    """
    if context.config.models.teacher_base is None:
        return {}
    base = context.identity("teacher_base")
    teacher = context.identity("teacher")
    check_same_tokenizer(base, teacher)
    # The advantage of the delta would be 0 at every token, and the student would learn nothing,
    # without an error.
    if base.weights == teacher.weights:
        raise ConfigError(
            "models.teacher_base has the weights of the teacher, so their difference is 0",
            where=base.path,
            remedy="give the model that the teacher was before its last training, or remove "
            "models.teacher_base",
        )
    return {"base": base}


def _check_ids(context: StageContext) -> None:
    """Check that every teacher has a row for every token of the rollouts.

    Raises:
        DataError: One has not. A server would refuse the response, after hours perhaps.
    """
    # Before a teacher is started: one pass over the ids takes less time than a start.
    reader = CacheReader(context.folder_of("rollout"))
    reader.require_ids_below(num_shared_ids(context.config), "one of the run's models")


def check_teacher(context: StageContext, known: Mapping[str, Any]) -> dict[str, Any]:
    """Check the teacher by its content, and return the lineage to record with the scores.

    Args:
        context: The stage, with the teacher.
        known: The lineage of the responses.

    Raises:
        ConsistencyError: This teacher did not make the student's demonstrations.
        DataError: The teacher and the student have different tokenizers.
    """
    teacher = context.identity("teacher")
    allow_foreign = context.config.score.allow_foreign_teacher
    lineage = check_scoring_teacher(known, teacher, allow_foreign=allow_foreign)
    if not lineage["consistent"]:
        context.log(
            "WARNING: the scoring teacher did not make the student's demonstrations "
            "(score.allow_foreign_teacher is set)"
        )
    if context.config.score.teacher_prompt is not None:
        # With more before its eyes the teacher is another policy than the one that demonstrated,
        # although its weights are the same.
        lineage["teacher_prompt"] = context.config.score.teacher_prompt
    # The teacher scores token ids, not text. The same ids must mean the same to both models, unless
    # the scores are brought over.
    if not context.config.aligns_tokenizers:
        check_same_tokenizer(teacher, context.identity("student"), remedy=OR_ALIGNED)
    return lineage


def score_responses(
    context: StageContext,
    writer: ArtifactWriter,
    engine: SGLangEngine | None,
    source: Path,
    rollouts: Manifest,
    *,
    title: str,
    base: ArtifactWriter | None = None,
) -> None:
    """Score the responses that are not scored yet. The cache is not complete afterwards.

    Args:
        context: The stage.
        writer: The writer of the cache.
        engine: The teacher. It may be None where nothing is missing.
        source: The folder of the responses.
        rollouts: The manifest of the responses.
        title: The text at the progress bar.
        base: The scores of the same responses by the teacher's base, if it has scored them.
    """
    config = context.config
    # It renders the teacher's prompts itself, in the teacher's tokens.
    bridge = bridge_for(context, "opd")
    score_into(
        writer,
        engine,
        source,
        rollouts,
        title=title,
        logprob_bits=config.score.logprob_bits,
        top_k=config.score.top_k,
        asked=bridge or prompts_for_scoring(context),
        base=base,
    )


def complete_cache(context: StageContext, writer: ArtifactWriter, rollouts: Manifest) -> Manifest:
    """Publish the manifest of a cache of one teacher whose shards are all there."""
    config = context.config
    # The reader of a cache checks that no token id is larger than what the teacher knows. A teacher
    # with other ids says nothing about the student's.
    owner = config.models.student if config.aligns_tokenizers else config.models.teacher
    vocab_size = read_architecture(owner).vocab_size
    aligned = alignment_figures(context, writer.folder)
    return _complete(context, writer, rollouts, vocab_size=vocab_size, **aligned)


def _score_by_domain(context: StageContext, rollouts: Manifest) -> None:
    """Score each domain's responses by the teacher that made that domain's demonstrations.

    Every row of the cache names its teacher.
    """
    config = context.config
    # The parts are those of the rollout stage, whose shards the cache repeats one by one.
    parts = {part: part.context(context) for part in parts_in(rollouts)}
    asked = prompts_for_scoring(context)
    # All teachers are checked before the first one is started.
    lineages = {
        part.domain: check_teacher(own, part.rollouts(rollouts).lineage)
        for part, own in parts.items()
    }
    _check_ids(context)
    teachers = {
        role_of(config, part.domain): own.identity("teacher") for part, own in parts.items()
    }
    writer = context.writer(
        models={**teachers, **_sampler_of(rollouts)},
        sampling=rollouts.sampling,
        lineage=joint_lineage(lineages),
    )
    for part, own in parts.items():
        part_writer = PartWriter(writer, part, own.identity("teacher").weights)
        if not part_writer.missing(part.num_shards):
            continue
        # One teacher at a time: several of them need not fit on the GPUs together.
        with serve_teacher(own) as engine:
            score_into(
                part_writer,
                engine,
                context.folder_of("rollout"),
                part.rollouts(rollouts),
                title=f"teacher log-probabilities, {part.domain or 'other domains'}",
                logprob_bits=config.score.logprob_bits,
                top_k=config.score.top_k,
                asked=asked,
            )
    folders = [own.config.models.teacher for own in parts.values()]
    complete_cache_of(context, writer, rollouts, folders, parts=described(list(parts)))


def joint_lineage(by_domain: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the lineage of a cache of several teachers, from that of each domain."""
    # The cache is as consistent as its least consistent domain.
    return {
        "by_domain": dict(by_domain),
        "consistent": all(lineage["consistent"] for lineage in by_domain.values()),
        "allow_foreign_teacher": any(
            lineage["allow_foreign_teacher"] for lineage in by_domain.values()
        ),
    }


def complete_cache_of(
    context: StageContext,
    writer: ArtifactWriter,
    rollouts: Manifest,
    teachers: Iterable[Path],
    **extra: Any,
) -> Manifest:
    """Publish the manifest of a cache of several teachers, whose folders are given."""
    # A token id of the cache must be one that every teacher knows.
    size = min(read_architecture(teacher).vocab_size for teacher in teachers)
    return _complete(context, writer, rollouts, vocab_size=size, **extra)


def _sampler_of(rollouts: Manifest) -> dict[str, ModelIdentity]:
    """Return the student that sampled the responses, where it is on record."""
    # distill.cache compares it with the student of another run.
    return {"student": rollouts.models["student"]} if "student" in rollouts.models else {}


def _complete(
    context: StageContext, writer: ArtifactWriter, rollouts: Manifest, **extra: Any
) -> Manifest:
    """Publish the manifest of a cache whose shards are all there."""
    config = context.config
    # The bytes of a token are a figure that users compare. All columns count, prompts included.
    tokens = sum(shard.tokens for shard in rollouts.shards)
    num_bytes = sum(path.stat().st_size for path in writer.folder.glob("shard-*.parquet"))
    return writer.finish(
        tokens=tokens,
        bytes=num_bytes,
        bytes_per_token=num_bytes / max(1, tokens),
        logprob_bits=config.score.logprob_bits,
        top_k=config.score.top_k,
        # How far the log-probabilities of a 16-bit cache have moved, in nats.
        logprob_loss=logprob_loss(writer.folder),
        # Whoever reads the cache elsewhere must know which sampled tokens ended a response.
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
