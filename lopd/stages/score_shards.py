"""Scoring into an artifact: the teacher's log-probabilities, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lopd import cache
from lopd.artifacts import ArtifactWriter, read_shard
from lopd.megatron.scoring.scorer import MegatronScorer
from lopd.records import Key, Manifest, Response, TeacherScores
from lopd.report.console import progress
from lopd.stages.request_order import by_length
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
) -> None:
    """Score the responses of an artifact that are not scored yet.

    Shard i of the result holds the responses of shard i of the source, in the same order.

    Args:
        writer: Of the result.
        engine: Serves the teacher. It may be None where nothing is missing.
        source: The folder of the responses.
        rollouts: Its manifest.
        title: Stands at the progress bar.
        logprob_bits: 32, or 16 for a smaller cache.
        top_k: How many of the teacher's likeliest tokens are kept at each position as well.
    """
    missing = writer.missing(len(rollouts.shards))
    if not missing:
        return
    assert engine is not None, "an engine is needed, because shards are missing"
    is_megatron = isinstance(engine, MegatronScorer)
    # Only the shards in flight are in memory: their responses, the scores that have come, and which
    # shard each open request belongs to.
    responses: dict[int, list[Response]] = {}
    scores: dict[int, dict[Key, TeacherScores]] = {}
    shard_of: dict[Key, int] = {}
    # Megatron-Core has no prefix cache, so passes over several prompts gain nothing there.
    prompts_at_once = 1 if is_megatron else requests_in_flight(engine)

    def requests(indices: Sequence[int]) -> Iterator[ScoreRequest]:
        for index in indices:
            # The checksum of the source is verified here, when the shard is read.
            shard = rollouts.shards[index]
            table = read_shard(source, shard)
            rows = cache.from_table(table, where=str(source / shard.name))
            responses[index] = [response for response, _ in rows]
            scores[index] = {}
            shard_of.update({response.key: index for response in responses[index]})
            for response in by_length(responses[index], prompts_at_once):
                yield ScoreRequest(
                    response.prompt_id,
                    response.sample_index,
                    response.prompt_ids,
                    response.token_ids,
                )

    # Megatron-Core packs the responses of a stream together, and what a response is packed with
    # decides its last bits. With one stream for each shard they do not depend on which shards are
    # missing.
    streams = [[index] for index in missing] if is_megatron else [missing]
    total = sum(shard.rows for index, shard in enumerate(rollouts.shards) if writer.is_mine(index))
    already = total - sum(rollouts.shards[index].rows for index in missing)
    with progress(title, total=total, done=already, unit="responses") as bar:
        for indices in streams:
            for score in engine.score(requests(indices), top_k=top_k):
                index = shard_of.pop(score.key)
                scores[index][score.key] = score
                bar.advance(1)
                # The scores come in any order. A shard is published when its last one is there, in
                # the order of the source.
                if len(scores[index]) == len(responses[index]):
                    ordered = responses.pop(index)
                    of_shard = scores.pop(index)
                    in_order = [of_shard[response.key] for response in ordered]
                    table = cache.to_table(ordered, in_order, logprob_bits=logprob_bits)
                    writer.publish_shard(index, table)


def requests_in_flight(engine: SGLangEngine) -> int:
    """Return how many requests all servers of an engine work on at the same time."""
    return engine.settings.max_in_flight * len(engine.engines)
