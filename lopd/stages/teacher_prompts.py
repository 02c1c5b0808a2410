"""The token ids of the teacher's own prompts, where score.teacher_prompt gives it any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lopd.errors import DataError
from lopd.records import Ints, Response, TeacherScores, token_hash
from lopd.stages.context import StageContext
from lopd.tasks.chat_template import prompt_tokenizer, render_time
from lopd.tasks.rendering import render
from lopd.tasks.teacher_prompt import teacher_prompts


def teacher_prompt_ids(context: StageContext) -> dict[str, Ints] | None:
    """Return the token ids [P'] of the teacher's prompts by prompt_id; None for the student's own.

    The chat template of the run renders them, by the same rules as every other prompt.

    Raises:
        ConfigError: The template is wrong.
        DataError: A prompt lacks what the template names, or is too long.
    """
    config = context.config
    template = config.score.teacher_prompt
    if template is None:
        return None
    prompts, _ = context.prompts("opd")
    rendered = render(
        teacher_prompts(prompts, template),
        prompt_tokenizer(config),
        context_length=config.sglang.context_length,
        thinking=config.prompts.opd.thinking,
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
            f"response {response.key} answers a prompt that prompts.opd does not have",
            limit="the prompts that the rollouts were sampled for, for score.teacher_prompt",
            remedy="run the rollout stage again",
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
    return replace(score, token_hash=token_hash(response.prompt_ids, response.token_ids))
