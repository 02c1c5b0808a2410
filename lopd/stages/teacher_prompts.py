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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def teacher_prompt_ids(context: StageContext) -> dict[str, Ints] | None:
    """Return the token ids [P'] of the teacher's prompts by prompt_id; None for the student's own.

    The chat template of the run renders them, by the same rules as every other prompt.

    Raises:
        ConfigError: The template is wrong.
        DataError: A prompt lacks what the template names, or is too long.
    """
    config = context.config
    if config.score.teacher_prompt is None:
        return None
    prompts, _ = context.prompts("opd")
    return render_for_teacher(
        config,
        with_teacher_prompt(config, prompts),
        prompt_tokenizer(config),
        thinking=config.prompts.opd.thinking,
    )


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
        time=render_time(config, record=True),
    )
    return {prompt.prompt_id: ids for prompt, ids in zip(prompts, rendered, strict=True)}


def asked_of_teacher(response: Response, asked: Mapping[str, Ints] | None) -> Ints:
    """Return the prompt that the teacher scores a response after, as token ids.

    Raises:
        DataError: The response answers no prompt of the run.
    """
    if asked is None:
        return response.prompt_ids
    if response.prompt_id not in asked:
        raise DataError(
            f"response {response.key} answers a prompt that the run does not have",
            where="prompts",
            limit="the prompts of the responses: the teacher sees their messages",
            remedy="run the stage that sampled the responses again",
        )
    return asked[response.prompt_id]


def of_response(score: TeacherScores, response: Response, asked: Ints) -> TeacherScores:
    """Return the scores as those of the response with its own prompt.

    Args:
        score: The teacher's scores, which name the tokens that were scored.
        response: The response that they are for.
        asked: The prompt that the teacher had.
    """
    # The engine names what it was sent. Only if that was this response after the teacher's prompt
    # may the name of the response take its place.
    assert score.token_hash == token_hash(asked, response.token_ids), score.key
    return dataclasses.replace(
        score, token_hash=token_hash(response.prompt_ids, response.token_ids)
    )
