"""Scoring: the log-probability that a model gives to each token of an existing response."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

# SGLang returns the last id of the vocabulary, vocab_size - 1, as 0. It replaces the ids that it
# takes for the padding of images, and its comparison is off by one (``x < vocab_size - 1`` in
# SchedulerLogprobResultProcessor, 0.5.17). The log-probability is that of the token that was sent.
LAST_ID_ECHO = -1

# A request of several short sequences costs the server's HTTP side little more than one of one
# sequence. Long sequences go alone: their numbers cost more than their requests.
_TOKENS_TOGETHER = 4096
# So many requests are open at once at least, so that the server computes some while others travel.
_REQUESTS_AT_ONCE = 8

# In nats. The value of a token among the top K may differ this much from its own value. Both are
# the same number but for rounding.
TOP_K_TOLERANCE = 1e-3


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

    @property
    def shared_ids(self) -> Ints:
        """The ids that other requests have in common with this one."""
        return self.prompt_ids


def check_scorable(request: ScoreRequest, context_length: int, vocab_size: int) -> None:
    """Check that a server can score the response.

    Args:
        request: The response.
        context_length: The tokens that a sequence may have.
        vocab_size: The rows of the served model.

    Raises:
        DataError: The prompt or the response is empty, or both together exceed the context, or the
            model has no row for a token.
    """
    if len(request.prompt_ids) == 0 or len(request.token_ids) == 0:
        raise DataError(
            f"the sequence has {len(request.prompt_ids)} prompt tokens and "
            f"{len(request.token_ids)} response tokens",
            where=response_name(request.key),
            limit="at least one of each, because the first token of a sequence has no "
            "log-probability",
            remedy="remove this response",
        )
    # Nothing is cut, unlike in sampling: the score of a part would pass for that of the whole.
    length = len(request.prompt_ids) + len(request.token_ids)
    if length > context_length:
        raise DataError(
            f"prompt and response have {length} tokens, which is too many",
            where=response_name(request.key),
            limit=f"at most sglang.context_length = {context_length}",
            remedy="raise sglang.context_length",
        )
    # SGLang would return such an id as 0, which looks as if it served another model.
    largest = max(int(request.prompt_ids.max()), int(request.token_ids.max()))
    if largest >= vocab_size:
        raise DataError(
            f"the sequence has a token {largest} past the rows of the model",
            where=response_name(request.key),
            limit=f"at most {vocab_size - 1}: the served model has {vocab_size} rows",
            remedy="remove this response: the model that sampled it has more rows",
        )


def together(
    requests: Iterable[ScoreRequest], in_flight: int
) -> Iterator[tuple[ScoreRequest, ...]]:
    """Yield the sequences as they are sent: short neighbours share a request.

    Args:
        requests: The sequences.
        in_flight: How many of them one server has at a time.
    """
    # Groups are small beside what may be in flight, so that several of them are under way at once.
    most = max(1, in_flight // _REQUESTS_AT_ONCE)
    group: list[ScoreRequest] = []
    num_tokens = 0
    for request in requests:
        length = len(request.prompt_ids) + len(request.token_ids)
        # A group has at least one request, also where that one alone is above the limit.
        if group and (len(group) == most or num_tokens + length > _TOKENS_TOGETHER):
            yield tuple(group)
            group = []
            num_tokens = 0
        group.append(request)
        num_tokens += length
    if group:
        yield tuple(group)


def score_payload(
    requests: Sequence[ScoreRequest], request_ids: Sequence[str], top_k: int = 0
) -> dict[str, Any]:
    """Return the body of POST /generate that scores responses and samples nothing.

    Args:
        requests: The responses to score.
        request_ids: The names under which the responses can be aborted.
        top_k: The number of likeliest tokens to return for each token, or 0 for none.
    """
    ids = [np.concatenate([request.prompt_ids, request.token_ids]) for request in requests]
    # The span begins at the last prompt token, because SGLang gives no log-probability for its
    # first position. SGLang uses its prefix cache only up to this position, so a sequence that is
    # cached as a whole still gets all its values.
    starts = [len(request.prompt_ids) - 1 for request in requests]
    is_alone = len(requests) == 1
    body: dict[str, Any] = {
        "rid": request_ids[0] if is_alone else list(request_ids),
        "input_ids": ids[0] if is_alone else ids,
        # SGLang then computes the log-probabilities of the input and samples nothing.
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": starts[0] if is_alone else starts,
    }
    if top_k:
        body["top_logprobs_num"] = top_k
    return body


def read_logprobs(request: ScoreRequest, answer: Mapping[str, Any], vocab_size: int) -> Floats:
    """Return the log-probabilities in an answer of /generate.

    Args:
        request: The response that was sent.
        answer: The parsed answer.
        vocab_size: The number of tokens in the vocabulary.

    Returns:
        Float32 array of shape [R]: natural logarithms at temperature 1.

    Raises:
        EngineError: The server answered for other ids, or a value is impossible.
    """
    # Each entry is (log-probability, token id, text or None).
    entries = answer["meta_info"]["input_token_logprobs"]
    expected = np.concatenate([request.prompt_ids[-1:], request.token_ids])
    returned = int32([entry[1] for entry in entries])
    check_returned_ids(request.key, expected, returned, hidden_id=vocab_size + LAST_ID_ECHO)
    # JSON has no NaN and no infinity: they come as null, and float32() makes NaN of it. The check
    # below then refuses them.
    logprobs = float32([entry[0] for entry in entries[1:]])
    check_logprobs(request.key, logprobs)
    return logprobs


def read_scores(
    request: ScoreRequest, answer: Mapping[str, Any], vocab_size: int, top_k: int = 0
) -> TeacherScores:
    """Return the TeacherScores in an answer of /generate.

    Raises:
        EngineError: read_logprobs() raises it, or the model guesses uniformly, or the top-K values
            do not agree with the other values.
    """
    logprobs = read_logprobs(request, answer, vocab_size)
    check_not_uniform(request.key, logprobs, vocab_size)
    top = read_top_k(request, answer, logprobs, top_k) if top_k else None
    # The hash ties the scores to the very tokens they belong to, wherever they are stored.
    tokens = token_hash(request.prompt_ids, request.token_ids)
    return TeacherScores(request.prompt_id, request.sample_index, tokens, logprobs, top)


def read_top_k(
    request: ScoreRequest, answer: Mapping[str, Any], logprobs: Floats, top_k: int
) -> TopK:
    """Return the teacher's top_k likeliest tokens at the place of every response token.

    Args:
        request: The response that was sent.
        answer: The parsed answer.
        logprobs: The log-probabilities of the response's own tokens, of shape [R].
        top_k: The number of tokens for each place.

    Raises:
        EngineError: The server returned fewer tokens, or a value contradicts logprobs.
    """
    rows = answer["meta_info"].get("input_top_logprobs") or []
    # The first row belongs to the last prompt token.
    # A row is null where SGLang has none, and shorter where the vocabulary has fewer tokens.
    found = [row for row in rows[1:] if row is not None and len(row) == top_k]
    if len(found) != len(request.token_ids):
        raise EngineError(
            f"the server gave the top {top_k} for only {len(found)} of "
            f"{len(request.token_ids)} tokens",
            where=response_name(request.key),
            remedy="lower score.top_k: it cannot be larger than the vocabulary",
        )
    ids = int32([entry[1] for row in found for entry in row]).reshape(-1, top_k)  # [R, K]
    values = float32([entry[0] for row in found for entry in row]).reshape(-1, top_k)  # [R, K]
    check_logprobs(request.key, values.reshape(-1))
    # A response token that is among the top K has two values in the answer. They come from the same
    # softmax, so a difference means that one of the lists belongs to other positions.
    same = ids == request.token_ids[:, None]  # [R, K]
    distances = np.abs(values - logprobs[:, None])  # [R, K]
    differs = np.flatnonzero((same & (distances > TOP_K_TOLERANCE)).any(1))
    # The likeliest token stands first. Another order means that the rows were read wrongly.
    if differs.size or (np.diff(values, axis=1) > 0).any():
        where = f"token {int(differs[0])}" if differs.size else "its order"
        raise EngineError(
            f"the top {top_k} of the server and the log-probabilities of the same tokens "
            f"do not agree ({where})",
            where=response_name(request.key),
            remedy="do not use these scores; use a supported version of SGLang",
        )
    return top_k_of(ids, values)
