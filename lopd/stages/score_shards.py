"""Scoring into an artifact: the teacher's log-probabilities, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_shard
from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.records import Key, Manifest, Response, ShardInfo, TeacherScores
from lopd.report.console import progress
from lopd.stages.open_shards import OpenShards, tell_resumed
from lopd.stages.request_order import by_length
from lopd.stages.teacher_prompts import TeacherPrompts
from lopd.stages.tokenizer_bridge import TokenizerBridge
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from sglang_rollout.requests.client import SGLangEngine


def score_into(
    writer: ArtifactWriter,
    engine: SGLangEngine | None,
    source: Path,
    rollouts: Manifest,
    *,
    title: str,
    logprob_bits: int = 32,
    top_k: int = 0,
    asked: TeacherPrompts | TokenizerBridge | None = None,
    base: ArtifactWriter | None = None,
    only: Callable[[Response], bool] | None = None,
) -> None:
    """Score the responses of an artifact that are not scored yet.

    Shard i of the result holds the responses of shard i of the source, in the same order.

    Args:
        writer: The writer of the result.
        engine: The teacher. It may be None where nothing is missing.
        source: The folder of the responses.
        rollouts: The manifest of the rollouts.
        title: The text at the progress bar.
        logprob_bits: 32, or 16 for a smaller cache.
        top_k: How many of the teacher's likeliest tokens are kept at each position as well.
        asked: What the teacher is asked. None: the responses after their own prompts.
        base: The same responses' scores by the teacher's base, which become one more column. None:
            there is no such column.
        only: Says whether a response is scored here. The result then holds no other response.
    """
    # Also where nothing is missing: lopd watch reads the number from the folder.
    writer.expect(len(rollouts.shards))
    missing = writer.missing(len(rollouts.shards))
    if not missing:
        return
    asked = asked or TeacherPrompts()
    assert engine is not None, "an engine is needed, because shards are missing"
    tell_resumed(writer, title, len(rollouts.shards))
    is_megatron = isinstance(engine, MegatronScorer)
    # All shards have the columns of the first one.
    is_sampled = "sampling_logprobs" in pq.read_schema(source / rollouts.shards[0].name).names
    # The responses of the shards in flight; their scores are collected beside them.
    responses: dict[int, list[Response]] = {}
    open_shards: OpenShards[TeacherScores] = OpenShards()
    # Megatron-Core has no prefix cache, so passes over several prompts gain nothing there.
    prompts_at_once = 1 if is_megatron else requests_in_flight(engine)

    def requests(indices: Sequence[int]) -> Iterator[ScoreRequest]:
        for index in indices:
            # The checksum of the source is verified here, when the shard is read.
            responses[index] = _responses_in(source, rollouts.shards[index], only)
            if not responses[index]:
                # Nothing will complete a shard of which no response is scored here.
                writer.publish_shard(index, cache.to_table([], []))
                continue
            open_shards.begin(index, [response.key for response in responses[index]])
            for one in by_length(responses[index], prompts_at_once):
                yield asked.request(one)

    num_rows = [_num_rows(source, shard, only) for shard in rollouts.shards]
    total = sum(rows for index, rows in enumerate(num_rows) if writer.is_mine(index))
    already = total - sum(num_rows[index] for index in missing)
    with progress(title, total=total, done=already, unit="responses") as bar:
        for indices in _streams(missing, apart=is_megatron):
            for score in engine.score(requests(indices), top_k=top_k):
                bar.advance(1)
                complete = open_shards.add(score.key, score)
                if complete is not None:
                    index, scores = complete
                    rows, own = asked.bring_back(responses.pop(index), scores)
                    own = _with_base(own, base, rollouts.shards[index].name)
                    table = cache.to_table(rows, own, logprob_bits=logprob_bits)
                    if not is_sampled:
                        table = table.drop_columns(["sampling_logprobs"])
                    writer.publish_shard(index, table)


def _streams(missing: Sequence[int], *, apart: bool) -> list[Sequence[int]]:
    """Return which shards are scored together, in one stream of requests.

    Args:
        missing: The shards.
        apart: Whether each shard must have a stream of its own, as Megatron-Core needs it.
    """
    # Megatron-Core packs the responses of a stream together, and what a response is packed with
    # decides its last bits. With one stream for each shard they do not depend on which shards are
    # missing.
    return [[index] for index in missing] if apart else [missing]


def _with_base(
    scores: list[TeacherScores], base: ArtifactWriter | None, name: str
) -> list[TeacherScores]:
    """Return the scores with those of the base, if there is one. It has a shard of this name."""
    if base is None:
        return scores
    shard = base.shard_named(name)
    found = cache.scored_rows(read_shard(base.folder, shard), where=str(base.folder / name))
    joined = []
    for score, (_, of_base) in zip(scores, found, strict=True):
        # Shard by shard both hold the same responses in the same order. The tokens are compared all
        # the same: a column that belongs to other tokens would pass for a difference of models.
        assert of_base is not None
        assert of_base.token_hash == score.token_hash, score.key
        joined.append(replace(score, base_logprobs=of_base.teacher_logprobs))
    return joined


def _num_rows(source: Path, shard: ShardInfo, only: Callable[[Response], bool] | None) -> int:
    # The manifest knows how many there are in all.
    return shard.rows if only is None else len(_responses_in(source, shard, only))


def _responses_in(
    source: Path, shard: ShardInfo, only: Callable[[Response], bool] | None
) -> list[Response]:
    table = read_shard(source, shard)
    # Transcripts from elsewhere may have none (rollout.responses). The records have NaN then.
    rows = cache.scored_rows(table, str(source / shard.name), without_sampling=True)
    return [response for response, _ in rows if only is None or only(response)]


def join_scores(
    writer: ArtifactWriter,
    parts: Sequence[tuple[str, ArtifactWriter]],
    source: Path,
    rollouts: Manifest,
    *,
    logprob_bits: int,
) -> None:
    """Publish the shards of a cache of several teachers, each of which has scored some responses.

    Args:
        writer: The writer of the cache.
        parts: The fingerprint of each teacher's weights, and what it has scored. One teacher may
            have several parts.
        source: The folder of the responses.
        rollouts: The manifest of the responses.
        logprob_bits: 32, or 16 for a smaller cache.
    """
    for index in writer.missing(len(rollouts.shards)):
        shard = rollouts.shards[index]
        scores: dict[Key, TeacherScores] = {}
        for teacher, part in parts:
            table = read_shard(part.folder, part.shard_named(shard.name))
            for response, score in cache.scored_rows(table, where=str(part.folder / shard.name)):
                assert score is not None
                scores[response.key] = replace(score, teacher=teacher)
        # In the order in which the responses were sampled: a training may depend on it.
        responses = _responses_in(source, shard, None)
        own = [scores[response.key] for response in responses]
        writer.publish_shard(index, cache.to_table(responses, own, logprob_bits=logprob_bits))


def requests_in_flight(engine: SGLangEngine) -> int:
    """Return how many requests all servers of an engine work on at the same time."""
    return engine.settings.max_in_flight * len(engine.engines)
