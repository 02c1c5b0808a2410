"""How sure the teacher is, where a cache has its entropy: by quantile, place and disagreement."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bins of the fine histogram, in nats. 16 nats is more than any vocabulary has.
_EDGE = 16.0
_BIN = 0.01
# From a token of which the teacher is sure to one of which it knows little, in nats.
_EDGES = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0)


class Entropies:
    """Adds up the teacher's entropy at each token, with the deviations there.

    Args:
        num_positions: Into how many parts a response is cut.
        quantiles: The shares whose quantiles are told.
    """

    def __init__(self, num_positions: int, quantiles: tuple[float, ...]) -> None:
        self._quantiles = quantiles
        self._bins = np.zeros(round(_EDGE / _BIN) + 1, np.int64)
        self._total = 0.0
        # Rows are the count and the sum.
        self._by_position = np.zeros((2, num_positions))
        # Rows are the count, and the sums of the deviation and of its size.
        self._by_size = np.zeros((3, len(_EDGES)))

    def add(
        self, entropy: NDArray[Any], deviation: NDArray[Any], positions: NDArray[np.int64]
    ) -> None:
        """Add the tokens of a response, all of them with known figures [R]."""
        known = np.isfinite(entropy)
        values = entropy[known].astype(np.float64)
        bins = np.clip(np.rint(values / _BIN), 0, len(self._bins) - 1).astype(np.int64)
        self._bins += np.bincount(bins, minlength=len(self._bins))
        self._total += float(values.sum())
        parts = self._by_position.shape[1]
        self._by_position[0] += np.bincount(positions[known], minlength=parts)
        self._by_position[1] += np.bincount(positions[known], values, minlength=parts)
        # A value that rounding has brought below 0 belongs to the first part.
        sizes = np.maximum(np.searchsorted(_EDGES, values, side="right") - 1, 0)
        own = deviation[known]
        for row, weights in enumerate((np.ones(len(own)), own, np.abs(own))):
            self._by_size[row] += np.bincount(sizes, weights, minlength=len(_EDGES))

    def figures(self) -> dict[str, Any] | None:
        """Return the figures as JSON, or None where no entropy is known.

        Returns:
            tokens, mean, quantiles (by share), positions (the mean of each part of a response), and
            sizes: of each range of entropy [its name, tokens, mean deviation, share of the sum of
            absolute deviations]. All in nats.
        """
        number = int(self._bins.sum())
        if not number:
            return None
        below = np.cumsum(self._bins)
        whole = max(float(self._by_size[2].sum()), 1e-12)
        ranges = [f"{start:g} to {end:g}" for start, end in itertools.pairwise(_EDGES)]
        names = [*ranges, f"{_EDGES[-1]:g} and more"]
        return {
            "tokens": number,
            "mean": self._total / number,
            "quantiles": {
                str(share): float(_BIN * np.searchsorted(below, share * number))
                for share in self._quantiles
            },
            "positions": [
                float(total / count) if count else None for count, total in self._by_position.T
            ],
            "sizes": [
                [name, int(count), float(total / count), float(absolute / whole)]
                for name, (count, total, absolute) in zip(names, self._by_size.T, strict=True)
                if count
            ],
        }
