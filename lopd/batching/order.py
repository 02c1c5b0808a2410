"""The order in which the trainer learns from the responses.

The order of every step is a function of the seed and the step. It has no state. So a run resumes at
any step, and a checkpoint stores no cursor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ResponseOrder:
    """A fresh permutation of all responses in every epoch, cut into batches.

    A batch may continue over the border of two epochs. Every response comes exactly once per epoch.
    The same num_responses and seed give the same order on every machine and numpy version.
    """

    num_responses: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_responses < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                "order needs num_responses >= 1, batch_size >= 1, seed >= 0, "
                f"got {self.num_responses}, {self.batch_size}, {self.seed}"
            )

    def batch_indices(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the responses of a step, int64 [batch_size].

        They are distinct unless the batch crosses the border of two epochs.

        Args:
            step: The number of the step, from 0.
        """
        assert step >= 0, step
        # Places in the endless sequence of epochs. A last batch of an epoch that is cut short would
        # make the gradient of that step noisier than all others, so batches cross the border.
        start = step * self.batch_size
        stop = start + self.batch_size
        parts = []
        for epoch in range(start // self.num_responses, (stop - 1) // self.num_responses + 1):
            order = epoch_permutation(self.num_responses, self.seed, epoch)
            first = epoch * self.num_responses
            parts.append(order[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """Return how many times the data has been seen when this step begins."""
        return step * self.batch_size / self.num_responses


# A batch touches two epochs at most, unless it is larger than the data.
@functools.lru_cache(maxsize=4)
def epoch_permutation(num_responses: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of one epoch, int64 [num_responses], read-only."""
    # The order is the ranks of raw PCG64 words. numpy guarantees the raw stream for ever, but not
    # the algorithm of Generator.permutation: a new numpy would change the order of a resumed run.
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_responses)
    order = np.argsort(words, kind="stable").astype(np.int64)
    # The cache hands the same array to every caller. Writing into it would change the epoch.
    order.setflags(write=False)
    return order
