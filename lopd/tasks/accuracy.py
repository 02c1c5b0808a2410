"""Figures of an evaluation from which samples were right: avg@k, pass@k, intervals. Pure numpy.

``right`` is a list with one entry a problem, each a list of booleans, one a sample. Problems are
the independent units: every spread is over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


def shares(right: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    """[N] share of right samples of each problem; its mean is avg@k (pass@1), k the number of
    samples.
    """
    return np.array([np.mean(np.asarray(samples, bool)) for samples in right], dtype=np.float64)


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """Chance that at least one of k samples, drawn from these without putting back, is right: 1 -
    C(n - c, k) / C(n, k).

    Unbiased for the chance that one of k fresh samples is right (Chen et al. 2021, arXiv
    2107.03374, section 2.1). ValueError: k outside 1..num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} of {num_samples} samples")
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_shares(right: Sequence[Sequence[bool]], k: int) -> NDArray[np.float64]:
    """[N] pass@k of each problem; their mean is pass@k."""
    return np.array(
        [pass_at(len(samples), int(np.sum(samples)), k) for samples in right], dtype=np.float64
    )


def ks_of(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    return sorted(
        {
            *(2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples),
            num_samples,
        }
    )


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean; nan for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def bootstrap_interval(
    values: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, which are drawn with putting back. The same
    values, seed and numpy give the same interval.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // max(1, len(values)))  # numbers in memory at once
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = values[
            rng.integers(0, len(values), (count, len(values)))
        ].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def accuracy_figures(
    right: Sequence[Sequence[bool]], lengths: Sequence[int], truncated: Sequence[bool]
) -> dict[str, Any]:
    """mean (avg@k), standard_error, interval (95%, bootstrap over problems), pass_at {k: share},
    response_len, response_len_quantiles, truncated_share.

    lengths, truncated: of every response, in tokens. Needs at least one problem with a sample.
    """
    means = shares(right)
    fewest = min(len(samples) for samples in right)
    quantiles = np.quantile(np.asarray(lengths), [0.1, 0.5, 0.9, 1.0])
    return {
        "mean": float(means.mean()),
        "standard_error": standard_error(means),
        "interval": list(bootstrap_interval(means)),
        "pass_at": {str(k): float(pass_shares(right, k).mean()) for k in ks_of(fewest)},
        "response_len": float(np.mean(lengths)),
        "response_len_quantiles": dict(
            zip(("0.1", "0.5", "0.9", "1"), (float(value) for value in quantiles), strict=True)
        ),
        "truncated_share": float(np.mean(truncated)),
    }
