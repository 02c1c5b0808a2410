"""Common chunks of two tokenizations, and sums distributed over tokens."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lopd.tasks.alignment import chunk_sums, common_chunks, distribute

TEXTS = st.text(min_size=1, max_size=60).map(str.encode)


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    """One text, cut into tokens in two ways, also inside a character."""
    text = draw(TEXTS)
    return _cut(draw, text), _cut(draw, text)


def _cut(draw: st.DrawFn, text: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(1, max(1, len(text) - 1)))) - {len(text)})
    bounds = [0, *places, len(text)]
    return [text[low:high] for low, high in itertools.pairwise(bounds)]


def joined(pieces: list[bytes], ends: np.ndarray, chunk: int) -> bytes:
    start = int(ends[chunk - 1]) if chunk else 0
    return b"".join(pieces[start : int(ends[chunk])])


@given(two_cuts())
def test_chunks_are_the_shortest_common_segments(cuts: tuple[list[bytes], list[bytes]]) -> None:
    first, second = cuts
    chunks = common_chunks(first, second)
    assert chunks.same.all()
    assert (int(chunks.first_ends[-1]), int(chunks.second_ends[-1])) == (len(first), len(second))
    for chunk in range(len(chunks.same)):
        assert joined(first, chunks.first_ends, chunk) == joined(second, chunks.second_ends, chunk)
    # Computed the plain way: the offsets at which both cut.
    ends = [set(np.cumsum([len(piece) for piece in side]).tolist()) for side in (first, second)]
    assert len(chunks.same) == len(ends[0] & ends[1])


@given(two_cuts(), st.randoms(use_true_random=False))
def test_sums_agree_in_every_chunk(
    cuts: tuple[list[bytes], list[bytes]], random: np.random.Generator
) -> None:
    student, teacher = cuts
    chunks = common_chunks(student, teacher)
    theirs = np.array([-9 * random.random() for _ in teacher])
    own = np.array([-9 * random.random() for _ in student])
    sums = chunk_sums(theirs, chunks.second_ends)
    parts = distribute(sums, chunks.first_ends, own)
    assert (parts <= 0).all()
    np.testing.assert_allclose(chunk_sums(parts, chunks.first_ends), sums, rtol=1e-6, atol=1e-6)
    # All tokens of a chunk are pushed the way in which the teacher differs from the student.
    differs = sums - chunk_sums(own, chunks.first_ends)
    direction = np.repeat(np.sign(differs), chunks.first_sizes)
    clear = np.repeat(np.abs(differs) > 1e-3, chunks.first_sizes)
    assert ((parts - own) * direction >= -1e-5)[clear].all()


def test_a_shifted_alignment_is_noticed() -> None:
    """The control of the test above: sums at cuts that are one token off do not agree."""
    student = [b"un", b"able", b" to", b" go"]
    teacher = [b"una", b"ble", b" ", b"to", b" go"]
    chunks = common_chunks(student, teacher)
    theirs = np.array([-1.0, -2.0, -4.0, -8.0, -16.0])
    own = np.full(4, -1.0)
    right = distribute(chunk_sums(theirs, chunks.second_ends), chunks.first_ends, own)
    assert right.tolist() == [-1.5, -1.5, -12.0, -16.0]
    shifted = np.minimum(chunks.second_ends + 1, len(teacher))
    wrong = distribute(chunk_sums(theirs, shifted), chunks.first_ends, own)
    assert chunk_sums(wrong, chunks.first_ends).tolist() != [-3.0, -12.0, -16.0]


def test_one_token_for_one_keeps_the_teachers_value_to_the_bit() -> None:
    values = np.array([-0.1, -1e-9, -30.0], np.float32)
    ends = np.arange(1, 4)
    own = np.array([-1.0, 0.0, np.nan])
    assert distribute(chunk_sums(values, ends), ends, own).tolist() == values.tolist()


def test_equal_parts_where_the_student_gives_no_proportions() -> None:
    ends = np.array([2, 4])
    parts = distribute(np.array([-3.0, -1.0]), ends, np.array([0.0, 0.0, np.nan, -1.0]))
    assert parts.tolist() == [-1.5, -1.5, -0.5, -0.5]
    # Otherwise in proportion, and with no advantage where the two agree.
    own = np.array([-0.25, -2.75, -0.5, -0.5])
    assert distribute(np.array([-3.0, -1.0]), ends, own).tolist() == own.tolist()


@pytest.mark.parametrize(
    ("first", "second", "first_ends", "second_ends", "same"),
    [
        ([], [], [], [], []),
        ([b"a"], [], [1], [0], [False]),
        # Tokens without bytes go with the token before them.
        ([b"a", b"", b"b"], [b"a", b"b"], [2, 3], [1, 2], [True, True]),
        # At the beginning they go with the token after them.
        ([b"", b"0"], [b"0"], [2], [1], [True]),
        ([b"0"], [b"", b"0"], [1], [2], [True]),
        # A letter and its accent, and the one letter that a normaliser makes of them.
        (
            [b"caf", b"e\xcc\x81", b" au lait"],
            [b"caf", b"\xc3\xa9", b" au", b" lait"],
            [1, 2, 3],
            [1, 2, 4],
            [True, False, True],
        ),
        # The token around the changed bytes has them inside.
        ([b"xe\xcc\x81", b" y"], [b"x\xc3\xa9", b" y"], [1, 2], [1, 2], [False, True]),
        # No common bytes follow, so nothing of the rest can be aligned.
        ([b"a", b"bcd"], [b"a", b"xyz", b"w"], [1, 2], [1, 3], [True, False]),
    ],
)
def test_where_the_texts_differ(
    first: list[bytes],
    second: list[bytes],
    first_ends: list[int],
    second_ends: list[int],
    same: list[bool],
) -> None:
    chunks = common_chunks(first, second)
    found = (chunks.first_ends.tolist(), chunks.second_ends.tolist(), chunks.same.tolist())
    assert found == (first_ends, second_ends, same)


@given(two_cuts(), TEXTS, TEXTS)
def test_only_equal_bytes_are_called_the_same(
    cuts: tuple[list[bytes], list[bytes]], one: bytes, other: bytes
) -> None:
    first = [*cuts[0], one, *cuts[0]]
    second = [*cuts[1], other, *cuts[1]]
    chunks = common_chunks(first, second)
    assert (int(chunks.first_ends[-1]), int(chunks.second_ends[-1])) == (len(first), len(second))
    for chunk in np.flatnonzero(chunks.same):
        assert joined(first, chunks.first_ends, chunk) == joined(second, chunks.second_ends, chunk)
