"""A teacher with another tokenizer: the student's responses go out in the teacher's tokens, and
scores of the student's tokens come back.

Each model sees the prompt in its own chat template. The text of a response is derived from its ids
for the teacher alone: what is trained stays what was sampled, and where the two do not fit, the
tokens carry no loss. What the teacher itself samples, such as demonstrations, is kept in the
student's tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lopd import cache
from lopd.artifacts import ArtifactWriter, identify_tokenizer
from lopd.artifacts.lineage import TOKEN_ALIGNMENT
from lopd.cache.token_alignment import Alignment, alignment_counts, alignment_line
from lopd.config import Config
from lopd.records import Ints, Key, Manifest, Prompt, Response, TeacherScores, token_hash
from lopd.stages.sample_shards import sample_into, sampling_params
from lopd.stages.teacher_prompts import (
    prompt_of,
    render_for_teacher,
    with_teacher_prompt,
)
from lopd.tasks.cross_tokenizer import METHOD, Plan, plan_response
from lopd.tasks.token_bytes import TokenBytes
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids
from sglang_rollout.requests.scoring import ScoreRequest

if TYPE_CHECKING:
    from lopd.stages.context import StageContext

# A smaller share of tokens with loss is warned of: the student learns from a choice of its tokens.
_ENOUGH = 0.9


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """One of the two models, as far as its tokens go."""

    tokenizer: Any
    tokens: TokenBytes
    # Every token that ends a response, and the one that stands for them.
    ends: tuple[int, ...]
    end: int


def _side_of(folder: Path) -> _Side:
    tokenizer = load_tokenizer(folder)
    ends = stop_token_ids(folder, tokenizer)
    # A checkpoint may name several. The tokenizer's own is the one that ends a turn.
    end = ends[0] if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
    return _Side(tokenizer, TokenBytes(folder), ends, end)


class TokenizerBridge:
    """Writes responses in the teacher's tokens, and brings the scores back to the student's."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], *, thinking: bool) -> None:
        """Remember what is needed. The tokenizers are read at the first response.

        Args:
            config: The configuration.
            prompts: The prompts of the responses, as the teacher sees them, in its own template.
            thinking: The knob ``thinking`` of the prompt set.
        """
        self._config = config
        self._prompts = prompts
        self._thinking = thinking
        # Of the responses in flight, until their shard is complete.
        self._plans: dict[Key, Plan] = {}

    @cached_property
    def _models(self) -> tuple[_Side, _Side]:
        """The teacher and the student."""
        # The SFT student has the tokens of its base model, from which it was trained.
        models = self._config.models
        return _side_of(models.teacher), _side_of(models.student)

    def request(self, response: Response) -> ScoreRequest:
        """Return the response as the teacher is asked about it.

        Raises:
            DataError: The response is to no prompt of the run, or the teacher's template or
                tokenizer refuses it.
        """
        teacher, student = self._models
        plan = plan_response(
            student.tokens,
            teacher.tokens,
            response.token_ids,
            ends=student.ends,
            other_end=teacher.end,
        )
        # The teacher reads the question in its own template and tokens. The student's ids mean
        # other tokens to it.
        prompt_ids = prompt_of(response, self._teacher_prompts)
        # What is too long for the teacher is left out here: the response was as long as it may be
        # in the student's tokens, and a run must not end for it.
        plan = plan.within(self._config.sglang.context_length - len(prompt_ids))
        self._plans[response.key] = plan
        return ScoreRequest(
            response.prompt_id,
            response.sample_index,
            prompt_ids,
            plan.token_ids,
        )

    def teacher_prompt(self, prompt_id: str) -> Ints:
        """Return the prompt in the teacher's template and tokens [P]."""
        return self._teacher_prompts[prompt_id]

    @cached_property
    def _teacher_prompts(self) -> dict[str, Ints]:
        # All at once: a prompt that the teacher cannot read is noticed before the first response.
        teacher, _ = self._models
        return render_for_teacher(
            self._config, self._prompts, teacher.tokenizer, thinking=self._thinking
        )

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
            # Popped: a plan is needed once, and a run may have millions of responses.
            plan = self._plans.pop(response.key)
            aligned = plan.alignment == Alignment.ALIGNED
            # A mask that the response had before stays. The alignment can only take more tokens
            # away.
            if response.loss_mask is not None:
                aligned &= response.loss_mask
            masked.append(dataclasses.replace(response, loss_mask=aligned))
            brought.append(
                TeacherScores(
                    response.prompt_id,
                    response.sample_index,
                    # The hash of the student's tokens: the scores are now about them, and a reader
                    # compares it.
                    token_hash(response.prompt_ids, response.token_ids),
                    plan.bring_back(score.teacher_logprobs, response.sampling_logprobs),
                    alignment=plan.alignment,
                )
            )
        return masked, brought

    def in_student_tokens(self, response: Response, prompt_ids: Ints) -> Response:
        """Return a response that the teacher sampled, in the student's tokens.

        The loss mask leaves out what is not the teacher's text: special tokens that the student
        does not have, bytes that are no text, and the last chunk before a cut.

        Args:
            response: The response in the teacher's tokens.
            prompt_ids: The prompt in the student's template and tokens [P].
        """
        teacher, student = self._models
        plan = plan_response(
            teacher.tokens,
            student.tokens,
            response.token_ids,
            ends=teacher.ends,
            other_end=student.end,
        )
        # The student may need more tokens for the text than the teacher.
        whole = plan
        plan = whole.within(self._config.sglang.context_length - len(prompt_ids))
        return dataclasses.replace(
            response,
            prompt_ids=prompt_ids,
            token_ids=plan.token_ids,
            # The student's share of a chunk is not known, so its tokens get equal parts.
            sampling_logprobs=plan.forward(response.sampling_logprobs),
            finish_reason=response.finish_reason if plan is whole else "length",
            loss_mask=plan.is_text(),
            # The experts were chosen for the teacher's tokens, of which the row has none any more.
            routed_experts=None,
        )


class InStudentTokens(ArtifactWriter):
    """Publishes the teacher's own responses in the student's tokens, in place of another writer."""

    # It has no manifest of its own, so it does not call the constructor of ArtifactWriter. The
    # other writer knows what is published and completes the artifact.
    def __init__(
        self,
        writer: ArtifactWriter,
        bridge: TokenizerBridge,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Ints],
    ) -> None:
        """Remember how the student sees each prompt: ``prompt_ids`` are in its tokens."""
        self.folder = writer.folder
        self._writer = writer
        self._bridge = bridge
        self._prompt_ids = {
            prompt.prompt_id: ids for prompt, ids in zip(prompts, prompt_ids, strict=True)
        }

    @property
    def published(self) -> frozenset[int]:
        return self._writer.published

    def is_published(self, index: int) -> bool:
        return self._writer.is_published(index)

    @property
    def shard_size(self) -> int:
        return self._writer.shard_size

    def is_mine(self, index: int) -> bool:
        return self._writer.is_mine(index)

    def expect(self, num_shards: int) -> None:
        """Say how many shards the artifact will have."""
        self._writer.expect(num_shards)

    def publish_shard(self, index: int, table: pa.Table) -> None:
        """Publish a shard of the teacher's responses in the student's tokens."""
        rows = [
            self._bridge.in_student_tokens(response, self._prompt_ids[response.prompt_id])
            for response, _ in cache.from_table(table)
        ]
        self._writer.publish_shard(index, cache.to_table(rows))

    def finish(self, **extra: Any) -> Manifest:
        raise AssertionError("only the other writer completes the artifact")


def demonstrate_in_student_tokens(context: StageContext, writer: ArtifactWriter) -> None:
    """Sample the teacher's demonstrations and publish them in the student's tokens."""
    config = context.config
    section = config.demonstrate
    prompts, prompt_ids = context.prompts("sft")
    num_shards = -(-len(prompts) * section.samples_per_prompt // writer.shard_size)
    # Before the servers, whose start takes longest.
    writer.expect(num_shards)
    if not writer.missing(num_shards):
        return
    bridge = TokenizerBridge(config, prompts, thinking=config.prompts.sft.thinking)
    with context.serve("teacher", config.models.teacher) as engine:
        sample_into(
            InStudentTokens(writer, bridge, prompts, prompt_ids),
            engine,
            prompts,
            # The teacher is asked in its own template. The published rows have the student's
            # prompt.
            [bridge.teacher_prompt(prompt.prompt_id) for prompt in prompts],
            # The end tokens of the teacher alone: ids of the student mean other tokens here.
            sampling_params(section, [config.models.teacher]),
            samples_per_prompt=section.samples_per_prompt,
            seed=config.run.seed,
            purpose=context.stage.name,
            title="demonstrations",
        )


def bridge_for(context: StageContext, prompt_set: str) -> TokenizerBridge | None:
    """Return the bridge between the models of a run, or None where they have one tokenizer.

    Args:
        context: The stage.
        prompt_set: "sft", "opd" or "eval": the prompts of the responses.
    """
    config = context.config
    if not config.aligns_tokenizers:
        return None
    prompts: Sequence[Prompt] = context.prompts(prompt_set)[0]
    if prompt_set == "opd":
        # Only what is distilled is scored with more before the teacher's eyes.
        prompts = with_teacher_prompt(config, prompts)
    thinking: bool = getattr(config.prompts, prompt_set).thinking
    return TokenizerBridge(config, prompts, thinking=thinking)


def tokenizer_figures(config: Config) -> dict[str, Any]:
    """Return the method and both tokenizers, for the manifest of what was brought over.

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
    return {TOKEN_ALIGNMENT: about}


def alignment_figures(context: StageContext, folder: Path) -> dict[str, Any]:
    """Return what the manifest of an aligned cache says, and log how much carries loss.

    It is empty where both models have one tokenizer.
    """
    about = tokenizer_figures(context.config)
    # A worker knows only its own shards.
    if not about or context.share is not None:
        return about
    counts = alignment_counts(folder)
    line = alignment_line(counts)
    context.log(f"alignment: {line}")
    figures = {**about, "alignment_counts": counts}
    if counts["aligned"] < _ENOUGH * sum(counts[one.name.lower()] for one in Alignment):
        warning = f"many tokens get no score of the teacher's ({line})"
        context.log(f"WARNING: {warning}")
        figures["warnings"] = [warning]
    return figures
