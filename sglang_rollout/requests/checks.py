"""What a server's answer must be before anyone may learn from it. Pure functions; each names the
response it refuses.

Silent garbage in log-probabilities is the costliest failure of distillation: the run goes on and
learns noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lopd.errors import EngineError
from lopd.records import FinishReason, Floats, Ints, Key

POSITIVE_SLACK = (
    1e-6  # nats: log_softmax in float32 rounds a probability of 1 to at most this much above 0
)
UNIFORM_TOLERANCE = 1e-3  # nats around -ln V; no trained model keeps a whole response that flat
UNIFORM_MIN_TOKENS = 8  # fewer tokens may lie near -ln V by chance


def response_name(key: Key) -> str:
    """How errors name a response."""
    return f"response {key[0]}#{key[1]}"


def check_returned_ids(
    key: Key, sent: Ints, returned: Ints, *, hidden_id: int | None = None
) -> None:
    """EngineError unless the server answered for exactly the token ids it was sent. sent, returned:
    [N].

    hidden_id: a sent id that the server may echo as 0 (see LAST_ID_ECHO in
    sglang_rollout.requests.scoring).
    """
    if len(sent) != len(returned):
        raise EngineError(
            f"the server returned {len(returned)} tokens for the {len(sent)} it was sent",
            where=response_name(key),
            remedy="do not use these log-probabilities; check context_length and the server's log",
        )
    hidden = (
        (sent == hidden_id) & (returned == 0)
        if hidden_id is not None
        else np.zeros(len(sent), dtype=np.bool_)
    )
    differing = np.flatnonzero((sent != returned) & ~hidden)
    if differing.size:
        first = int(differing[0])
        raise EngineError(
            f"the server returned token {int(returned[first])} at position {first} where {int(sent[first])} was sent ({differing.size} of {len(sent)} differ)",
            where=response_name(key),
            remedy="do not use these log-probabilities; the server's model or its tokenizer setting is not what it should be",
        )


def check_logprobs(key: Key, logprobs: Floats) -> None:
    """EngineError for NaN, +inf or a positive log-probability. -inf is a fact (a masked token), not
    a fault. logprobs: [N].
    """
    wrong = np.flatnonzero(
        np.isnan(logprobs) | (logprobs > POSITIVE_SLACK)
    )  # +inf is above the slack too
    if wrong.size:
        first = int(wrong[0])
        raise EngineError(
            f"log-probability {float(logprobs[first])} at token {first} ({wrong.size} of {len(logprobs)} are wrong)",
            where=response_name(key),
            limit="a log-probability is a number not above 0",
            remedy="look for overflow in the served dtype (sglang.dtype) or a damaged checkpoint",
        )


def check_not_uniform(key: Key, logprobs: Floats, vocab_size: int) -> None:
    """EngineError where every token of a response of 8 or more has the probability of a uniform
    guess, 1 / vocab_size. logprobs: [N].
    """
    if len(logprobs) >= UNIFORM_MIN_TOKENS and bool(
        np.all(np.abs(logprobs + math.log(vocab_size)) < UNIFORM_TOLERANCE)
    ):
        raise EngineError(
            f"all {len(logprobs)} log-probabilities are within {UNIFORM_TOLERANCE} of -ln {vocab_size}: the model knows nothing",
            where=response_name(key),
            remedy="the weights were not loaded; check the checkpoint folder and the server's log",
        )


def check_ending(
    key: Key, token_ids: Ints, finish_reason: Mapping[str, Any], stop_token_ids: tuple[int, ...]
) -> FinishReason:
    """The finish reason, once it agrees with the tokens. token_ids: [R]. finish_reason: SGLang's,
    {"type": ..., "matched": ...}.

    "stop" must name a stop token, and end in it: the end token is part of the response. (Where the
    logits are NaN, SGLang puts a stop token at the end and says "stop", matched "NaN happened".) A
    response whose stop token happens to be the last that max_new_tokens allows is called "length"
    by SGLang; it ended by itself, so it is "stop" here.
    """
    kind, matched = finish_reason["type"], finish_reason.get("matched")
    last = int(token_ids[-1]) if len(token_ids) else None
    if kind == "length":
        return "stop" if last in stop_token_ids else "length"
    if kind != "stop":
        raise EngineError(f"finish reason {kind!r} is unknown", where=response_name(key))
    if isinstance(matched, str):
        raise EngineError(
            f"it stopped for another reason than a token: {matched}",
            where=response_name(key),
            remedy="look for overflow in the served dtype (sglang.dtype) or a damaged checkpoint",
        )
    if last not in stop_token_ids or matched != last:
        raise EngineError(
            f"it stopped at token {last} (matched: {matched}), which is none of the stop tokens {stop_token_ids}",
            where=response_name(key),
            remedy="give every end token of the model (eos_token_id of config.json and generation_config.json) as a stop token",
        )
    return "stop"
