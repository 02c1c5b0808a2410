"""Which data-parallel rank learns from which samples in which microbatch: equal numbers of
microbatches, balanced cost, no budget broken.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lopd.batching.context import multiples, padded_lengths
from lopd.errors import ConfigError, DataError

Indices: TypeAlias = NDArray[np.int64]
StepPlan: TypeAlias = list[list[Indices]]  # [rank][microbatch] -> indices of samples

# tokens at which a sequence's attention costs about as much as all the rest (8B dense: 54k;
# 30B-A3B: 15k)
ATTENTION_LEN = 32768


def sample_costs(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Work of each sample in units of one token without attention: L + L^2 / ATTENTION_LEN."""
    lengths = lengths.astype(np.float64)
    return lengths + lengths**2 / ATTENTION_LEN


def microbatch_capacity(max_tokens: int, pad_multiple: int) -> int:
    """Tokens of samples that fit into a microbatch which, padded to pad_multiple, has at most
    max_tokens. ConfigError if none do.
    """
    capacity = max_tokens // pad_multiple * pad_multiple
    if capacity == 0:
        raise ConfigError(
            f"max_tokens_per_microbatch = {max_tokens}",
            limit=f"at least {pad_multiple}, to which this layout pads a microbatch",
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
    """DataError for samples that fit into no microbatch. Worth a call on all data before the first
    step. names: of the samples, for the message.

    context: ranks that share a microbatch, for which samples are padded too
    (lopd.batching.context).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _, pad_multiple = multiples(context, pad_multiple)
    capacity = microbatch_capacity(max_tokens, pad_multiple)
    too_long = np.flatnonzero(padded_lengths(lengths, context) > capacity)
    if len(too_long):
        first = int(too_long[0])
        longest = int(lengths.max())
        others = (
            f" (and {len(too_long) - 1} more, the longest of {longest} tokens)"
            if len(too_long) > 1
            else ""
        )
        raise DataError(
            f"prompt and response have {lengths[first]} tokens{others}",
            where=f"sample {first if names is None else names[first]}",
            limit=f"{capacity} tokens per microbatch (max_tokens_per_microbatch = {max_tokens}, in multiples of {pad_multiple})",
            remedy=f"set max_tokens_per_microbatch to at least {-(-longest // pad_multiple) * pad_multiple}, or make shorter responses (max_new_tokens)",
        )


def plan_step(
    lengths: Sequence[int] | Indices,
    num_ranks: int,
    max_tokens: int,
    pad_multiple: int = 1,
    *,
    context: int = 1,
) -> StepPlan:
    """Samples of one step to ``[rank][microbatch]`` index arrays; equal input gives an equal plan.

    lengths [N]: tokens of each sample, at least 1. max_tokens: bound of a microbatch after padding
    to pad_multiple. Every rank gets the same number of microbatches, few enough that
    first-fit-decreasing would not need fewer. A microbatch is empty only if there are fewer samples
    than microbatches. context: ranks that share each microbatch; then the bound is kept after what
    lopd.batching.context pads, too.

    Balance: microbatches are filled longest sample first, each into the cheapest microbatch with
    room; so two microbatches differ by at most the cost of the costliest sample, unless the budget
    stood in the way. Sorted by cost they are dealt in rounds of num_ranks, the costliest to the
    rank with the least so far; so ranks run microbatches of like cost at the same time, and the
    totals of two ranks never differ by more than two microbatches of one round do. DataError: a
    sample longer than the budget.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert num_ranks >= 1, num_ranks
    assert lengths.ndim == 1, lengths.shape
    assert len(lengths) == 0 or lengths.min() >= 1, "a sample has at least one token"
    refuse_too_long(lengths, max_tokens, pad_multiple, context=context)
    lengths = padded_lengths(lengths, context)
    _, pad_multiple = multiples(context, pad_multiple)
    capacity = microbatch_capacity(max_tokens, pad_multiple)
    costs = sample_costs(lengths)
    longest_first = np.argsort(-lengths, kind="stable").tolist()
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
        bins = _spread(tight, num_ranks * enough)
    return _deal([np.sort(np.array(members, dtype=np.int64)) for members in bins], costs, num_ranks)


def _first_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sample into the first microbatch with room, opening one where none has."""
    free = np.zeros(
        len(lengths), dtype=np.int64
    )  # room left in each microbatch; those not yet opened come after
    bins: list[list[int]] = []
    for index in order:
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
    """Each sample into the cheapest of num_bins microbatches that has room; None where some sample
    finds no room.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens = [0] * num_bins
    cheapest = [(0.0, slot) for slot in range(num_bins)]  # a heap of (cost so far, microbatch)
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
        for entry in full:  # without room for this sample, perhaps with room for a shorter one
            heapq.heappush(cheapest, entry)
    return bins


def _spread(bins: list[list[int]], num_bins: int) -> list[list[int]]:
    """As many microbatches as asked for: the missing ones take single samples from those that hold
    most.
    """
    bins = [list(members) for members in bins]
    while len(bins) < num_bins:
        fullest = max(bins, key=len, default=[])
        bins.append([fullest.pop()] if len(fullest) > 1 else [])
    return bins


def _deal(bins: list[Indices], costs: NDArray[np.float64], num_ranks: int) -> StepPlan:
    """Microbatches to ranks, one each per round, the costliest of a round to the rank with the
    least so far.
    """
    bin_costs = [float(costs[members].sum()) for members in bins]
    costliest_first = sorted(range(len(bins)), key=lambda slot: -bin_costs[slot])
    plan: StepPlan = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(bins), num_ranks):
        ranks = sorted(range(num_ranks), key=lambda rank: totals[rank])
        for rank, slot in zip(ranks, costliest_first[start : start + num_ranks], strict=True):
            plan[rank].append(bins[slot])
            totals[rank] += bin_costs[slot]
    return plan
