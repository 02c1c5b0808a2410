"""Cross-fitted style residualisation (Lightning OPD 2.0, arXiv 2607.28449).

It is for an OPD teacher that is not the SFT teacher. The deviation of a response token,

    d = log pi_T - log pi_ref,

mixes two things. One is evidence: this token is better than the student thinks. The other is style:
this teacher writes "so" where the other wrote "thus", whatever the question is. Style is the part
of d that the token's id, its position and its surprisal predict from OTHER prompts.

The rollouts are split into folds by prompt. For each fold two tables are fitted on the other folds,
with a total weight of 1 for each response. One table is by token id. The other is by
(bin of position t / R) x (bin of surprisal -log pi_ref). A cell is

    (sum of w d + s * mean) / (sum of w + s)

where ``mean`` is the mean of d over those folds and s is the smoothing, in responses. A cell
without tokens is the mean. The bias is

    b = 0.5 * token table + 0.5 * context table

and log pi_T - b replaces log pi_T. A table that was fitted on all folds would also learn the
evidence of the very response that it corrects, and would take it away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
# The share of tokens with a larger deviation is reported.
OVER_NATS = 1.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the style is fitted.

    Attributes:
        folds: The number of groups of prompts.
        smoothing: How many responses every cell counts that have the mean deviation.
        token_share: The weight of the token table in b. The context table has the rest.
        seed: Decides which prompts are in which fold.
    """

    folds: int = 5
    position_bins: int = 10
    surprisal_bins: int = 8
    smoothing: float = 1.0
    token_share: float = 0.5
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of some responses in flat columns. N is the number of tokens.

    Attributes:
        deviation: d in nats.
        cell: The cell of the context table.
        weight: 1 over the tokens of its response, so that each response counts once.
        row: The index of the token's response within this batch.
        fold: The fold of each response.
    """

    token_ids: I64  # [N]
    deviation: F64  # [N]
    cell: I64  # [N]
    weight: F64  # [N]
    row: I64  # [N]
    fold: I64  # [rows]

    def of_rows(self, chosen: NDArray[np.bool_]) -> Tokens:
        """Return the tokens of the chosen responses alone.

        Args:
            chosen: Whether a response is chosen [rows].
        """
        kept = chosen[self.row]
        # The responses are counted anew, without those that are left out.
        number = np.cumsum(chosen) - 1
        return Tokens(
            token_ids=self.token_ids[kept],
            deviation=self.deviation[kept],
            cell=self.cell[kept],
            weight=self.weight[kept],
            row=number[self.row[kept]],
            fold=self.fold[chosen],
        )


def surprisal_edges(bins: int) -> F64:
    """Return the inner edges of the surprisal bins [bins - 1], in nats."""
    # Fixed, from nearly certain tokens to very rare ones. Quantiles of the data would let the fold
    # that is to be corrected move the edges. Geometric, because most tokens are nearly certain.
    return np.geomspace(0.01, 8.0, bins - 1) if bins > 1 else np.zeros(0)


def prepare(
    token_ids: NDArray[Any],
    teacher: NDArray[Any],
    reference: NDArray[Any],
    lengths: NDArray[Any],
    fold: NDArray[Any],
    settings: Settings,
    carries_loss: NDArray[np.bool_] | None = None,
) -> Tokens:
    """Prepare the tokens of some responses for the tables.

    Args:
        token_ids: [N]
        teacher: The teacher's log-probabilities [N], in nats.
        reference: The log-probabilities of the policy that sampled [N], in nats.
        lengths: The number of tokens of each response [rows].
        fold: The fold of each response [rows].
        carries_loss: The tokens that the student wrote and that have scores [N]. The others are
            left out, since they deviate by nobody's style. None means all tokens.
    """
    # In int64, because the sums over a shard may not fit into int32.
    lengths = lengths.astype(np.int64)
    # The number of the response for each token, and the place at which each response begins.
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    # From 0 for the first token to less than 1 for the last.
    position = (np.arange(len(row)) - starts[row]) / lengths[row]
    # Rounding can bring a position near 1 to the number of bins itself.
    last_bin = settings.position_bins - 1
    position_bin = np.minimum((position * settings.position_bins).astype(np.int64), last_bin)
    # "right": a token on an edge belongs to the bin above it. Surprisals below the first edge, also
    # 0, fall into bin 0.
    edges = surprisal_edges(settings.surprisal_bins)
    surprisal_bin = np.searchsorted(edges, -reference.astype(np.float64), side="right")
    kept = np.ones(len(row), bool) if carries_loss is None else carries_loss
    num_kept = np.bincount(row[kept], minlength=len(lengths))
    return Tokens(
        token_ids=token_ids[kept].astype(np.int64),
        # In float64, because the tables add up millions of small numbers.
        deviation=(teacher.astype(np.float64) - reference)[kept],
        cell=(position_bin * settings.surprisal_bins + surprisal_bin)[kept],
        # Otherwise the longest responses would decide what style is.
        weight=1.0 / num_kept[row[kept]],
        row=row[kept],
        fold=fold.astype(np.int64),
    )


class StyleTables:
    """The two tables, as sums by fold. All batches are added first, then bias() is asked for.

    Args:
        vocab_size: Token ids must be below it.
    """

    def __init__(self, settings: Settings, vocab_size: int) -> None:
        self.settings = settings
        # A cell is the position bin times the number of surprisal bins, plus the surprisal bin.
        cells = settings.position_bins * settings.surprisal_bins
        # [2, folds, cells]: the sum of weights, and the sum of weights times d. Kept by fold, so
        # that the sums without one fold are a subtraction and need no second pass.
        self._token = np.zeros((2, settings.folds, vocab_size))
        self._context = np.zeros((2, settings.folds, cells))
        self._count = np.zeros(vocab_size, np.int64)

    def add(self, tokens: Tokens) -> None:
        """Add the tokens of some responses to the sums."""
        fold = tokens.fold[tokens.row]
        # In the order of the first axis of the tables.
        summands = (tokens.weight, tokens.weight * tokens.deviation)
        for table, index in ((self._token, tokens.token_ids), (self._context, tokens.cell)):
            # Fold and cell as one number, because bincount adds up along one dimension.
            cell = fold * table.shape[2] + index
            for sums, values in zip(table, summands, strict=True):
                sums += np.bincount(cell, values, minlength=sums.size).reshape(sums.shape)
        # Plain counts, for people. The fit itself uses weights.
        self._count += np.bincount(tokens.token_ids, minlength=len(self._count))

    def cells(self, table: NDArray[np.float64], *, cross_fitted: bool) -> F64:
        """Return the smoothed means of d in each cell [folds, cells].

        Args:
            table: The sums [2, folds, cells].
            cross_fitted: Row k comes from the other folds. If False, every row comes from all.
        """
        weight, total = _fitted(table, cross_fitted)
        # The mean over all tokens is the same for both tables, because each has every token once.
        all_weight, all_total = _fitted(self._token.sum(2), cross_fitted)
        mean = np.divide(all_total, all_weight, out=np.zeros(len(all_total)), where=all_weight > 0)
        # [folds, 1], so that each row of cells meets the mean of its own fold.
        mean = mean[:, None]
        smoothing = self.settings.smoothing
        # Without smoothing a cell may have nothing to divide by. The threshold is above 0, because
        # the subtraction of a fold leaves a rest of rounding.
        seen = weight + smoothing > 1e-12
        smoothed = (total + smoothing * mean) / np.where(seen, weight + smoothing, 1.0)
        means: F64 = np.where(seen, smoothed, mean)
        return means

    def bias(self, tokens: Tokens, *, cross_fitted: bool = True) -> F64:
        """Return b of every token [N], in nats.

        Args:
            cross_fitted: Whether each value comes from all folds except the fold of its token.
                False is only for a comparison.
        """
        fold = tokens.fold[tokens.row]
        # Each token looks up the row of its own fold, which was fitted on the other folds.
        by_token = self.cells(self._token, cross_fitted=cross_fitted)[fold, tokens.token_ids]
        by_context = self.cells(self._context, cross_fitted=cross_fitted)[fold, tokens.cell]
        share = self.settings.token_share
        bias: F64 = share * by_token + (1 - share) * by_context
        return bias

    def token_table(self) -> list[dict[str, Any]]:
        """Return the bias of each token id that occurs, for people to read.

        Those that change the most come first. The bias is of the whole cache. The share is the part
        of all weight that the token has.
        """
        # Not cross-fitted, so all folds have the same row.
        values = self.cells(self._token, cross_fitted=False)[0]
        weight = self._token[0].sum(0)
        # A rare token with a large bias changes less than a frequent one with a small bias.
        order = np.argsort(-np.abs(values) * weight, kind="stable")
        # The floor keeps an empty cache from a division by zero.
        share = weight / max(weight.sum(), 1e-12)
        return [
            {
                "token_id": int(token),
                "bias": float(values[token]),
                "occurrences": int(self._count[token]),
                "share": float(share[token]),
            }
            # Tokens that never occur have a bias, too: the mean. It is never used.
            for token in order
            if self._count[token]
        ]

    def context_table(self) -> dict[str, Any]:
        """Return the bias by position (rows) and surprisal (columns), for people to read.

        A cell without tokens has None. The share is the part of all weight that a cell has.
        """
        # The same order as in prepare(): the surprisal changes fastest.
        shape = (self.settings.position_bins, self.settings.surprisal_bins)
        values = self.cells(self._context, cross_fitted=False)[0].reshape(shape)
        weight = self._context[0].sum(0).reshape(shape)
        return {
            "surprisal_edges": surprisal_edges(self.settings.surprisal_bins).tolist(),
            "bias": [
                [float(v) if mass > 0 else None for v, mass in zip(line, masses, strict=True)]
                for line, masses in zip(values, weight, strict=True)
            ],
            # A bias in a cell with hardly any weight changes hardly anything.
            "share": (weight / max(weight.sum(), 1e-12)).tolist(),
        }


def _fitted(table: F64, cross_fitted: bool) -> tuple[F64, F64]:
    """Return weight and total for each fold, from sums [2, folds, ...] by fold."""
    # Broadcast instead of computed for each fold, because in-sample all folds have the same sums.
    over_all = table.sum(1, keepdims=True)
    sums = over_all - table if cross_fitted else np.broadcast_to(over_all, table.shape)
    return sums[0], sums[1]


class Effect:
    """What the correction changed: the deviation before it and after it.

    Figures after an in-sample fit are there for a comparison. They are smaller, by the evidence
    that such a fit would take away.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.responses = 0
        self.mean_before = 0.0
        self.mean_after = 0.0
        # Sums over tokens, by what is summed: over, abs or square, before or after.
        self._sums: defaultdict[str, float] = defaultdict(float)

    def add(self, tokens: Tokens, bias: F64, in_sample: F64) -> None:
        """Add the tokens of some responses.

        Args:
            bias: b [N], cross-fitted.
            in_sample: b [N], fitted on all folds.
        """
        before = tokens.deviation
        after = tokens.deviation - bias
        # Everything is added up shard by shard, so the whole cache is never in memory.
        self.tokens += len(before)
        self.responses += len(tokens.fold)
        self.mean_before += float((tokens.weight * before).sum())
        self.mean_after += float((tokens.weight * after).sum())
        for name, values in (("before", before), ("after", after)):
            # The share over 1 nat shows whether few large deviations or many small ones were taken
            # away.
            self._sums[f"over_{name}"] += float((np.abs(values) > OVER_NATS).sum())
            self._sums[f"abs_{name}"] += float(np.abs(values).sum())
            self._sums[f"square_{name}"] += float((values**2).sum())
        # Only the mean square of the in-sample fit is needed: a fit minimises just that.
        self._sums["square_in_sample"] += float(((tokens.deviation - in_sample) ** 2).sum())

    def as_json(self) -> dict[str, float]:
        """Return the statistics in nats, and the shares of tokens with a deviation over 1 nat.

        ``mean_before`` and ``mean_after`` are means over responses, the others over tokens. ``rms``
        is the root of the mean square.
        """
        tokens = max(1, self.tokens)
        responses = max(1, self.responses)
        return {
            "share_over_1_nat_before": self._sums["over_before"] / tokens,
            "share_over_1_nat_after": self._sums["over_after"] / tokens,
            "mean_abs_before": self._sums["abs_before"] / tokens,
            "mean_abs_after": self._sums["abs_after"] / tokens,
            "mean_before": self.mean_before / responses,
            "mean_after": self.mean_after / responses,
            "rms_before": math.sqrt(self._sums["square_before"] / tokens),
            "rms_after": math.sqrt(self._sums["square_after"] / tokens),
            "rms_after_in_sample": math.sqrt(self._sums["square_in_sample"] / tokens),
        }
