"""Responses of several turns: a model answers, something replies, and the model goes on.

The token ids of a response only grow. Each turn is sampled after exactly the ids that stand before
it, so a server finds them in its prefix cache, and no text is tokenised a second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from lopd.errors import EngineError
from lopd.records import FinishReason, Ints, Response, int32
from sglang_rollout.requests.checks import response_name
from sglang_rollout.requests.sampling import SamplingRequest

# An odd number whose multiples differ in all bits, so that turns have seeds far from each other.
_SEED_STEP = 0x9E3779B1


class Dialogue(Protocol):
    """What replies to the turns of one response."""

    def reply(self, token_ids: Ints) -> Ints | None:
        """Return what follows a turn, up to the generation prompt of the next one, int32 [N].

        It is called in a thread of its own, so it may take its time.

        Args:
            token_ids: The turn as it was sampled, with its end token.

        Returns:
            None ends the response.
        """
        ...


@dataclass(frozen=True, slots=True)
class Turns:
    """How responses of several turns are made.

    Attributes:
        max_turns: The most turns of a response.
        begin: Returns the dialogue of one response.
    """

    max_turns: int
    begin: Callable[[SamplingRequest], Dialogue]


async def sample_turns(
    request: SamplingRequest,
    turns: Turns | None,
    max_new_tokens: int,
    sample: Callable[[SamplingRequest, int], Awaitable[Response]],
) -> Response:
    """Sample a response of several turns.

    The tokens between turns carry no loss, and their sampling_logprobs are 0: nobody sampled them.

    Args:
        request: The response to sample.
        turns: How turns are made. None: there is one.
        max_new_tokens: The most tokens of the response, those between turns included.
        sample: Samples one turn of at most so many tokens.

    Returns:
        The response. Its finish_reason is "stop" if the dialogue ended by itself, "length" if the
        limit of tokens ended it, and "abort" if the limit of turns did.

    Raises:
        EngineError: Two turns are of different weights.
    """
    whole = await sample(request, max_new_tokens)
    if turns is None:
        return whole
    # Also where nothing replies: all responses of an artifact have the same columns.
    whole = replace(whole, loss_mask=np.ones(len(whole.token_ids), bool))
    dialogue = turns.begin(request)
    for number in range(1, turns.max_turns + 1):
        # A turn without an end token was cut off. Nothing can follow it.
        if whole.finish_reason != "stop":
            return whole
        # The newest turn is what stands behind the last token between turns.
        assert whole.loss_mask is not None
        silent = np.flatnonzero(~whole.loss_mask)
        start = int(silent[-1]) + 1 if len(silent) else 0
        # In a thread: a tool takes its time, and all other responses must go on.
        between = await asyncio.to_thread(dialogue.reply, whole.token_ids[start:])
        if between is None:
            return whole
        # What would be cut is not begun. The end token of the last turn then is not the end.
        room = max_new_tokens - len(whole.token_ids) - len(between)
        if room < 1:
            return replace(whole, finish_reason="length")
        if number == turns.max_turns:
            return replace(whole, finish_reason="abort")
        ids = [request.prompt_ids, whole.token_ids, between]
        following = replace(
            request,
            prompt_ids=int32(np.concatenate(ids)),
            # The seed of a turn follows from the seed of the response, so a stage that was killed
            # asks for the same turns again.
            seed=(request.seed + number * _SEED_STEP) & 0x7FFFFFFF,
            first_len=len(request.prompt_ids),
        )
        whole = _joined(whole, between, await sample(following, room))
    raise AssertionError("the last turn returns")


def _joined(whole: Response, between: Ints, turn: Response) -> Response:
    """Return a response with one more turn."""
    # A weight sync between two turns would mix two policies in one response.
    if turn.weight_version != whole.weight_version:
        raise EngineError(
            f"a turn is of the weights {turn.weight_version}, and the turns before it are of "
            f"{whole.weight_version}",
            where=response_name(whole.key),
            remedy="sample responses of several turns while no weights are sent",
        )
    assert whole.loss_mask is not None
    silent = np.zeros(len(between), np.float32)
    mask = [whole.loss_mask, np.zeros(len(between), bool), np.ones(len(turn.token_ids), bool)]
    finish_reason: FinishReason = turn.finish_reason
    return replace(
        whole,
        token_ids=int32(np.concatenate([whole.token_ids, between, turn.token_ids])),
        sampling_logprobs=np.concatenate([whole.sampling_logprobs, silent, turn.sampling_logprobs]),
        loss_mask=np.concatenate(mask),
        finish_reason=finish_reason,
    )
