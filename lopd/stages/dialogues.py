"""Rollouts of several turns: between two turns of the student an environment replies.

The chat template of the run writes what stands between two turns. The student's own tokens stay
what it sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lopd.config import RolloutSection, Sampling
from lopd.records import Ints, Prompt
from lopd.stages.sample_shards import end_token_ids
from lopd.tasks.chat_template import prompt_tokenizer, render_time
from lopd.tasks.environments import Environment, ask, load_environment
from lopd.tasks.rendering import ConversationRenderer
from lopd.tasks.turns import render_between
from sglang_rollout.requests.sampling import SamplingRequest
from sglang_rollout.requests.turns import Dialogue, Turns

if TYPE_CHECKING:
    from lopd.stages.context import StageContext


def turns_of(context: StageContext, section: Sampling, prompts: Sequence[Prompt]) -> Turns | None:
    """Return how responses of several turns are made, or None where a response has one turn.

    Args:
        context: The stage.
        section: How responses are sampled. Only rollouts have an environment.
        prompts: The prompts of the responses.

    Raises:
        ConfigError: The environment cannot be loaded.
    """
    if not isinstance(section, RolloutSection) or section.environment is None:
        return None
    config = context.config
    dialogues = _Dialogues(
        load_environment(section.environment),
        section.environment_timeout_s,
        ConversationRenderer(
            prompt_tokenizer(config),
            thinking=config.prompts.opd.thinking,
            time=render_time(config, record=True),
        ),
        end_token_ids(context.end_models),
        {prompt.prompt_id: prompt for prompt in prompts},
    )
    return Turns(section.max_turns, dialogues.begin)


@dataclass(frozen=True, slots=True)
class _Dialogues:
    """What all dialogues of a stage share."""

    environment: Environment
    limit_s: float
    renderer: ConversationRenderer
    end_ids: Sequence[int]
    prompts: Mapping[str, Prompt]

    def begin(self, request: SamplingRequest) -> Dialogue:
        prompt = self.prompts[request.prompt_id]
        return _EnvironmentDialogue(self, prompt, f"response {request.key}")


class _EnvironmentDialogue:
    """The conversation of one response. Dialogue in sglang_rollout.requests.turns has its form."""

    def __init__(self, shared: _Dialogues, prompt: Prompt, where: str) -> None:
        self._shared = shared
        self._messages: list[dict[str, Any]] = [dict(message) for message in prompt.messages]
        self._where = where

    def reply(self, token_ids: Ints) -> Ints | None:
        shared = self._shared
        # The environment reads text. What is trained stays the ids.
        text = shared.renderer.answer(token_ids)
        self._messages.append({"role": "assistant", "content": text})
        message = ask(shared.environment, self._messages, limit_s=shared.limit_s, where=self._where)
        if message is None:
            return None
        between = render_between(
            shared.renderer, self._messages, message, shared.end_ids, where=self._where
        )
        # A model may also end a document in place of a turn. Nothing is appended to that.
        if between.end_id != int(token_ids[-1]):
            return None
        self._messages.append(message)
        return between.token_ids
