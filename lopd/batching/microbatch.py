"""Responses to samples to packed microbatches. The shift by one happens here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.errors import DataError
from lopd.records import Floats, Ints, Microbatch, Response, Sample, TeacherScores, TopK


def make_sample(
    response: Response, teacher: TeacherScores | Floats | None = None, *, with_top: bool = True
) -> Sample:
    """Prompt and response in one row [P + R]; loss on the response's tokens (those of its
    loss_mask, where it has one).

    teacher: its scores, or only its log-probabilities f32[R] of the response's tokens. with_top:
    take the teacher's top-K along, where the scores have it. Log-probabilities are 0 on the prompt.
    DataError: another number of them than of tokens.
    """
    teacher_logprobs = teacher.teacher_logprobs if isinstance(teacher, TeacherScores) else teacher
    top = teacher.top if isinstance(teacher, TeacherScores) and with_top else None
    prompt_len, response_len = len(response.prompt_ids), len(response.token_ids)
    if teacher_logprobs is not None and len(teacher_logprobs) != response_len:
        raise DataError(
            f"{len(teacher_logprobs)} teacher log-probabilities for {response_len} tokens",
            where=f"response {response.key}",
            remedy="score the rollouts again: the cache belongs to other responses",
        )
    loss_mask = np.zeros(prompt_len + response_len, dtype=np.bool_)
    loss_mask[prompt_len:] = True if response.loss_mask is None else response.loss_mask
    loss_mask[:1] = (
        False  # nothing stands before the first token to predict it from (an empty prompt)
    )

    def after_prompt(logprobs: Floats) -> Floats:
        return np.concatenate([np.zeros(prompt_len, dtype=np.float32), logprobs.astype(np.float32)])

    return Sample(
        token_ids=np.concatenate([response.prompt_ids, response.token_ids]).astype(np.int32),
        loss_mask=loss_mask,
        sampling_logprobs=after_prompt(response.sampling_logprobs),
        teacher_logprobs=None if teacher_logprobs is None else after_prompt(teacher_logprobs),
        key=response.key,
        truncated=response.finish_reason != "stop",
        teacher_top=None
        if top is None
        else TopK(
            *(
                _padded(column, prompt_len, 0)
                for column in (top.ids, top.logprobs, top.tail_logprob)
            )
        ),
    )


def _padded(rows: NDArray[Any], before: int, after: int) -> NDArray[Any]:
    """With so many rows of zeros around them."""
    return np.pad(rows, ((before, after), *((0, 0),) * (rows.ndim - 1)))


def build_microbatch(samples: Sequence[Sample], pad_multiple: int = 1) -> Microbatch:
    """Samples packed end to end [T], T a multiple of pad_multiple, shifted by one.

    Position t predicts labels[t] = token_ids[t + 1] of the same sequence, and mask and
    log-probabilities move with the labels. The last position of a sequence predicts nothing: label
    0, mask False, log-probabilities 0. Positions restart with each sequence. What is missing to a
    multiple of pad_multiple becomes one more sequence, of token 0 and without loss. No samples:
    that padding alone, pad_multiple tokens with both log-probability columns, so that a rank with
    nothing to learn still takes part in every collective. DataError: some samples have
    log-probabilities, a top-K or a teacher's index, others not.
    """
    assert pad_multiple >= 1, pad_multiple
    lengths = [len(sample) for sample in samples]
    assert all(lengths), "a sample has at least one token"
    num_tokens = sum(lengths)
    padding_len = -num_tokens % pad_multiple if samples else pad_multiple
    if padding_len:
        lengths.append(padding_len)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(cu_seqlens[-1])
    starts, last = cu_seqlens[:-1], cu_seqlens[1:] - 1

    def packed(columns: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        flat = np.zeros(total, dtype=dtype)
        if columns:
            flat[:num_tokens] = np.concatenate(columns)
        return flat

    def shifted(columns: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        flat = np.roll(packed(columns, dtype), -1)
        flat[last] = 0
        return flat

    def given(name: str) -> list[Any]:
        """Of every sample, or of none."""
        columns = [column for sample in samples if (column := getattr(sample, name)) is not None]
        if columns and len(columns) != len(samples):
            raise DataError(
                f"{len(columns)} of {len(samples)} samples of a microbatch have {name}",
                where="batch",
                remedy="give it for all or for none",
            )
        return columns

    def shifted_logprobs(name: str) -> Floats | None:
        columns = given(name)
        return shifted(columns, np.float32) if columns or not samples else None

    def shifted_top() -> TopK | None:
        tops: list[TopK] = given("teacher_top")
        if not tops:
            return None
        if len(widths := {top.ids.shape[1] for top in tops}) > 1:
            raise DataError(
                f"top-K with K of {sorted(widths)} in one microbatch",
                where="batch",
                remedy="score the rollouts again with one score.top_k",
            )
        merged = []
        for columns in zip(
            *((top.ids, top.logprobs, top.tail_logprob) for top in tops), strict=True
        ):
            flat = np.roll(_padded(np.concatenate(columns), 0, total - num_tokens), -1, axis=0)
            flat[last] = 0
            merged.append(flat)
        return TopK(*merged)

    token_ids: list[Ints] = [sample.token_ids for sample in samples]
    teachers = given("teacher_index")
    return Microbatch(
        token_ids=packed(token_ids, np.int64),
        labels=shifted(token_ids, np.int64),
        position_ids=np.arange(total, dtype=np.int64) - np.repeat(starts, lengths),
        loss_mask=shifted([sample.loss_mask for sample in samples], np.bool_),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        num_sequences=len(samples),
        teacher_logprobs=shifted_logprobs("teacher_logprobs"),
        sampling_logprobs=shifted_logprobs("sampling_logprobs"),
        keys=tuple(sample.key for sample in samples if sample.key is not None),
        truncated=np.array(
            [*(sample.truncated for sample in samples), *([False] if padding_len else [])],
            dtype=np.bool_,
        ),
        teacher_top=shifted_top(),
        teacher_index=np.array([*teachers, *([0] if padding_len else [])], dtype=np.int64)
        if teachers or not samples
        else None,
    )
