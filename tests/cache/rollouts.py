"""Caches to test with: made in a second, of known content, or cut out of a real run where one is
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd import cache
from lopd.artifacts import ArtifactWriter
from lopd.cache.regime import RegimeFigures
from lopd.records import (
    Manifest,
    ModelIdentity,
    Response,
    TeacherScores,
    float32,
    int32,
    token_hash,
    top_k_of,
)

VOCABULARY = 32
END = 2
# Its tokenizer has 32 tokens and the end token that these rollouts use.
TINY_TEACHER = Path(__file__).resolve().parents[2] / "examples" / "tiny_models" / "teacher"
TEACHER = ModelIdentity(
    path="teachers/one", weights="1" * 64, tokenizer="2" * 64, template="3" * 64
)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": 64}


def regime_of(num_far: int, num_excluded: int, num_tokens: int = 20_000) -> RegimeFigures:
    """What was measured of a cache, of which only these counts matter."""
    return RegimeFigures(
        num_tokens=num_tokens,
        num_shards=1,
        num_shards_in_cache=1,
        mean_advantage=-0.07,
        min_advantage=-20.0,
        far_share=num_far / num_tokens,
        clipped_share=num_excluded / num_tokens,
    )


def some_responses(
    count: int, seed: int = 0, prefix: str = "p", samples_per_prompt: int = 1
) -> list[Response]:
    """Responses of 8..60 tokens; every fifth is truncated, the others end with the end token."""
    rng = np.random.default_rng(seed)
    responses = []
    for index in range(count):
        length = int(rng.integers(8, 60))
        tokens = rng.integers(4, VOCABULARY, length)
        truncated = index % 5 == 4
        if not truncated:
            tokens[-1] = END
        responses.append(
            Response(
                prompt_id=f"{prefix}{index // samples_per_prompt}",
                sample_index=index % samples_per_prompt,
                prompt_ids=int32(rng.integers(4, VOCABULARY, 27)),
                token_ids=int32(tokens),
                sampling_logprobs=float32(-rng.exponential(0.3, length)),
                finish_reason="length" if truncated else "stop",
                weight_version="v1",
            )
        )
    return responses


def scores_of(responses: Sequence[Response], logprobs: Sequence[Any]) -> list[TeacherScores]:
    return [
        TeacherScores(
            response.prompt_id,
            response.sample_index,
            token_hash(response.prompt_ids, response.token_ids),
            float32(row),
        )
        for response, row in zip(responses, logprobs, strict=True)
    ]


def full_scores(
    responses: Sequence[Response], k: int = 4, seed: int = 1
) -> tuple[list[Response], list[TeacherScores]]:
    """Responses with the experts they were routed to (3 layers, 2 of 8), and scores with a top-k, a
    tail and entropies, all of one random teacher.
    """
    rng = np.random.default_rng(seed)
    routed = []
    scores = []
    for response in responses:
        logits = 2 * rng.standard_normal((len(response.token_ids), VOCABULARY))
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        ids = np.argsort(-logprobs, axis=1)[:, :k]
        entropy = -(np.exp(logprobs) * logprobs).sum(1)
        own = np.take_along_axis(logprobs, response.token_ids[:, None].astype(np.int64), 1)[:, 0]
        name = token_hash(response.prompt_ids, response.token_ids)
        top = top_k_of(ids, np.take_along_axis(logprobs, ids, 1))
        scores.append(
            TeacherScores(
                response.prompt_id,
                response.sample_index,
                name,
                float32(own),
                top,
                float32(entropy),
                TEACHER.weights,
            )
        )
        routed.append(replace(response, routed_experts=some_experts(response, rng)))
    return routed, scores


def some_experts(
    response: Response, rng: np.random.Generator, num_experts: int = 8
) -> NDArray[np.int16]:
    """Two different experts in each of 3 layers, at every position but the last."""
    positions = len(response.prompt_ids) + len(response.token_ids) - 1
    first = rng.integers(0, num_experts, (positions, 3, 1))
    second = (first + rng.integers(1, num_experts, first.shape)) % num_experts
    return np.concatenate([first, second], -1).astype(np.int16)


def publish_cache(
    folder: Path,
    responses: Sequence[Response],
    logprobs: Sequence[Any] | None = None,
    *,
    shard_size: int = 16,
    logprob_bits: int = 32,
    teacher: ModelIdentity = TEACHER,
    sampling: Mapping[str, Any] = SAMPLING,
    inputs: Mapping[str, Any] | None = None,
    student: ModelIdentity | None = None,
) -> Manifest:
    """A complete teacher cache as the score stage publishes one. logprobs: the teacher's; absent:
    some near the student's.
    """
    rng = np.random.default_rng(7)
    logprobs = (
        [
            np.minimum(0, r.sampling_logprobs + rng.normal(0, 0.2, len(r.token_ids)))
            for r in responses
        ]
        if logprobs is None
        else logprobs
    )
    scores = scores_of(responses, logprobs)
    lineage = {
        "sft_teacher": teacher.weights,
        "score_teacher": teacher.weights,
        "consistent": True,
        "evidence": "proven",
    }
    writer = ArtifactWriter(
        folder,
        kind="teacher_cache",
        inputs={"models.teacher": teacher.weights, **(inputs or {})},
        models={"teacher": teacher, **({"student": student} if student is not None else {})},
        sampling=sampling,
        lineage=lineage,
    )
    for index, start in enumerate(range(0, len(responses), shard_size)):
        part = slice(start, start + shard_size)
        writer.publish_shard(
            index, cache.to_table(responses[part], scores[part], logprob_bits=logprob_bits)
        )
    return writer.finish(
        vocab_size=VOCABULARY,
        end_token_ids=[END],
        logprob_bits=logprob_bits,
        logprob_loss=cache.logprob_loss(folder),
    )
