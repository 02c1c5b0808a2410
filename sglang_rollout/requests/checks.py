"""What a server's answer must be before anyone may learn from it.

These are pure functions. Each of them names the response that it refuses. Wrong log-probabilities
are the costliest failure of distillation, because the run continues and learns noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lopd.errors import EngineError
from lopd.records import FinishReason, Floats, Ints, Key

# In nats. log_softmax in float32 rounds a probability of 1 to at most this much above 0.
POSITIVE_SLACK = 1e-6
# In nats around -ln V. No trained model keeps a whole response that flat.
UNIFORM_TOLERANCE = 1e-3
# Fewer tokens may lie near -ln V by chance.
UNIFORM_MIN_TOKENS = 8


def response_name(key: Key) -> str:
    """Return the name that errors give a response."""
    return f"response {key[0]}#{key[1]}"


def check_returned_ids(
    key: Key, sent: Ints, returned: Ints, *, hidden_id: int | None = None
) -> None:
    """Check that the server answered for exactly the token ids that it was sent.

    Args:
        key: The prompt id and the sample index of the response.
        sent: Token ids of shape [N].
        returned: Token ids of shape [N], as the server gives them back.
        hidden_id: A sent id that the server may return as 0 (LAST_ID_ECHO in
            sglang_rollout.requests.scoring).

    Raises:
        EngineError: The number of ids or one of the ids differs.
    """
    if len(sent) != len(returned):
        raise EngineError(
            f"the server returned {len(returned)} tokens for the {len(sent)} it was sent",
            where=response_name(key),
            remedy="do not use these log-probabilities; check context_length and the log of the "
            "server",
        )
    if hidden_id is None:
        hidden = np.zeros(len(sent), dtype=np.bool_)
    else:
        # Only this id may come back as 0. Any other difference is an error.
        hidden = (sent == hidden_id) & (returned == 0)
    differing = np.flatnonzero((sent != returned) & ~hidden)
    if differing.size:
        first = int(differing[0])
        raise EngineError(
            f"the server returned token {int(returned[first])} at position {first} where "
            f"{int(sent[first])} was sent ({differing.size} of {len(sent)} differ)",
            where=response_name(key),
            remedy="do not use these log-probabilities; start the server with the right model "
            "and the right tokenizer settings",
        )


def check_logprobs(key: Key, logprobs: Floats) -> None:
    """Check that every value can be a log-probability.

    -inf is allowed, because a token whose logit is masked has this log-probability.

    Args:
        key: The prompt id and the sample index of the response.
        logprobs: Natural logarithms of shape [N].

    Raises:
        EngineError: A value is NaN, +inf or positive.
    """
    # This comparison finds +inf as well.
    wrong = np.flatnonzero(np.isnan(logprobs) | (logprobs > POSITIVE_SLACK))
    if wrong.size:
        first = int(wrong[0])
        raise EngineError(
            f"log-probability {float(logprobs[first])} at token {first} "
            f"({wrong.size} of {len(logprobs)} are wrong)",
            where=response_name(key),
            limit="a number that is at most 0",
            remedy="set sglang.dtype to a dtype with a larger range, or check whether the "
            "checkpoint is damaged",
        )


def check_not_uniform(key: Key, logprobs: Floats, vocab_size: int) -> None:
    """Check that the model does better than a uniform guess.

    A response of fewer than 8 tokens is not checked.

    Args:
        key: The prompt id and the sample index of the response.
        logprobs: Natural logarithms of shape [N].
        vocab_size: The number of tokens in the vocabulary.

    Raises:
        EngineError: Every token has a probability of about 1 / vocab_size. That happens when a
            server has started without loading the weights of its output layer.
    """
    # A few tokens can be near the uniform value by chance.
    if len(logprobs) < UNIFORM_MIN_TOKENS:
        return
    # Every token must be near -ln V. Single tokens of a good model are there by chance.
    distances = np.abs(logprobs + math.log(vocab_size))
    if bool(np.all(distances < UNIFORM_TOLERANCE)):
        raise EngineError(
            f"all {len(logprobs)} log-probabilities are within {UNIFORM_TOLERANCE} of -ln "
            f"{vocab_size}, as if the model had no weights",
            where=response_name(key),
            remedy="check the folder of the checkpoint and the log of the server: the weights "
            "were not loaded",
        )


def check_ending(
    key: Key, token_ids: Ints, finish_reason: Mapping[str, Any], stop_token_ids: tuple[int, ...]
) -> FinishReason:
    """Return the finish reason of a response, after checking it against the tokens.

    Args:
        key: The prompt id and the sample index of the response.
        token_ids: The response's token ids of shape [R].
        finish_reason: SGLang's record {"type": ..., "matched": ...}.
        stop_token_ids: Every end token of the model.

    Returns:
        "stop" for a response that ended by itself, else "length".

    Raises:
        EngineError: The finish reason is unknown or contradicts the last token.
    """
    kind = finish_reason["type"]
    matched = finish_reason.get("matched")
    last = int(token_ids[-1]) if len(token_ids) else None
    if kind == "length":
        # SGLang also says "length" where the end token is the last one that max_new_tokens allows.
        # Such a response ended by itself and must not count as truncated.
        return "stop" if last in stop_token_ids else "length"
    if kind != "stop":
        raise EngineError(
            f"the finish reason {kind!r} is unknown",
            where=response_name(key),
            remedy="use a supported version of SGLang",
        )
    # Where the logits are NaN, SGLang puts an end token at the end and says "stop" with the text
    # "NaN happened". Without this test the garbage would count as a finished response.
    if isinstance(matched, str):
        raise EngineError(
            f"the response did not stop at a token, but for this reason: {matched}",
            where=response_name(key),
            remedy="set sglang.dtype to a dtype with a larger range, or check whether the "
            "checkpoint is damaged",
        )
    # The end token is part of the response and carries loss. A response without it would never
    # teach the student to stop.
    if last not in stop_token_ids or matched != last:
        raise EngineError(
            f"the response stopped at token {last} (matched: {matched}), which is none of "
            f"the stop tokens {stop_token_ids}",
            where=response_name(key),
            remedy="add every end token of the model to eos_token_id in generation_config.json",
        )
    return "stop"
