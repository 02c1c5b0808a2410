"""A response of the student as the teacher's tokens, and the teacher's scores brought back.

The teacher has another tokenizer. It scores the text of the response under its own tokenizer, and
its log-probabilities are brought back chunk by chunk (lopd.tasks.alignment). A token to which
nothing can be brought back carries no loss, and its ``Alignment`` says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.cache.token_alignment import Alignment
from lopd.records import Floats, Ints, int32
from lopd.tasks.alignment import Chunks, chunk_sums, common_chunks, distribute
from lopd.tasks.token_bytes import TokenBytes

# How chunks are found and how their log-probabilities are distributed, for the manifest.
METHOD = "byte_chunks_proportional"


@dataclass(frozen=True, slots=True)
class Plan:
    """How the scores of a text come back. C is the number of chunks.

    Attributes:
        token_ids: The text as tokens of the teacher.
        teacher_ends: The end of each chunk among the teacher's tokens.
        student_ends: The end of each chunk among the student's tokens.
        alignment: The ``Alignment`` of each token of the student.
    """

    token_ids: Ints  # [Q]
    teacher_ends: NDArray[np.int64]  # [C]
    student_ends: NDArray[np.int64]  # [C]
    alignment: NDArray[np.int8]  # [R]

    def bring_back(self, teacher_logprobs: NDArray[Any], student_logprobs: NDArray[Any]) -> Floats:
        """Return the teacher's log-probability of each token of the student, float32 [R].

        Args:
            teacher_logprobs: The teacher's, of its own tokens [Q].
            student_logprobs: The student's, of its own tokens [R]. They decide the proportions.

        Tokens that are not aligned have 0. They carry no loss, so it is never read.
        """
        sums = chunk_sums(teacher_logprobs, self.teacher_ends)
        parts = distribute(sums, self.student_ends, student_logprobs)
        # Exactly 0 and not NaN: a NaN would survive a multiplication by a loss mask of 0.
        parts[self.alignment != Alignment.ALIGNED] = 0.0
        return parts

    def within(self, limit: int) -> Plan:
        """Return the plan with at most this number of the teacher's tokens, in whole chunks."""
        if len(self.token_ids) <= limit:
            return self
        # Whole chunks only: the sum over a part of a chunk has no counterpart among the student's
        # tokens.
        num_chunks = int(np.searchsorted(self.teacher_ends, limit, side="right"))
        # Where not even the first chunk fits, a part of it is asked for and not used.
        length = int(self.teacher_ends[num_chunks - 1]) if num_chunks else limit
        first = int(self.student_ends[num_chunks - 1]) if num_chunks else 0
        alignment = self.alignment.copy()
        alignment[first:] = Alignment.TOO_LONG
        ends = np.minimum(self.teacher_ends, length)
        # Where the only chunks that fit have no tokens, one token of the next is asked for.
        ends[-1] = max(1, ends[-1])
        return replace(
            self, token_ids=self.token_ids[: ends[-1]], teacher_ends=ends, alignment=alignment
        )

    def forward(self, student_logprobs: NDArray[Any]) -> Floats:
        """Return the student's log-probabilities on the teacher's tokens, float32 [Q].

        Each chunk's sum is divided into equal parts.

        Args:
            student_logprobs: Of the student's tokens [R].
        """
        sums = chunk_sums(student_logprobs, self.student_ends)
        # NaN stands for proportions that nobody knows. distribute() then uses equal parts.
        return distribute(sums, self.teacher_ends, np.full(len(self.token_ids), np.nan))

    def is_text(self) -> NDArray[np.bool_]:
        """Return for each of the teacher's tokens [Q] whether it is the student's text.

        What the student's tokenizer would cut otherwise is text all the same.
        """
        is_text = np.isin(self.alignment, (Alignment.ALIGNED, Alignment.NOT_CANONICAL))
        sizes = np.diff(self.student_ends, prepend=0)
        # All tokens of a chunk have one reason. A chunk without any of the student's is no text.
        last = np.maximum(self.student_ends - 1, 0)
        of_chunk = is_text[last] & (sizes > 0)
        return np.repeat(of_chunk, np.diff(self.teacher_ends, prepend=0))


def plan_response(
    student: TokenBytes,
    teacher: TokenBytes,
    token_ids: Sequence[int] | NDArray[Any],
    *,
    ends: tuple[int, ...],
    other_end: int,
) -> Plan:
    """Write a response of the student in the teacher's tokens, and align the two.

    Args:
        student: The tokenizer that the response was sampled with.
        teacher: The tokenizer of the model that scores it.
        token_ids: The response [R], with its end token if it has one.
        ends: The student's tokens that end a response.
        other_end: The teacher's token that ends a response. It stands for all of them.
    """
    ids = [int(token) for token in token_ids]
    ended = bool(ids) and ids[-1] in ends
    parts = [*_parts(student, teacher, ids[:-1] if ended else ids)]
    # A response that was cut off may end in the middle of a word, which the teacher would go on
    # with. Its probability for the text so far says nothing about such an end.
    if not ended and parts and parts[-1].chunks.same.size:
        parts[-1].mark_last(Alignment.CUT_OFF)
    if ended:
        # The end of the response means the same to both models, whatever it is called.
        one = np.ones(1, np.int64)
        chunk = Chunks(one, one, np.ones(1, bool))
        parts.append(_Part([other_end], chunk, np.zeros(1, np.int8)))
    # Each part was aligned by itself, so its ends count from its own beginning until now.
    plan = _joined(parts)
    if len(plan.token_ids):
        return plan
    # Tokens without any text. No loss is on them, but a teacher must be asked for something.
    return replace(plan, token_ids=int32([other_end]), teacher_ends=plan.teacher_ends * 0 + 1)


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of ordinary tokens, or one special token."""

    teacher_ids: list[int]
    # The student's tokens are the first side.
    chunks: Chunks
    # Of the student's tokens.
    alignment: NDArray[np.int8]

    def mark_last(self, reason: Alignment) -> None:
        """Give the tokens of the last chunk a reason, if they have none."""
        last = self.alignment[len(self.alignment) - int(self.chunks.first_sizes[-1]) :]
        last[last == Alignment.ALIGNED] = reason


def _parts(student: TokenBytes, teacher: TokenBytes, ids: Sequence[int]) -> Iterator[_Part]:
    """Yield the runs of ordinary tokens and the special tokens of a response, in order."""
    is_first = True
    # Special tokens are no text, so no chunk may reach across one.
    for is_special, group in groupby(ids, student.special.__contains__):
        members = [*group]
        if is_special:
            yield from (_special(student, teacher, token) for token in members)
        else:
            yield _run(student, teacher, members, is_first=is_first)
        is_first = False


def _special(student: TokenBytes, teacher: TokenBytes, token: int) -> _Part:
    """Return a special token as the teacher's token of the same text, or else as plain text."""
    text = student.special[token]
    same = teacher.find_special(text)
    # The teacher must see that something stands here, but its plain text is not what was sampled.
    ids = [same] if same is not None else teacher.encode(text)
    is_same = same is not None
    chunks = Chunks(np.ones(1, np.int64), np.full(1, len(ids), np.int64), np.full(1, is_same))
    reason = Alignment.ALIGNED if is_same else Alignment.SPECIAL
    return _Part(ids, chunks, np.full(1, reason, np.int8))


def _run(student: TokenBytes, teacher: TokenBytes, ids: Sequence[int], *, is_first: bool) -> _Part:
    """Return ordinary tokens as the teacher's tokens of the same text."""
    pieces = student.pieces(ids)
    # As the tokenizer itself decodes: the space that it puts before a text is no part of it.
    if is_first and student.adds_space and pieces[0].startswith(b" "):
        pieces[0] = pieces[0][1:]
    # Bytes that are no character, such as the first half of one, become the replacement character.
    text = b"".join(pieces).decode("utf-8", "replace")
    teacher_ids, teacher_pieces = teacher.encoded(text)
    chunks = common_chunks(pieces, teacher_pieces)
    own_ids, own_pieces = student.encoded(text)
    canonical = _canonical(ids, pieces, own_ids, own_pieces)
    chunk = np.repeat(np.arange(len(chunks.same)), chunks.first_sizes)
    # The teacher's sum belongs to all tokens of a chunk, so one such token spoils the chunk.
    spoilt = np.bincount(chunk, ~canonical, minlength=len(chunks.same)) > 0
    reasons = np.full(len(chunks.same), Alignment.ALIGNED, np.int8)
    reasons[spoilt] = Alignment.NOT_CANONICAL
    reasons[~chunks.same] = Alignment.OTHER_TEXT
    return _Part(teacher_ids, chunks, reasons[chunk])


def _canonical(
    ids: Sequence[int], pieces: Sequence[bytes], own_ids: Sequence[int], own_pieces: Sequence[bytes]
) -> NDArray[np.bool_]:
    """Return for each sampled token whether encoding the text gives that token there."""
    if list(ids) == list(own_ids):
        return np.ones(len(ids), bool)
    chunks = common_chunks(pieces, own_pieces)
    # A chunk of one token on either side shows that the text is cut in the same way there.
    alone = chunks.same & (chunks.first_sizes == 1) & (chunks.second_sizes == 1)
    found = np.zeros(len(ids), bool)
    first = chunks.first_ends[alone] - 1
    second = chunks.second_ends[alone] - 1
    found[first] = np.asarray(ids)[first] == np.asarray(own_ids)[second]
    return found


def _joined(parts: Sequence[_Part]) -> Plan:
    """Return the parts one after the other."""
    teacher_lens = np.array([len(part.teacher_ids) for part in parts], dtype=np.int64)
    student_lens = np.array([len(part.alignment) for part in parts], dtype=np.int64)
    # Where each part begins on either side.
    teacher_starts = np.cumsum(teacher_lens) - teacher_lens
    student_starts = np.cumsum(student_lens) - student_lens
    none = np.zeros(0, np.int64)
    return Plan(
        token_ids=int32([token for part in parts for token in part.teacher_ids]),
        teacher_ends=np.concatenate(
            [none]
            + [start + p.chunks.second_ends for p, start in zip(parts, teacher_starts, strict=True)]
        ),
        student_ends=np.concatenate(
            [none]
            + [start + p.chunks.first_ends for p, start in zip(parts, student_starts, strict=True)]
        ),
        alignment=np.concatenate([none.astype(np.int8), *(part.alignment for part in parts)]),
    )
