"""Scoring: the log-probability a model gives to each token of a response that someone else sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lopd.errors import DataError, EngineError
from lopd.records import (
    Floats,
    Ints,
    Key,
    TeacherScores,
    TopK,
    float32,
    int32,
    token_hash,
    top_k_of,
)
from sglang_rollout.requests.checks import (
    check_logprobs,
    check_not_uniform,
    check_returned_ids,
    response_name,
)

LAST_ID_ECHO = -1
"""SGLang echoes the last id of the vocabulary, vocab_size - 1, as 0: it replaces what it takes for
images' padding and is off by one (``x < vocab_size - 1`` in SchedulerLogprobResultProcessor,
0.5.17). The log-probability beside it is that of the token that was sent.
"""


TOP_K_TOLERANCE = (
    1e-3  # nats: a token's value among the top K against its own; the same number but for rounding
)


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A response to score."""

    prompt_id: str
    sample_index: int
    prompt_ids: Ints  # [P]
    token_ids: Ints  # [R]

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


def check_scorable(request: ScoreRequest, context_length: int) -> None:
    """DataError where the sequence is empty on either side or does not fit the context."""
    if len(request.prompt_ids) == 0 or len(request.token_ids) == 0:
        raise DataError(
            f"{len(request.prompt_ids)} prompt tokens and {len(request.token_ids)} response tokens",
            where=response_name(request.key),
            limit="at least one of each: the first token of a sequence has no log-probability",
        )
    length = len(request.prompt_ids) + len(request.token_ids)
    if length > context_length:
        raise DataError(
            f"{length} tokens of prompt and response",
            where=response_name(request.key),
            limit=f"sglang.context_length = {context_length}",
            remedy="raise sglang.context_length",
        )


def score_payload(request: ScoreRequest, request_id: str, top_k: int = 0) -> dict[str, Any]:
    """The body of POST /generate that scores: no new token, log-probabilities from the last prompt
    token on. top_k: also of so many likeliest tokens.

    The last prompt token is included because SGLang gives none for the first position of the span.
    SGLang matches its prefix cache only up to logprob_start_len, so a cached sequence still gets
    all its values.
    """
    return {
        "rid": request_id,
        "input_ids": np.concatenate([request.prompt_ids, request.token_ids]).tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(request.prompt_ids) - 1,
        **({"top_logprobs_num": top_k} if top_k else {}),
    }


def read_logprobs(request: ScoreRequest, answer: Mapping[str, Any], vocab_size: int) -> Floats:
    """The checked log-probabilities [R] in an answer of /generate, at temperature 1. EngineError:
    other ids than sent, or impossible values.
    """
    entries = answer["meta_info"]["input_token_logprobs"]
    expected = np.concatenate([request.prompt_ids[-1:], request.token_ids])
    check_returned_ids(
        request.key,
        expected,
        int32([entry[1] for entry in entries]),
        hidden_id=vocab_size + LAST_ID_ECHO,
    )
    logprobs = float32(
        [entry[0] for entry in entries[1:]]
    )  # JSON's null, which stands for NaN and infinities too, becomes NaN
    check_logprobs(request.key, logprobs)
    return logprobs


def read_scores(
    request: ScoreRequest, answer: Mapping[str, Any], vocab_size: int, top_k: int = 0
) -> TeacherScores:
    """The TeacherScores in an answer of /generate. EngineError as read_logprobs, for a uniform
    teacher, and for a top-K that contradicts the rest.
    """
    logprobs = read_logprobs(request, answer, vocab_size)
    check_not_uniform(request.key, logprobs, vocab_size)
    top = read_top_k(request, answer, logprobs, top_k) if top_k else None
    return TeacherScores(
        request.prompt_id,
        request.sample_index,
        token_hash(request.prompt_ids, request.token_ids),
        logprobs,
        top,
    )


def read_top_k(
    request: ScoreRequest, answer: Mapping[str, Any], logprobs: Floats, top_k: int
) -> TopK:
    """The teacher's top_k likeliest tokens of every response token. EngineError: not so many of
    each, or a token of the response has another value there.
    """
    rows = answer["meta_info"].get("input_top_logprobs") or []
    found = [
        row for row in rows[1:] if row is not None and len(row) == top_k
    ]  # the first belongs to the last prompt token
    if len(found) != len(request.token_ids):
        what = f"the server gave the top {top_k} of {len(found)} of {len(request.token_ids)} tokens"
        raise EngineError(
            what,
            where=response_name(request.key),
            remedy="lower score.top_k: it cannot be above the vocabulary",
        )
    ids = int32([entry[1] for row in found for entry in row]).reshape(-1, top_k)
    values = float32([entry[0] for row in found for entry in row]).reshape(-1, top_k)
    check_logprobs(request.key, values.reshape(-1))
    same = ids == request.token_ids[:, None]  # [R, K]
    differs = np.flatnonzero((same & (np.abs(values - logprobs[:, None]) > TOP_K_TOLERANCE)).any(1))
    if differs.size or (np.diff(values, axis=1) > 0).any():
        where = f"token {int(differs[0])}" if differs.size else "its order"
        what = f"the top {top_k} of the server contradicts the log-probabilities of the same tokens ({where})"
        raise EngineError(
            what,
            where=response_name(request.key),
            remedy="do not use these scores; is this an SGLang server of a supported version?",
        )
    return top_k_of(ids, values)
