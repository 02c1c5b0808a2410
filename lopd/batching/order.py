"""The order in which responses are learned from: known for every step without state, so a run
resumes at any step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ResponseOrder:
    """A fresh permutation of num_responses per epoch, cut into batches of batch_size that run on
    over the borders of epochs.

    Every response comes exactly once per epoch. The same (num_responses, seed) gives the same order
    on every machine and numpy version.
    """

    num_responses: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_responses < 1 or self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                f"order needs num_responses >= 1, batch_size >= 1, seed >= 0, got {self.num_responses}, {self.batch_size}, {self.seed}"
            )

    def batch_indices(self, step: int) -> NDArray[np.int64]:
        """Indices of the responses of this step (from 0), int64 [batch_size]. Distinct unless the
        batch crosses into another epoch.
        """
        assert step >= 0, step
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        for epoch in range(start // self.num_responses, (stop - 1) // self.num_responses + 1):
            first = epoch * self.num_responses
            parts.append(
                epoch_permutation(self.num_responses, self.seed, epoch)[
                    max(start - first, 0) : stop - first
                ]
            )
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """How many times the data has been seen when this step begins."""
        return step * self.batch_size / self.num_responses


@functools.lru_cache(maxsize=4)
def epoch_permutation(num_responses: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of one epoch, int64 [num_responses], read-only."""
    # Ranks of raw PCG64 words: numpy promises the raw stream for ever, but not the algorithm of
    # Generator.permutation.
    words = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_responses)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order
