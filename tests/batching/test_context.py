"""Which tokens each context rank computes: every one of a sample once, in Transformer Engine's
order, and everything comes back to its place.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lopd.batching import build_microbatch, plan_step, refuse_too_long
from lopd.batching.context import ContextPart, context_part, padded_lengths, padding_multiples
from lopd.errors import ConfigError, DataError
from lopd.records import Microbatch, Sample

LENGTHS = st.lists(st.integers(1, 40), max_size=12)
SIZES = st.sampled_from([2, 3, 4, 8])
TENSOR = st.sampled_from([1, 2, 3, 4])


def microbatch_of(lengths: list[int], tensor: int = 1) -> Microbatch:
    """Tokens 1, 2, 3 and so on."""
    first = np.cumsum([1, *lengths])
    samples = [
        Sample(
            token_ids=np.arange(start, start + length, dtype=np.int32),
            loss_mask=np.ones(length, bool),
        )
        for start, length in zip(first[:-1], lengths, strict=True)
    ]
    return build_microbatch(samples, tensor)


def parts_of(microbatch: Microbatch, size: int, tensor: int = 1) -> list[ContextPart]:
    return [
        context_part(
            microbatch.cu_seqlens, microbatch.num_sequences, rank=rank, size=size, tensor=tensor
        )
        for rank in range(size)
    ]


def returned(parts: list[ContextPart], rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """What every rank has of all ranks' rows."""
    return np.append(np.concatenate(rows), 0)[parts[0].place]


@given(LENGTHS, SIZES, TENSOR)
def test_every_token_of_a_sample_is_on_one_rank_and_nothing_else_is(
    lengths: list[int], size: int, tensor: int
) -> None:
    microbatch = microbatch_of(lengths, tensor)
    parts = parts_of(microbatch, size, tensor)
    tokens = np.concatenate([part.take(microbatch.token_ids) for part in parts])
    assert np.sort(tokens[tokens > 0]).tolist() == list(range(1, sum(lengths) + 1))


@given(LENGTHS, SIZES, TENSOR)
def test_all_ranks_have_as_many_and_tensor_ranks_can_divide_them(
    lengths: list[int], size: int, tensor: int
) -> None:
    parts = parts_of(microbatch_of(lengths, tensor), size, tensor)
    (count,) = {len(part.index) for part in parts}
    assert count > 0
    assert count % tensor == 0
    for part in parts:
        assert part.cu_seqlens.tolist() == parts[0].cu_seqlens.tolist()
        assert part.cu_seqlens[-1] == size * count
        assert part.max_seqlen == np.diff(part.cu_seqlens).max()
        assert not (np.diff(part.cu_seqlens) % (2 * size)).any()
        assert (np.diff(part.cu_seqlens) > 0).all()
        assert part.place.tolist() == parts[0].place.tolist()


@given(LENGTHS, SIZES, TENSOR)
def test_each_rank_has_two_chunks_of_every_sequence_of_the_beginning_and_of_the_end(
    lengths: list[int], size: int, tensor: int
) -> None:
    """Written down once more, by loops."""
    microbatch = microbatch_of(lengths, tensor)
    for rank, part in enumerate(parts_of(microbatch, size, tensor)):
        expected: list[int] = []
        for index, (start, end) in enumerate(
            zip(part.cu_seqlens[:-1].tolist(), part.cu_seqlens[1:].tolist(), strict=True)
        ):
            chunk = (end - start) // (2 * size)
            first = 1 + sum(lengths[:index])
            row = [
                first + place if index < len(lengths) and place < lengths[index] else 0
                for place in range(end - start)
            ]
            expected += (
                row[rank * chunk : (rank + 1) * chunk]
                + row[(2 * size - 1 - rank) * chunk : (2 * size - rank) * chunk]
            )
        assert part.take(microbatch.token_ids).tolist() == expected


@given(LENGTHS, SIZES, TENSOR)
def test_what_ranks_compute_comes_back_to_its_place(
    lengths: list[int], size: int, tensor: int
) -> None:
    microbatch = microbatch_of(lengths, tensor)
    parts = parts_of(microbatch, size, tensor)
    rows = [part.take(microbatch.token_ids) for part in parts]
    assert returned(parts, rows).tolist() == microbatch.token_ids.tolist()
    if lengths:
        assert returned(parts, rows[::-1]).tolist() != microbatch.token_ids.tolist(), (
            "control: ranks in another order"
        )


@given(LENGTHS, SIZES)
def test_labels_cross_no_border(lengths: list[int], size: int) -> None:
    """Cut after the shift, a label is still the token after its own, wherever that token is."""
    microbatch = microbatch_of(lengths)
    for part in parts_of(microbatch, size):
        tokens = part.take(microbatch.token_ids)
        labels = part.take(microbatch.labels)
        assert ((labels == tokens + 1) | (labels == 0)).all()
        assert (
            part.take(np.column_stack([microbatch.labels, microbatch.labels]))[:, 1].tolist()
            == labels.tolist()
        )


def test_one_rank_has_the_microbatch_as_it_stands() -> None:
    microbatch = microbatch_of([5, 2, 7], 4)
    (part,) = parts_of(microbatch, 1, 4)
    assert part.take(microbatch.token_ids).tolist() == microbatch.token_ids.tolist()
    assert part.cu_seqlens is microbatch.cu_seqlens
    assert part.max_seqlen == microbatch.max_seqlen
    assert padding_multiples(1, 4) == (1, 4)


def test_the_example_of_the_module() -> None:
    microbatch = microbatch_of([5, 2])
    first, second = parts_of(microbatch, 2)
    assert first.take(microbatch.token_ids).tolist() == [1, 2, 0, 0, 6, 0]
    assert second.take(microbatch.token_ids).tolist() == [3, 4, 5, 0, 7, 0]
    assert first.cu_seqlens.tolist() == [0, 8, 12]


# ---- the budget ----


@given(LENGTHS, SIZES, TENSOR, st.integers(1, 4))
def test_no_microbatch_is_over_budget_after_the_cut(
    lengths: list[int], size: int, tensor: int, num_ranks: int
) -> None:
    budget = 2 * size * tensor * 20
    microbatches = [
        members
        for rank in plan_step(lengths, num_ranks, budget, tensor, context=size)
        for members in rank
    ]
    assert sorted(int(index) for members in microbatches for index in members) == list(
        range(len(lengths))
    )
    for members in microbatches:
        part = parts_of(microbatch_of([lengths[index] for index in members], tensor), size, tensor)[
            0
        ]
        assert part.cu_seqlens[-1] <= budget


def test_without_context_the_budget_would_be_broken() -> None:
    lengths = [5] * 16  # 8 each for two context ranks
    for context, needed in ((2, 64), (1, 128)):
        (members,) = {len(members) for members in plan_step(lengths, 1, 80, context=context)[0]}
        assert parts_of(microbatch_of([5] * members), 2)[0].cu_seqlens[-1] == needed


def test_a_sample_that_fits_only_uncut_is_refused_with_a_remedy_that_works() -> None:
    refuse_too_long([30], 30)
    with pytest.raises(DataError) as caught:
        refuse_too_long([30], 30, 2, context=4)
    assert "prompt and response have 30 tokens" in str(caught.value)
    assert "at least 32" in str(caught.value)
    refuse_too_long([30], 32, 2, context=4)
    with pytest.raises(ConfigError, match="padded to a multiple of 16 tokens"):
        refuse_too_long([3], 15, 8, context=2)
    assert padded_lengths([1, 8, 9], 4).tolist() == [8, 8, 16]
