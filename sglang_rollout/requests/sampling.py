"""Sampling: the body of a request to /generate, and the Response in its answer.

Token ids go in and token ids come out. There is no text anywhere.
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
from sglang_rollout.requests.routed import RouterShape, read_routed_experts


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One response to sample.

    Attributes:
        prompt_ids: The prompt's token ids of shape [P]. For a later turn of a response they are
            everything that stands before it.
        seed: A number that fixes the response where the server is deterministic.
        first_len: For a later turn, the tokens of the response's own prompt.
    """

    prompt_id: str
    sample_index: int
    prompt_ids: Ints  # [P]
    seed: int
    first_len: int | None = None

    @property
    def key(self) -> Key:
        return (self.prompt_id, self.sample_index)

    @property
    def shared_ids(self) -> Ints:
        """The ids whose server has the prefix: all turns of a response go where its prompt went."""
        return self.prompt_ids[: self.first_len]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. lopd.config.Sampling has the meaning and the bounds of each field.

    Attributes:
        stop_token_ids: Every end token of the model.
        router: The shape of the model's routers, where their choices are wanted.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    router: RouterShape | None = None


def request_seed(run_seed: int, prompt_id: str, sample_index: int, purpose: str) -> int:
    """Return a seed from 0 to 2^31 - 1 that depends on these four values alone.

    It is the same in every run, order and batch. So a resumed stage gets the responses that the
    killed one would have got.

    Args:
        run_seed: The seed of the run.
        prompt_id: The id of the prompt.
        sample_index: The index of the response among those of the prompt.
        purpose: The stage. Two stages that sample from one prompt get independent responses.
    """
    # No prompt id contains \x1f (unit separator), so different values never make the same text.
    text = f"{run_seed}\x1f{purpose}\x1f{sample_index}\x1f{prompt_id}"
    # Not hash(): Python's own hash of a text differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


def new_tokens_allowed(
    request: SamplingRequest, params: SamplingParams, context_length: int
) -> int:
    """Return the number of tokens that the response may have.

    It is max_new_tokens, or less where prompt and response together would exceed the context.

    Raises:
        DataError: The prompt is empty, or it leaves no room for a token.
    """
    # SGLang would answer a prompt that is too long with an error of its own. This one names the
    # prompt and the key to change.
    room = context_length - len(request.prompt_ids)
    if room < 1:
        raise DataError(
            f"prompt {request.prompt_id} has {len(request.prompt_ids)} tokens, so no "
            "token is left for a response",
            limit=f"below sglang.context_length = {context_length}",
            remedy="raise sglang.context_length, or remove the prompt",
        )
    if len(request.prompt_ids) == 0:
        raise DataError(
            f"prompt {request.prompt_id} has no tokens",
            remedy="check the chat template of the model",
        )
    # SGLang would cut at the context as well, but by its own limit, which differs by some tokens
    # (launch.CONTEXT_MARGIN). With this number read_response() knows exactly what was allowed.
    return min(params.max_new_tokens, room)


def generate_payload(
    request: SamplingRequest, params: SamplingParams, max_new_tokens: int, request_id: str
) -> dict[str, Any]:
    """Return the body of POST /generate.

    Args:
        request: The prompt to sample a response for.
        params: The sampling parameters.
        max_new_tokens: The number of tokens from new_tokens_allowed().
        request_id: The name under which the request can be aborted.
    """
    # Without a wish the body is as it always was: other servers need not know the field.
    wish = {} if params.router is None else {"return_routed_experts": True}
    return {
        "rid": request_id,
        "input_ids": request.prompt_ids.tolist(),
        "sampling_params": {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "max_new_tokens": max_new_tokens,
            # A server without a tokenizer knows no end token by itself.
            "stop_token_ids": list(params.stop_token_ids),
            # SGLang honours it only with enable_deterministic_inference.
            "sampling_seed": request.seed,
        },
        # They are the sampling_logprobs of the training, and come without another pass.
        "return_logprob": True,
        **wish,
    }


def read_response(
    request: SamplingRequest, params: SamplingParams, max_new_tokens: int, answer: Mapping[str, Any]
) -> Response:
    """Return the Response that is in an answer of /generate.

    The log-probabilities are not changed or checked here.

    Raises:
        EngineError: Two parts of the answer do not agree, or the server ended the response before
            max_new_tokens without a stop token.
    """
    meta = answer["meta_info"]
    # Each entry is (log-probability, token id, text or None).
    entries = meta["output_token_logprobs"]
    token_ids = int32(answer["output_ids"])
    # The answer has the ids twice. Where they differ, the log-probabilities belong to other tokens.
    check_returned_ids(request.key, token_ids, int32([entry[1] for entry in entries]))
    logprobs = float32([entry[0] for entry in entries])
    # Before the ending: NaN logits spoil the ending too, and this message names the cause.
    check_logprobs(request.key, logprobs)
    finish_reason = check_ending(
        request.key, token_ids, meta["finish_reason"], params.stop_token_ids
    )
    # SGLang also says "length" where its KV cache is too small for one request. The response would
    # be shorter than the run asks for, and no figure would show it.
    if finish_reason == "length" and len(token_ids) != max_new_tokens:
        raise EngineError(
            f"the server ended the response after {len(token_ids)} tokens, but "
            f"{max_new_tokens} were allowed",
            where=response_name(request.key),
            remedy="raise sglang.max_total_tokens: one request must fit into the KV cache",
        )
    routed = None
    if params.router is not None:
        # Nothing is predicted from the last token, so the server never routes it.
        positions = len(request.prompt_ids) + len(token_ids) - 1
        routed = read_routed_experts(request.key, meta, positions, params.router)
    return Response(
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        prompt_ids=request.prompt_ids,
        token_ids=token_ids,
        sampling_logprobs=logprobs,
        finish_reason=finish_reason,
        weight_version=str(meta["weight_version"]),
        routed_experts=routed,
    )
