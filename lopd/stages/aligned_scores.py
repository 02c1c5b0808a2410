"""A teacher with another tokenizer: its own tokens go out, scores of the student's come back.

Each model sees the prompt in its own chat template. The text of a response is derived from its ids
for the teacher alone: what is trained stays what was sampled, and where the two do not fit, the
tokens carry no loss.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import identify_tokenizer
from lopd.artifacts.lineage import TOKEN_ALIGNMENT
from lopd.cache.token_alignment import Alignment, alignment_counts
from lopd.config import Config
from lopd.errors import DataError
from lopd.records import Ints, Key, Prompt, Response, TeacherScores, token_hash
from lopd.tasks.chat_template import render_time
from lopd.tasks.cross_tokenizer import METHOD, Plan, plan_response
from lopd.tasks.prompts import render
from lopd.tasks.token_bytes import TokenBytes
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from lopd.stages.context import StageContext


class TokenizerBridge:
    """Writes responses in the teacher's tokens, and brings the scores back to the student's."""

    def __init__(self, config: Config, prompts: Iterable[Prompt], *, thinking: bool) -> None:
        """Remember what is needed. The tokenizers are read at the first response.

        Args:
            config: The configuration.
            prompts: The prompts of the responses. The teacher sees them in its own template.
            thinking: The knob ``thinking`` of the prompt set.
        """
        self._config = config
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        self._thinking = thinking
        self._rendered: dict[str, Ints] = {}
        # Of the responses in flight, until their shard is complete.
        self._plans: dict[Key, Plan] = {}

    @property
    def _folders(self) -> tuple[Path, Path]:
        return self._config.models.teacher, self._config.models.student

    @cached_property
    def _bytes(self) -> tuple[TokenBytes, TokenBytes]:
        teacher, student = self._folders
        return TokenBytes(teacher), TokenBytes(student)

    @cached_property
    def _teacher_tokenizer(self) -> Any:
        return load_tokenizer(self._folders[0])

    @cached_property
    def _ends(self) -> tuple[int, tuple[int, ...]]:
        """The token that ends a response of the teacher, and those that end the student's."""
        teacher, student = self._folders
        own = self._teacher_tokenizer
        # A checkpoint may name several. The tokenizer's own is the one that ends a turn.
        end = own.eos_token_id
        ends = stop_token_ids(teacher, own)
        # The SFT student's folder has the same tokens: it is trained from this one.
        return ends[0] if end is None else int(end), stop_token_ids(
            student, load_tokenizer(student)
        )

    @cached_property
    def _time(self) -> datetime.datetime:
        return render_time(self._config, record=True)

    def request(self, response: Response) -> ScoreRequest:
        """Return the response as the teacher is asked about it.

        Raises:
            DataError: The response is to no prompt of the run, or the teacher's template or
                tokenizer refuses it.
        """
        teacher, student = self._bytes
        end, ends = self._ends
        plan = plan_response(student, teacher, response.token_ids, ends=ends, teacher_end=end)
        self._plans[response.key] = plan
        return ScoreRequest(
            response.prompt_id,
            response.sample_index,
            self._prompt_ids(response.prompt_id),
            plan.token_ids,
        )

    def _prompt_ids(self, prompt_id: str) -> Ints:
        """Return the prompt in the teacher's template and tokens [P]."""
        if prompt_id not in self._prompts:
            raise DataError(
                f"prompt {prompt_id!r} of the rollouts is not among the prompts of the run",
                where="prompts",
                remedy="run the rollout stage again: the teacher needs the messages of its prompts",
            )
        if prompt_id not in self._rendered:
            (self._rendered[prompt_id],) = render(
                [self._prompts[prompt_id]],
                self._teacher_tokenizer,
                context_length=self._config.sglang.context_length,
                thinking=self._thinking,
                time=self._time,
            )
        return self._rendered[prompt_id]

    def bring_back(
        self, responses: Sequence[Response], scores: Sequence[TeacherScores]
    ) -> tuple[list[Response], list[TeacherScores]]:
        """Return the responses with their loss masks, and the scores of the student's tokens.

        Args:
            responses: Those of a shard.
            scores: The teacher's, of its own tokens, in the order of the responses.
        """
        masked: list[Response] = []
        brought: list[TeacherScores] = []
        for response, score in zip(responses, scores, strict=True):
            plan = self._plans.pop(response.key)
            aligned = plan.alignment == Alignment.ALIGNED
            if response.loss_mask is not None:
                aligned &= response.loss_mask
            masked.append(dataclasses.replace(response, loss_mask=aligned))
            brought.append(
                TeacherScores(
                    response.prompt_id,
                    response.sample_index,
                    token_hash(response.prompt_ids, response.token_ids),
                    plan.bring_back(score.teacher_logprobs, response.sampling_logprobs),
                    alignment=plan.alignment,
                )
            )
        return masked, brought


def bridge_for(context: StageContext, prompt_set: str) -> TokenizerBridge | None:
    """Return the bridge between the models of a run, or None where they have one tokenizer.

    Args:
        context: The stage.
        prompt_set: "opd" or "eval": the prompts of the responses that are scored.
    """
    config = context.config
    if not config.aligns_tokenizers:
        return None
    prompts, _ = context.prompts(prompt_set)
    thinking: bool = getattr(config.prompts, prompt_set).thinking
    return TokenizerBridge(config, prompts, thinking=thinking)


def alignment_figures(config: Config, folder: Path) -> dict[str, Any]:
    """Return what the manifest of an aligned cache says of the method, and how much it masks.

    It is empty where both models have one tokenizer.
    """
    if not config.aligns_tokenizers:
        return {}
    models = config.models
    about = {
        "method": METHOD,
        "teacher_tokenizer": identify_tokenizer(models.teacher).tokenizer,
        "student_tokenizer": identify_tokenizer(models.student).tokenizer,
    }
    return {TOKEN_ALIGNMENT: about, "alignment_counts": alignment_counts(folder)}
