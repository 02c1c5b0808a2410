"""Which data-parallel rank learns from which samples in which microbatch.

Every rank has the same number of microbatches, ranks have balanced cost, and no microbatch exceeds
the token budget.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd.batching.context import padded_lengths, padding_multiples
from lopd.errors import ConfigError, DataError

Indices: TypeAlias = NDArray[np.int64]
# [rank][microbatch] -> indices of samples
StepPlan: TypeAlias = list[list[Indices]]

# The length in tokens at which a sequence's attention costs about as much as all other work on it.
# For a dense 8B model it is 54k, for a 30B-A3B model 15k. The plan is not sensitive to it.
ATTENTION_LEN = 32768


def sample_costs(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the work of each sample, L + L^2 / ATTENTION_LEN for L tokens.

    The unit is the work of one token without attention.
    """
    lengths = lengths.astype(np.float64)
    return lengths + lengths**2 / ATTENTION_LEN


def microbatch_capacity(max_tokens: int, pad_multiple: int) -> int:
    """Return how many tokens of samples fit into a microbatch.

    Args:
        max_tokens: The largest number of tokens of a microbatch after padding.
        pad_multiple: The multiple to which a microbatch is padded.

    Raises:
        ConfigError: No token fits.
    """
    # Rounded down: a microbatch that is fuller would exceed the budget once it is padded.
    capacity = max_tokens // pad_multiple * pad_multiple
    if capacity == 0:
        raise ConfigError(
            f"max_tokens_per_microbatch = {max_tokens} is too small",
            limit=f"at least {pad_multiple}: with these parallel sizes each microbatch is "
            f"padded to a multiple of {pad_multiple} tokens",
            remedy="raise max_tokens_per_microbatch",
        )
    return capacity


def refuse_too_long(
    lengths: Sequence[int] | Indices,
    max_tokens: int,
    pad_multiple: int = 1,
    names: Sequence[object] | None = None,
    *,
    context: int = 1,
) -> None:
    """Refuse samples that fit into no microbatch.

    Call it on all data before the first step. Otherwise the training ends in the middle, at the
    step whose batch has the sample.

    Args:
        lengths: The number of tokens of each sample.
        max_tokens: The largest number of tokens of a microbatch after padding.
        pad_multiple: The multiple to which a microbatch is padded.
        names: The names of the samples, for the message.
        context: The number of ranks that share a microbatch. Samples are padded for them too
            (lopd.batching.context).

    Raises:
        DataError: A sample is too long.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _, pad_multiple = padding_multiples(context, pad_multiple)
    capacity = microbatch_capacity(max_tokens, pad_multiple)
    # Compared as padded, because the padding takes its share of the budget.
    too_long = np.flatnonzero(padded_lengths(lengths, context) > capacity)
    if not len(too_long):
        return
    first = int(too_long[0])
    longest = int(lengths.max())
    others = ""
    if len(too_long) > 1:
        others = f" (and {len(too_long) - 1} more, the longest of {longest} tokens)"
    # The budget that the longest of all needs, so that one change of the knob is enough.
    needed = -(-longest // pad_multiple) * pad_multiple
    raise DataError(
        f"prompt and response have {lengths[first]} tokens together, which is more than a "
        f"microbatch may have{others}",
        where=f"sample {first if names is None else names[first]}",
        limit=f"at most {capacity} tokens (max_tokens_per_microbatch = {max_tokens}, rounded "
        f"down to a multiple of {pad_multiple})",
        remedy=f"set max_tokens_per_microbatch to at least {needed}, or lower max_new_tokens and "
        "sample again",
    )


def plan_step(
    lengths: Sequence[int] | Indices,
    num_ranks: int,
    max_tokens: int,
    pad_multiple: int = 1,
    *,
    context: int = 1,
) -> StepPlan:
    """Distribute the samples of one step over ranks and microbatches.

    The same input gives the same plan, so every rank computes it alone. Every rank gets the same
    number of microbatches. There are never more than first-fit-decreasing needs. A microbatch is
    empty only if there are fewer samples than microbatches.

    Two microbatches differ by at most the cost of the costliest sample, unless the budget stood in
    the way. The totals of two ranks never differ by more than two microbatches of one round do.

    Args:
        lengths: The number of tokens of each sample [N], at least 1.
        num_ranks: The number of data-parallel ranks.
        max_tokens: The largest number of tokens of a microbatch after padding.
        pad_multiple: The multiple to which a microbatch is padded.
        context: The number of ranks that share each microbatch. The budget then holds after the
            padding of lopd.batching.context too.

    Returns:
        Arrays of sample indices by ``[rank][microbatch]``.

    Raises:
        DataError: A sample is longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert num_ranks >= 1, num_ranks
    assert lengths.ndim == 1, lengths.shape
    assert len(lengths) == 0 or lengths.min() >= 1, "a sample has at least one token"
    refuse_too_long(lengths, max_tokens, pad_multiple, context=context)

    # From here on a sample is as long as it will be in the microbatch.
    lengths = padded_lengths(lengths, context)
    _, pad_multiple = padding_multiples(context, pad_multiple)
    capacity = microbatch_capacity(max_tokens, pad_multiple)
    costs = sample_costs(lengths)
    # Sorted, so that a microbatch keeps the order of the step whatever its packing was.
    bins = _pack(lengths, costs, capacity, num_ranks)
    members = [np.sort(np.array(chosen, dtype=np.int64)) for chosen in bins]
    return _deal(members, costs, num_ranks)


def _pack(
    lengths: Indices, costs: NDArray[np.float64], capacity: int, num_ranks: int
) -> list[list[int]]:
    """Return microbatches of samples. Their number is a multiple of the number of ranks.

    Args:
        lengths: The number of tokens of each sample [N] in the microbatch.
        costs: The work of each sample [N].
        capacity: How many tokens fit into a microbatch.
        num_ranks: The number of data-parallel ranks.
    """
    # Long samples first. A long one at the end would find every microbatch half full, or make one
    # microbatch much costlier than the others.
    longest_first = np.argsort(-lengths, kind="stable").tolist()

    # With expert parallelism the data ranks exchange tokens in every microbatch. A rank with one
    # microbatch less would leave the others waiting for ever, so all have the same number. The
    # number that the tokens alone would need often cannot be packed. First-fit shows one that can.
    tight = _first_fit(lengths.tolist(), longest_first, capacity)
    fewest = max(1, -(-int(lengths.sum()) // (num_ranks * capacity)))
    enough = max(1, -(-len(tight) // num_ranks))
    bins = None
    for per_rank in range(fewest, enough + 1):
        bins = _balanced_fit(
            lengths.tolist(), costs.tolist(), longest_first, capacity, num_ranks * per_rank
        )
        if bins is not None:
            break
    if bins is None:
        # Balancing can fail where first-fit succeeds, as it fills all microbatches evenly and
        # leaves no large gap. An uneven plan is better than one more microbatch for every rank.
        bins = _spread(tight, num_ranks * enough)
    return bins


def _first_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Put each sample into the first microbatch with room, and open one where none has room."""
    # The room left in each microbatch. Entries of microbatches that are not open yet are unused.
    free = np.zeros(len(lengths), dtype=np.int64)
    bins: list[list[int]] = []
    for index in order:
        # argmax of a boolean array is its first True, or 0 if there is none.
        slot = int(np.argmax(free[: len(bins)] >= lengths[index])) if bins else 0
        if slot == len(bins) or free[slot] < lengths[index]:
            slot = len(bins)
            bins.append([])
            free[slot] = capacity
        bins[slot].append(index)
        free[slot] -= lengths[index]
    return bins


def _balanced_fit(
    lengths: list[int], costs: list[float], order: list[int], capacity: int, num_bins: int
) -> list[list[int]] | None:
    """Put each sample into the cheapest of num_bins microbatches that has room.

    Returns None if a sample finds no room.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    # A heap of (cost so far, microbatch). Equal costs are ordered by the number of the microbatch,
    # so the plan is the same on every rank.
    cheapest = [(0.0, slot) for slot in range(num_bins)]
    for index in order:
        full = []
        while cheapest and tokens[cheapest[0][1]] + lengths[index] > capacity:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, slot = cheapest[0]
        heapq.heapreplace(cheapest, (cost + costs[index], slot))
        bins[slot].append(index)
        tokens[slot] += lengths[index]
        # They have no room for this sample, but may have room for a shorter one.
        for entry in full:
            heapq.heappush(cheapest, entry)
    return bins


def _spread(bins: list[list[int]], num_bins: int) -> list[list[int]]:
    """Return num_bins microbatches: new ones take single samples from those that hold most."""
    bins = [list(members) for members in bins]
    while len(bins) < num_bins:
        # From a microbatch with several samples, so that none becomes empty by it.
        fullest = max(bins, key=len, default=[])
        bins.append([fullest.pop()] if len(fullest) > 1 else [])
    return bins


def _deal(bins: list[Indices], costs: NDArray[np.float64], num_ranks: int) -> StepPlan:
    """Deal the microbatches to the ranks, one to each rank per round."""
    bin_costs = [float(costs[members].sum()) for members in bins]
    # By cost, so that the microbatches of a round cost about the same. All ranks run the same round
    # at the same time, and the slowest decides how long it takes.
    costliest_first = sorted(range(len(bins)), key=lambda slot: -bin_costs[slot])
    plan: StepPlan = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        # The costliest of a round goes to the rank with the least so far.
        ranks = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, slot in zip(ranks, costliest_first[start : start + num_ranks], strict=True):
            plan[rank].append(bins[slot])
            totals[rank] += bin_costs[slot]
    return plan
