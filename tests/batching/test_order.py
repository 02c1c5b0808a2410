"""The order of responses is complete, fixed by the seed, and known at any step alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd.batching import ResponseOrder
from lopd.batching.order import epoch_permutation

# Epochs 0 and 1 of 8 responses with seed 17.
RECORDED = ([1, 4, 3, 5, 6, 2, 7, 0], [1, 5, 4, 7, 0, 6, 2, 3])
SIZES = {
    "num_responses": st.integers(1, 60),
    "batch_size": st.integers(1, 80),
    "seed": st.integers(0, 2**31 - 1),
}


@given(**SIZES)
def test_every_response_comes_exactly_once_per_epoch(
    num_responses: int, batch_size: int, seed: int
) -> None:
    order = ResponseOrder(num_responses, batch_size, seed)
    num_steps = -(-3 * num_responses // batch_size)
    stream = np.concatenate([order.batch_indices(step) for step in range(num_steps)])
    for epoch in range(3):
        seen = stream[epoch * num_responses : (epoch + 1) * num_responses]
        assert sorted(seen.tolist()) == list(range(num_responses))


@given(**SIZES, step=st.integers(0, 10**6))
@settings(max_examples=50)
def test_any_step_is_known_without_the_steps_before(
    num_responses: int, batch_size: int, seed: int, step: int
) -> None:
    """A run resumed at this step, in a new process with nothing cached, takes the batch that an
    uninterrupted run takes.
    """
    batch = ResponseOrder(num_responses, batch_size, seed).batch_indices(step)
    assert batch.shape == (batch_size,)
    first = step * batch_size
    expected = []
    for place in range(first, first + batch_size):
        expected.append(
            epoch_permutation(num_responses, seed, place // num_responses)[place % num_responses]
        )
    epoch_permutation.cache_clear()
    again = ResponseOrder(num_responses, batch_size, seed).batch_indices(step)
    assert batch.tolist() == expected == again.tolist()


def test_seed_and_epoch_change_the_order() -> None:
    orders = [
        epoch_permutation(1000, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1))
    ]
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert (order == other).mean() < 0.02, (
                "two unrelated orders share about one place in a thousand"
            )


def test_order_is_the_same_on_every_machine_and_version() -> None:
    """Recorded once; a run that resumes after an upgrade must not see responses twice."""
    assert epoch_permutation(8, 17, 0).tolist() == RECORDED[0]
    assert ResponseOrder(8, 3, 17).batch_indices(2).tolist() == [*RECORDED[0][6:], RECORDED[1][0]]


@pytest.mark.parametrize("sizes", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_responses"):
        ResponseOrder(*sizes)
