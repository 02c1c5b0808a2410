"""Computes the metrics of an evaluation: avg@k, pass@k and their intervals. Pure numpy.

The input ``right`` has one entry per problem: a list of booleans, one per sample, true if the
sample is right. Problems are the independent units, so every spread is over problems. Samples of
one problem depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# Each end of a 95% interval rests on the outer 2.5% of the resamples, which are 250 of these.
RESAMPLES = 10_000
# Numbers of one block of resamples in memory: 16 MB of float64.
_BLOCK_NUMBERS = 2_000_000


def shares(right: Sequence[Sequence[bool]]) -> NDArray[np.float64]:
    """Return the share of right samples of each problem, float64 [N].

    Its mean is avg@k, also called pass@1, where k is the number of samples of a problem.
    """
    # A mean per problem first: problems with more samples must not count more.
    return np.array([np.mean(np.asarray(samples, bool)) for samples in right], dtype=np.float64)


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that at least one of k samples is right.

    The k samples are drawn from the given ones without replacement:
    1 - C(n - c, k) / C(n, k). This is unbiased for the chance that one of k new samples is right
    (Chen et al. 2021, arXiv 2107.03374, section 2.1).

    Args:
        num_samples: The number n of samples of the problem.
        num_right: The number c of right ones.
        k: The number of samples that are drawn, from 1 to ``num_samples``.

    Raises:
        ValueError: k is below 1 or above the number of samples.
    """
    # More draws than samples have no meaning without replacement.
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} is not between 1 and {num_samples}, the number of samples")
    # There are fewer wrong samples than draws, so at least one draw is right.
    if num_samples - num_right < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def pass_shares(right: Sequence[Sequence[bool]], k: int) -> NDArray[np.float64]:
    """Return the pass@k of each problem, float64 [N]. Its mean is pass@k."""
    return np.array(
        [pass_at(len(samples), int(np.sum(samples)), k) for samples in right], dtype=np.float64
    )


def ks_of(num_samples: int) -> list[int]:
    """Return the values of k that are reported: powers of two, and the number of samples."""
    # A number of b bits is at least 2^(b-1), so all these powers are within the samples.
    powers = {2**power for power in range(num_samples.bit_length())}
    return sorted({*powers, num_samples})


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean. It is nan for a single value."""
    # ddof=1: the spread around the mean of the same values is too small by one degree of freedom.
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def bootstrap_interval(
    values: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean over problems.

    The problems are drawn with replacement. The same values, seed and version of numpy give the
    same interval.

    Args:
        values: One number per problem, float64 [N].
        confidence: The share of the resampled means inside the interval.
        resamples: The number of resamples.
        seed: The seed of the draws.

    Returns:
        The lower and the upper end.
    """
    # A generator of its own: the interval must not depend on what else draws random numbers.
    rng = np.random.default_rng(seed)
    # The unit that is drawn is a problem, with all its samples: they are not independent of each
    # other.
    means = np.empty(resamples)
    # One block of resamples at a time: all of them together need gigabytes for many problems.
    block = max(1, _BLOCK_NUMBERS // max(1, len(values)))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        drawn = rng.integers(0, len(values), (count, len(values)))
        means[start : start + count] = values[drawn].mean(axis=1)
    # The same share is cut off at both ends.
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_interval(share: float, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a share of independent trials (Wilson 1927).

    At 0 of 8 it goes from 0 to 0.32. An interval made of the trials' own spread would be empty.

    Args:
        share: The share of successes, 0 to 1.
        count: The number of trials.
        confidence: How often such intervals hold the true share.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # At a share of 0 or 1 rounding would put the end on the other side of it.
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def accuracy_interval(
    means: NDArray[np.float64],
) -> tuple[tuple[float, float], Literal["wilson", "bootstrap"]]:
    """Return the 95% interval of the mean over problems, and how it was made.

    Args:
        means: The share of right samples of each problem, float64 [N].
    """
    is_binary = bool(np.isin(means, (0.0, 1.0)).all())
    # Resamples of equal values are all the same, so a bootstrap would show no uncertainty. Shares
    # between 0 and 1 spread less than verdicts of the same mean, so Wilson's is never too narrow.
    if is_binary or len(np.unique(means)) == 1:
        return wilson_interval(float(means.mean()), len(means)), "wilson"
    return bootstrap_interval(means), "bootstrap"


def response_figures(lengths: Sequence[int], truncated: Sequence[bool]) -> dict[str, Any]:
    """Return the metrics that need no verifier.

    Args:
        lengths: The length of every response, in tokens. At least one.
        truncated: Whether each response was cut off at its limit.

    Returns:
        response_len, response_len_quantiles {quantile: tokens}, truncated_share.
    """
    # Lengths are skewed by a few long answers, which a mean alone would hide.
    quantiles = np.quantile(np.asarray(lengths), [0.1, 0.5, 0.9, 1.0])
    named_quantiles = zip(("0.1", "0.5", "0.9", "1"), quantiles.tolist(), strict=True)
    return {
        "response_len": float(np.mean(lengths)),
        "response_len_quantiles": dict(named_quantiles),
        "truncated_share": float(np.mean(truncated)),
    }


def accuracy_figures(
    right: Sequence[Sequence[bool]], lengths: Sequence[int], truncated: Sequence[bool]
) -> dict[str, Any]:
    """Return all metrics of one evaluation of one model.

    Args:
        right: See the module. At least one problem with at least one sample.
        lengths: The length of every response, in tokens.
        truncated: Whether each response was cut off at its limit.

    Returns:
        mean (avg@k), standard_error, interval (95%, over problems), interval_method ("wilson" or
        "bootstrap"), pass_at {k: share}, and those of response_figures.
    """
    means = shares(right)
    # pass@k needs k samples of every problem, so the problem with the fewest samples limits k.
    fewest = min(len(samples) for samples in right)
    # The method is reported too, because the two intervals of equal figures differ.
    interval, method = accuracy_interval(means)
    return {
        "mean": float(means.mean()),
        "standard_error": standard_error(means),
        "interval": list(interval),
        "interval_method": method,
        "pass_at": {str(k): float(pass_shares(right, k).mean()) for k in ks_of(fewest)},
        **response_figures(lengths, truncated),
    }
