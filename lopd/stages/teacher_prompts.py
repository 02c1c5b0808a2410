"""The teacher's prompts as token ids, where they are not those of the student.

They differ where score.teacher_prompt adds something, and where the teacher has another tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lopd.config import Config
from lopd.errors import DataError
from lopd.records import Ints, Prompt, Response, TeacherScores, token_hash
from lopd.stages.context import StageContext
from lopd.tasks.chat_template import prompt_tokenizer, render_time
from lopd.tasks.rendering import render
from lopd.tasks.teacher_prompt import teacher_prompts
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompts_for_scoring(context: StageContext) -> TeacherPrompts:
    """Return what the teacher is asked about the rollouts: their own prompts, or its own.

    The chat template of the run renders them, by the same rules as every other prompt.

    Raises:
        ConfigError: The template is wrong.
        DataError: A prompt lacks what the template names, or is too long.
    """
    config = context.config
    if config.score.teacher_prompt is None:
        return TeacherPrompts()
    # The messages are needed and not only the ids, because the template writes around the last
    # message.
    prompts, _ = context.prompts("opd")
    asked = render_for_teacher(
        config,
        with_teacher_prompt(config, prompts),
        prompt_tokenizer(config),
        thinking=config.prompts.opd.thinking,
    )
    return TeacherPrompts(asked)


def with_teacher_prompt(config: Config, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return the prompts of the rollouts as the teacher sees them (score.teacher_prompt)."""
    template = config.score.teacher_prompt
    return prompts if template is None else teacher_prompts(prompts, template)


def render_for_teacher(
    config: Config,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    thinking: bool,
) -> dict[str, Ints]:
    """Return the token ids of prompts by prompt_id, with the template of the tokenizer.

    Args:
        config: The configuration.
        prompts: The prompts as the teacher sees them.
        tokenizer: The tokenizer whose ids the teacher reads.
        thinking: The knob ``thinking`` of the prompt set.

    Raises:
        DataError: A prompt is too long, or the template refuses it.
    """
    rendered = render(
        prompts,
        tokenizer,
        context_length=config.sglang.context_length,
        thinking=thinking,
        # The time of the run's first stage, so that the teacher reads the same date as the student.
        time=render_time(config, record=True),
    )
    return {prompt.prompt_id: ids for prompt, ids in zip(prompts, rendered, strict=True)}


class TeacherPrompts:
    """Asks a teacher about responses in their own tokens, after a prompt of its own or theirs.

    A TokenizerBridge has the same methods, for a teacher with another tokenizer.
    """

    def __init__(self, asked: Mapping[str, Ints] | None = None) -> None:
        """Remember the teacher's own prompts by prompt_id, or None for those of the responses."""
        self._asked = asked

    def request(self, response: Response) -> ScoreRequest:
        """Return the response as the teacher is asked about it.

        Raises:
            DataError: The response answers no prompt of the run.
        """
        # The usual case: the teacher sees what the student saw, to the token.
        prompt_ids = response.prompt_ids
        if self._asked is not None:
            prompt_ids = prompt_of(response, self._asked)
        return ScoreRequest(
            response.prompt_id, response.sample_index, prompt_ids, response.token_ids
        )

    def bring_back(
        self, responses: Sequence[Response], scores: Sequence[TeacherScores]
    ) -> tuple[list[Response], list[TeacherScores]]:
        """Return the responses, and the scores as those of each response with its own prompt."""
        pairs = zip(responses, scores, strict=True)
        return list(responses), [self._of_response(*pair) for pair in pairs]

    def _of_response(self, response: Response, score: TeacherScores) -> TeacherScores:
        # The engine names what it was sent. Only if that was this response after the teacher's
        # prompt may the name of the response take its place.
        sent = token_hash(self.request(response).prompt_ids, response.token_ids)
        assert score.token_hash == sent, score.key
        name = token_hash(response.prompt_ids, response.token_ids)
        return dataclasses.replace(score, token_hash=name)


def prompt_of(response: Response, asked: Mapping[str, Ints]) -> Ints:
    """Return the prompt that the teacher scores a response after, as token ids.

    Raises:
        DataError: The response answers no prompt of the run.
    """
    # A cache that was made from other prompts, or prompts that were changed since the rollouts.
    if response.prompt_id not in asked:
        raise DataError(
            f"response {response.key} answers a prompt that the run does not have",
            where="prompts",
            limit="the prompts of the responses: the teacher sees their messages",
            remedy="run the stage that sampled the responses again",
        )
    return asked[response.prompt_id]
