"""From responses to samples, and from samples to packed microbatches.

The shift by one happens here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.errors import DataError
from lopd.records import Floats, Ints, Microbatch, Response, Sample, TeacherScores, TopK


def make_sample(
    response: Response, teacher: TeacherScores | Floats | None = None, *, with_top: bool = True
) -> Sample:
    """Put prompt and response into one row of P + R tokens.

    Loss is on the tokens of the response, or on those of its loss_mask if it has one.
    Log-probabilities are 0 on the prompt.

    Args:
        response: The response, with its prompt.
        teacher: The teacher's scores, or only its log-probabilities of the response's tokens,
            float32 [R].
        with_top: Whether the sample takes the teacher's top-K, if the scores have it.

    Raises:
        DataError: The number of log-probabilities differs from the number of tokens.
    """
    teacher_logprobs = teacher.teacher_logprobs if isinstance(teacher, TeacherScores) else teacher
    top = teacher.top if isinstance(teacher, TeacherScores) and with_top else None
    base = teacher.base_logprobs if isinstance(teacher, TeacherScores) else None
    prompt_len = len(response.prompt_ids)
    response_len = len(response.token_ids)
    if teacher_logprobs is not None and len(teacher_logprobs) != response_len:
        raise DataError(
            f"there are {len(teacher_logprobs)} teacher log-probabilities for "
            f"{response_len} tokens",
            where=f"response {response.key}",
            remedy="run the score stage again: this cache belongs to other responses",
        )
    loss_mask = np.zeros(prompt_len + response_len, dtype=np.bool_)
    loss_mask[prompt_len:] = True if response.loss_mask is None else response.loss_mask
    # With an empty prompt the response begins at token 0. No position predicts that token.
    loss_mask[:1] = False

    # Nobody has log-probabilities of the prompt. The zeros carry no loss.
    def after_prompt(logprobs: Floats) -> Floats:
        return np.concatenate([np.zeros(prompt_len, dtype=np.float32), logprobs.astype(np.float32)])

    return Sample(
        token_ids=np.concatenate([response.prompt_ids, response.token_ids]).astype(np.int32),
        loss_mask=loss_mask,
        sampling_logprobs=after_prompt(response.sampling_logprobs),
        teacher_logprobs=None if teacher_logprobs is None else after_prompt(teacher_logprobs),
        key=response.key,
        # "length" and "abort" both mean that the response has no end token.
        truncated=response.finish_reason != "stop",
        teacher_top=None if top is None else _top_after_prompt(top, prompt_len),
        base_logprobs=None if base is None else after_prompt(base),
    )


def _top_after_prompt(top: TopK, prompt_len: int) -> TopK:
    columns = (top.ids, top.logprobs, top.tail_logprob)
    return TopK(*(_padded(column, prompt_len, 0) for column in columns))


def _padded(rows: NDArray[Any], before: int, after: int) -> NDArray[Any]:
    """Put rows of zeros in front of and behind rows [N, ...]."""
    return np.pad(rows, ((before, after), *((0, 0),) * (rows.ndim - 1)))


def build_microbatch(samples: Sequence[Sample], pad_multiple: int = 1) -> Microbatch:
    """Pack samples end to end into T positions, shifted by one.

    Position t predicts labels[t] = token_ids[t + 1] of the same sequence. Mask and
    log-probabilities move with the labels. The last position of a sequence predicts nothing: its
    label is 0, its mask False, and its log-probabilities are 0. Positions restart with each
    sequence.

    Args:
        samples: The samples. Without any, the microbatch is pad_multiple tokens of padding, with
            both columns of log-probabilities.
        pad_multiple: T is a multiple of it. Missing tokens form one more sequence, of token 0 and
            without loss.

    Raises:
        DataError: Some samples have log-probabilities, a top-K or a teacher's index, and others do
            not.
    """
    assert pad_multiple >= 1, pad_multiple
    pack = _pack_of([len(sample) for sample in samples], pad_multiple)
    # A microbatch without samples has the columns that the others have. A rank with nothing to
    # learn still runs the objective and takes part in every collective, as the others wait for it.
    is_empty = not samples

    def shifted_logprobs(name: str) -> Floats | None:
        columns = _column(samples, name)
        return pack.shifted(columns, np.float32) if columns or is_empty else None

    token_ids: list[Ints] = [sample.token_ids for sample in samples]
    truncated = [sample.truncated for sample in samples]
    teachers = _column(samples, "teacher_index")
    right = _column(samples, "right")
    # Per-sequence columns have an entry for the padding sequence too, as cu_seqlens has.
    padding = [0] if pack.has_padding else []
    if pack.has_padding:
        truncated.append(False)
    return Microbatch(
        token_ids=pack.packed(token_ids, np.int64),
        labels=pack.shifted(token_ids, np.int64),
        position_ids=pack.position_ids(),
        loss_mask=pack.shifted([sample.loss_mask for sample in samples], np.bool_),
        cu_seqlens=pack.cu_seqlens,
        max_seqlen=int(np.diff(pack.cu_seqlens).max()),
        num_sequences=len(samples),
        teacher_logprobs=shifted_logprobs("teacher_logprobs"),
        sampling_logprobs=shifted_logprobs("sampling_logprobs"),
        keys=tuple(sample.key for sample in samples if sample.key is not None),
        truncated=np.array(truncated, dtype=np.bool_),
        teacher_top=_shifted_top(pack, _column(samples, "teacher_top")),
        teacher_index=_of_sequences(teachers, padding, np.int64, is_empty),
        right=_of_sequences(right, padding, np.bool_, is_empty),
        base_logprobs=shifted_logprobs("base_logprobs"),
    )


@dataclass(frozen=True, slots=True)
class _Pack:
    """Where samples lie in a microbatch."""

    # int32 [S+1], the borders of the sequences, those of the padding included.
    cu_seqlens: Ints
    # The number of tokens of samples. What follows them is padding.
    num_tokens: int
    # Whether the last sequence is padding.
    has_padding: bool

    def packed(self, columns: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        """Return the columns [L, ...] of all samples end to end, [T, ...], zeros as padding."""
        # Padding has zeros everywhere. As token ids they are token 0, which every vocabulary has.
        rest = columns[0].shape[1:] if columns else ()
        flat = np.zeros((int(self.cu_seqlens[-1]), *rest), dtype=dtype)
        if columns:
            flat[: self.num_tokens] = np.concatenate(columns)
        return flat

    def shifted(self, columns: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        """Return the packed columns, moved one position to the front."""
        flat = np.roll(self.packed(columns, dtype), -1, axis=0)
        # The shift has brought the next sequence's first token to the last position of each
        # sequence, and the first of all to the end. A loss there would teach the student to predict
        # one response from another.
        flat[self.cu_seqlens[1:] - 1] = 0
        return flat

    def position_ids(self) -> NDArray[np.int64]:
        """Return the position of each token in its own sequence, int64 [T]."""
        # Attention stays within a sequence, so its rotary embeddings count from its own start.
        starts = np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))
        return np.arange(int(self.cu_seqlens[-1]), dtype=np.int64) - starts


def _pack_of(lengths: list[int], pad_multiple: int) -> _Pack:
    assert all(lengths), "a sample has at least one token"
    num_tokens = sum(lengths)
    padding_len = -num_tokens % pad_multiple if lengths else pad_multiple
    if padding_len:
        lengths = [*lengths, padding_len]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return _Pack(cu_seqlens, num_tokens, has_padding=bool(padding_len))


def _of_sequences(
    values: list[Any], padding: list[int], dtype: type[np.generic], is_empty: bool
) -> NDArray[Any] | None:
    """Return a value of each sequence, or None where the samples of a microbatch have none."""
    return np.array([*values, *padding], dtype=dtype) if values or is_empty else None


def _column(samples: Sequence[Sample], name: str) -> list[Any]:
    """Return a field of every sample, or an empty list if no sample has it."""
    columns = [column for sample in samples if (column := getattr(sample, name)) is not None]
    # Zeros for those that lack it would be log-probabilities of 0: a teacher that is certain.
    if columns and len(columns) != len(samples):
        raise DataError(
            f"only {len(columns)} of {len(samples)} samples of a microbatch have {name}",
            where="batch",
            remedy=f"give {name} for all samples, or for no sample",
        )
    return columns


def _shifted_top(pack: _Pack, tops: list[TopK]) -> TopK | None:
    if not tops:
        return None
    widths = {top.ids.shape[1] for top in tops}
    if len(widths) > 1:
        raise DataError(
            f"one microbatch has top-K scores of several sizes: K is {sorted(widths)}",
            where="batch",
            remedy="set score.top_k to one value and run the score stage again",
        )
    return TopK(
        pack.shifted([top.ids for top in tops], np.int32),
        pack.shifted([top.logprobs for top in tops], np.float32),
        pack.shifted([top.tail_logprob for top in tops], np.float32),
    )
