"""Quantiles of the advantage over all microbatches and ranks, from sums.

A quantile is no sum. How many tokens are at most at a threshold is one, so each microbatch counts
this for fixed thresholds. The quantiles of a whole step are read from the summed counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lopd.deferred import deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

# The quantiles that are reported, by their name. Most tokens have an advantage near 0, and the
# signal is in the tails.
SHARES = {
    "advantage_p01": 0.01,
    "advantage_p05": 0.05,
    "advantage_p50": 0.5,
    "advantage_p95": 0.95,
    "advantage_p99": 0.99,
}
# Four thresholds in each factor of ten, from 1e-4 to 30 nats, on both sides of 0.
_SIZES = [10 ** (power / 4 - 4) for power in range(23)]
_THRESHOLDS = (*(-size for size in reversed(_SIZES)), 0.0, *_SIZES)
_PREFIX = "advantage_at_most_"


def is_count(name: str) -> bool:
    """Return whether a sum is one of these counts, which are not reported themselves."""
    return name.startswith(_PREFIX)


def advantage_counts(advantage: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how many tokens have at most each advantage.

    Args:
        advantage: In nats [T].
        mask: bool [T], the tokens that count.

    Returns:
        float64 [] each, by name.
    """
    thresholds = torch.tensor(_THRESHOLDS, dtype=advantage.dtype, device=advantage.device)
    # Comparisons with each threshold need no copy to the CPU, as counting by index would.
    below = (advantage <= thresholds[:, None]) & mask  # [thresholds, T]
    counts = below.sum(dim=1, dtype=torch.float64)
    return {f"{_PREFIX}{index}": count for index, count in enumerate(counts.unbind())}


def advantage_quantiles(summed: Mapping[str, float]) -> dict[str, float]:
    """Return the quantiles by their names, or nothing where there are no counts.

    Between two thresholds a quantile is interpolated, and beyond the last one it is that one.

    Args:
        summed: The sums of a step, with ``num_tokens``.
    """
    if f"{_PREFIX}0" not in summed:
        return {}
    counts = [summed[f"{_PREFIX}{index}"] for index in range(len(_THRESHOLDS))]
    return {name: _quantile(counts, share * summed["num_tokens"]) for name, share in SHARES.items()}


def _quantile(counts: list[float], wanted: float) -> float:
    place = next((index for index, count in enumerate(counts) if count >= wanted), None)
    if place is None:
        return _THRESHOLDS[-1]
    if place == 0:
        return _THRESHOLDS[0]
    low, high = _THRESHOLDS[place - 1], _THRESHOLDS[place]
    before = counts[place - 1]
    return low + (high - low) * (wanted - before) / (counts[place] - before)
