"""Where the turns of a conversation lie in its token ids, and the ids of a message between turns.

Boundaries come from the chat template itself: the ids of a conversation up to a message are
compared with the ids of a longer part of it. Nothing is searched for in a text. A template whose
shorter rendering is not the beginning of the longer one is refused, because a model that wrote the
conversation turn by turn has not seen the longer one. Some templates remove the thinking of earlier
answers, for example.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np

from lopd.errors import DataError
from lopd.records import Bools, Ints
from lopd.tasks.rendering import ConversationRenderer

# A message has a role and a content, and may have whatever else a template reads (tool_calls).
Message: TypeAlias = Mapping[str, Any]
# Whose messages a model learns from.
ANSWERS = "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation in token ids, from the first answer on.

    Attributes:
        prompt_ids: What stands before the first answer, with its generation prompt.
        token_ids: From the first answer to the end token of the last one.
        loss_mask: True for the tokens of answers, their end tokens included.
        num_turns: The number of answers.
    """

    prompt_ids: Ints  # [P]
    token_ids: Ints  # [R]
    loss_mask: Bools  # [R]
    num_turns: int


@dataclass(frozen=True, slots=True)
class Between:
    """What stands between two answers.

    Attributes:
        end_id: The token with which the template ends the first of them.
        token_ids: Everything after it, up to the generation prompt of the second.
    """

    end_id: int
    token_ids: Ints


def render_conversation(
    renderer: ConversationRenderer,
    messages: Sequence[Message],
    end_ids: Collection[int],
    *,
    where: str,
    tools: Sequence[Any] | None = None,
) -> Conversation:
    """Return a conversation with its mask.

    What follows the last answer carries no loss and has no answer behind it, so it is left out.

    Args:
        renderer: The chat template.
        messages: The conversation.
        end_ids: The tokens that end an answer.
        where: The place of the conversation, for errors.
        tools: See ConversationRenderer.ids.

    Raises:
        DataError: There is no answer, or the conversation begins with one, or the template does not
            write a conversation turn by turn.
    """
    answers = [place for place, one in enumerate(messages) if one.get("role") == ANSWERS]
    if not answers or answers[0] == 0:
        raise DataError(
            "there is no message of the assistant"
            if not answers
            else "the first message is from the assistant, so nothing was asked",
            where=where,
            limit="a question, and after it an answer",
            remedy="remove this conversation",
        )
    messages = messages[: answers[-1] + 1]
    whole = renderer.ids(messages, to_answer=False, tools=tools)
    mask = np.zeros(len(whole), bool)
    for place in answers:
        start = _beginning(renderer, messages[:place], whole, where, to_answer=True, tools=tools)
        stop = _beginning(
            renderer, messages[: place + 1], whole, where, to_answer=False, tools=tools
        )
        # A template may write a line break behind the end token. No model has written that.
        mask[start : _end_of(whole, start, stop, end_ids, renderer.source, where)] = True
    first = int(np.argmax(mask))
    last = int(np.flatnonzero(mask)[-1]) + 1
    return Conversation(whole[:first], whole[first:last], mask[first:last], len(answers))


def render_between(
    renderer: ConversationRenderer,
    messages: Sequence[Message],
    reply: Message,
    end_ids: Collection[int],
    *,
    where: str,
) -> Between:
    """Return the token ids that stand between an answer and the next one.

    The tokens of the answer itself are not part of it: they stay what was sampled.

    Args:
        renderer: The chat template.
        messages: The conversation up to the answer.
        reply: The message that follows the answer.
        end_ids: The tokens that end an answer.
        where: The response, for errors.

    Raises:
        DataError: The template refuses the reply, or does not write a conversation turn by turn.
    """
    longer = renderer.ids([*messages, reply], to_answer=True)
    stop = _beginning(renderer, messages, longer, where, to_answer=False)
    start = _beginning(renderer, messages[:-1], longer, where, to_answer=True)
    end = _end_of(longer, start, stop, end_ids, renderer.source, where)
    return Between(int(longer[end - 1]), longer[end:])


def _beginning(
    renderer: ConversationRenderer,
    messages: Sequence[Message],
    whole: Ints,
    where: str,
    *,
    to_answer: bool,
    tools: Sequence[Any] | None = None,
) -> int:
    """Return how many tokens the messages are, which must be the beginning of the whole."""
    part = renderer.ids(messages, to_answer=to_answer, tools=tools)
    if len(part) <= len(whole) and np.array_equal(part, whole[: len(part)]):
        return len(part)
    _refuse(
        f"it writes the first {len(messages)} messages in another way when others follow",
        renderer.source,
        where,
    )


def _end_of(
    whole: Ints, start: int, stop: int, end_ids: Collection[int], source: str, where: str
) -> int:
    """Return the place behind the end token of the answer that lies from start to stop."""
    ends = np.flatnonzero(np.isin(whole[start:stop], [*end_ids]))
    # The last one: an answer may quote an end token.
    if len(ends):
        return start + int(ends[-1]) + 1
    _refuse(f"it ends an answer with none of the end tokens {sorted(end_ids)}", source, where)


def _refuse(reason: str, source: str, where: str) -> NoReturn:
    raise DataError(
        f"the chat template of {source} cannot be used turn by turn: {reason}",
        where=where,
        limit="a template that only appends (many remove the thinking of earlier answers)",
        remedy="use a template that keeps every message as it is, or give token_ids and loss_mask",
    )
