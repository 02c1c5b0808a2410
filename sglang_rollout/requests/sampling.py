"""Sampling: what is asked of /generate, and how its answer becomes a Response. Ids in, ids out; no
text anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopd.errors import DataError, EngineError
from lopd.records import Ints, Key, Response, float32, int32
from sglang_rollout.requests.checks import (
    check_ending,
    check_logprobs,
    check_returned_ids,
    response_name,
)


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One response to sample. seed fixes it where the server is deterministic."""

    prompt_id: str
    sample_index: int
    prompt_ids: Ints  # [P]
    seed: int

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample: see lopd.config.Sampling for the meaning and bounds of each field.
    stop_token_ids: every end token of the model.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


def request_seed(run_seed: int, prompt_id: str, sample_index: int, purpose: str) -> int:
    """A seed in 0..2^31-1 that depends on nothing but these four: the same in every run, order and
    batch.

    purpose: the stage; a prompt that two stages sample from gets two independent responses.
    """
    text = f"{run_seed}\x1f{purpose}\x1f{sample_index}\x1f{prompt_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


def new_tokens_allowed(
    request: SamplingRequest, params: SamplingParams, context_length: int
) -> int:
    """max_new_tokens, reduced where prompt and response together would pass the context. DataError:
    the prompt alone fills it.
    """
    room = context_length - len(request.prompt_ids)
    if room < 1:
        raise DataError(
            f"prompt {request.prompt_id} has {len(request.prompt_ids)} tokens",
            limit=f"below sglang.context_length = {context_length}: a response needs a token",
            remedy="raise sglang.context_length or drop the prompt",
        )
    if len(request.prompt_ids) == 0:
        raise DataError(
            f"prompt {request.prompt_id} has no tokens", remedy="check the chat template"
        )
    return min(params.max_new_tokens, room)


def generate_payload(
    request: SamplingRequest, params: SamplingParams, max_new_tokens: int, request_id: str
) -> dict[str, Any]:
    """The body of POST /generate."""
    return {
        "rid": request_id,
        "input_ids": request.prompt_ids.tolist(),
        "sampling_params": {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(params.stop_token_ids),
            "sampling_seed": request.seed,
        },
        "return_logprob": True,
    }


def read_response(
    request: SamplingRequest, params: SamplingParams, max_new_tokens: int, answer: Mapping[str, Any]
) -> Response:
    """The Response in an answer of /generate; its log-probabilities are as the server gives them.
    EngineError: the answer contradicts itself.
    """
    meta = answer["meta_info"]
    token_ids = int32(answer["output_ids"])
    check_returned_ids(
        request.key, token_ids, int32([entry[1] for entry in meta["output_token_logprobs"]])
    )
    logprobs = float32([entry[0] for entry in meta["output_token_logprobs"]])
    check_logprobs(request.key, logprobs)
    finish_reason = check_ending(
        request.key, token_ids, meta["finish_reason"], params.stop_token_ids
    )
    if finish_reason == "length" and len(token_ids) != max_new_tokens:
        raise EngineError(
            f"the server cut it after {len(token_ids)} tokens where {max_new_tokens} were allowed",
            where=response_name(request.key),
            remedy="raise sglang.max_total_tokens: one request must fit into the KV cache",
        )
    return Response(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        prompt_ids=request.prompt_ids,
        token_ids=token_ids,
        sampling_logprobs=logprobs,
        finish_reason=finish_reason,
        weight_version=str(meta["weight_version"]),
    )
