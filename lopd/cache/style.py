"""Cross-fitted style residualisation (Lightning OPD 2.0, arXiv 2607.28449): what to do when the OPD
teacher is not the SFT teacher.

d = log pi_T - log pi_ref of every response token mixes evidence (this token is better than the
student thinks) with style (this teacher says "so", the other said "thus", whatever the question).
Style is what the token's id, its position and its surprisal predict for OTHER prompts. So the
rollouts are split into folds by prompt; for a fold, two tables are fitted on the other folds, each
response having total weight 1:

    by token id, and by (bin of position t / R) x (bin of surprisal -log pi_ref);   a cell is (sum of w d + s * mean) / (sum of w + s)

with ``mean`` the mean of d over those folds and s the smoothing, in responses; an unseen cell is
the mean. b = 0.5 * token table + 0.5 * context table, and log pi_T - b replaces log pi_T. Fitted
in-sample, a table would also learn the evidence of the very response it corrects and take it away.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
OVER_NATS = 1.0  # a deviation above this is reported


@dataclass(frozen=True, slots=True)
class Settings:
    """folds: by prompt. smoothing: responses that speak for the mean in every cell. token_share:
    weight of the token table in b. seed: of the folds.
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
    """Flat columns of some responses' tokens. row: index of the response within this batch; weights
    1 / R, so that each response counts once.
    """

    token_ids: I64  # [N]
    deviation: F64  # [N], d
    cell: I64  # [N], of the context table
    weight: F64  # [N]
    row: I64  # [N]
    fold: I64  # [rows]


def surprisal_edges(bins: int) -> F64:
    """Inner edges in nats, geometric from 0.01 to 8: [bins - 1]. Fixed, so that no datum of a fold
    moves them.
    """
    return np.geomspace(0.01, 8.0, bins - 1) if bins > 1 else np.zeros(0)


def prepare(
    token_ids: NDArray[Any],
    teacher: NDArray[Any],
    reference: NDArray[Any],
    lengths: NDArray[Any],
    fold: NDArray[Any],
    settings: Settings,
) -> Tokens:
    """token_ids, teacher and reference log-probabilities [N]; lengths [rows]; fold [rows]."""
    lengths = lengths.astype(np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    position = (np.arange(len(row)) - starts[row]) / lengths[row]
    position_bin = np.minimum(
        (position * settings.position_bins).astype(np.int64), settings.position_bins - 1
    )
    surprisal_bin = np.searchsorted(
        surprisal_edges(settings.surprisal_bins), -reference.astype(np.float64), side="right"
    )
    return Tokens(
        token_ids=token_ids.astype(np.int64),
        deviation=teacher.astype(np.float64) - reference,
        cell=position_bin * settings.surprisal_bins + surprisal_bin,
        weight=1.0 / lengths[row],
        row=row,
        fold=fold.astype(np.int64),
    )


class StyleTables:
    """Sums by fold; ``bias`` gives b from all folds but the token's own (or, for comparison only,
    from all of them).
    """

    def __init__(self, settings: Settings, vocab_size: int) -> None:
        self.settings = settings
        cells = settings.position_bins * settings.surprisal_bins
        self._token = np.zeros(
            (2, settings.folds, vocab_size)
        )  # sum of weights, sum of weights times d
        self._context = np.zeros((2, settings.folds, cells))
        self._count = np.zeros(vocab_size, np.int64)

    def add(self, tokens: Tokens) -> None:
        fold = tokens.fold[tokens.row]
        for table, index in ((self._token, tokens.token_ids), (self._context, tokens.cell)):
            flat = fold * table.shape[2] + index
            for part, values in ((0, tokens.weight), (1, tokens.weight * tokens.deviation)):
                table[part] += np.bincount(flat, values, minlength=table[part].size).reshape(
                    table[part].shape
                )
        self._count += np.bincount(tokens.token_ids, minlength=len(self._count))

    def cells(self, table: NDArray[np.float64], *, cross_fitted: bool) -> F64:
        """Smoothed means [folds, cells]; row k from the other folds if cross-fitted, else every row
        from all.
        """
        weight, total = table.sum(1, keepdims=True) - (table if cross_fitted else 0.0)
        weight, total = (np.broadcast_to(part, table.shape[1:]) for part in (weight, total))
        everything = self._token.sum(2)  # [2, folds]
        outside = everything.sum(1, keepdims=True) - (everything if cross_fitted else 0.0)
        outside = np.broadcast_to(outside, everything.shape)
        mean = np.divide(
            outside[1], outside[0], out=np.zeros(outside.shape[1]), where=outside[0] > 0
        )[:, None]
        smoothing = self.settings.smoothing
        seen = weight + smoothing > 1e-12
        means: F64 = np.where(
            seen, (total + smoothing * mean) / np.where(seen, weight + smoothing, 1.0), mean
        )
        return means

    def bias(self, tokens: Tokens, *, cross_fitted: bool = True) -> F64:
        """b [N] of every token."""
        fold = tokens.fold[tokens.row]
        by_token = self.cells(self._token, cross_fitted=cross_fitted)[fold, tokens.token_ids]
        by_context = self.cells(self._context, cross_fitted=cross_fitted)[fold, tokens.cell]
        bias: F64 = (
            self.settings.token_share * by_token + (1 - self.settings.token_share) * by_context
        )
        return bias

    def token_table(self) -> list[dict[str, Any]]:
        """Token ids by how much of all weight they move, most first: mean deviation of the whole
        cache, smoothed, and how often they occur.
        """
        values, weight = self.cells(self._token, cross_fitted=False)[0], self._token[0].sum(0)
        order = np.argsort(-np.abs(values) * weight, kind="stable")
        share = weight / max(weight.sum(), 1e-12)
        return [
            {
                "token_id": int(token),
                "bias": float(values[token]),
                "occurrences": int(self._count[token]),
                "share": float(share[token]),
            }
            for token in order
            if self._count[token]
        ]

    def context_table(self) -> dict[str, Any]:
        """Mean deviation by position (rows) and surprisal (columns), and the share of all weight in
        each cell.
        """
        shape = (self.settings.position_bins, self.settings.surprisal_bins)
        values = self.cells(self._context, cross_fitted=False)[0].reshape(shape)
        weight = self._context[0].sum(0).reshape(shape)
        return {
            "surprisal_edges": surprisal_edges(self.settings.surprisal_bins).tolist(),
            "bias": [
                [float(v) if mass > 0 else None for v, mass in zip(line, masses, strict=True)]
                for line, masses in zip(values, weight, strict=True)
            ],
            "share": (weight / max(weight.sum(), 1e-12)).tolist(),
        }


class Effect:
    """What the correction did: deviation before and after, cross-fitted, and after an in-sample fit
    for comparison.
    """

    def __init__(self) -> None:
        self.tokens, self._sums = (
            0,
            dict.fromkeys(
                (
                    "over_before",
                    "over_after",
                    "abs_before",
                    "abs_after",
                    "square_before",
                    "square_after",
                    "square_in_sample",
                ),
                0.0,
            ),
        )
        self.responses, self.mean_before, self.mean_after = 0, 0.0, 0.0

    def add(self, tokens: Tokens, bias: F64, in_sample: F64) -> None:
        before, after = tokens.deviation, tokens.deviation - bias
        self.tokens += len(before)
        self.responses += len(tokens.fold)
        self.mean_before += float((tokens.weight * before).sum())
        self.mean_after += float((tokens.weight * after).sum())
        for name, values in (("before", before), ("after", after)):
            self._sums[f"over_{name}"] += float((np.abs(values) > OVER_NATS).sum())
            self._sums[f"abs_{name}"] += float(np.abs(values).sum())
            self._sums[f"square_{name}"] += float((values**2).sum())
        self._sums["square_in_sample"] += float(((tokens.deviation - in_sample) ** 2).sum())

    def as_json(self) -> dict[str, float]:
        """Shares of tokens with |deviation| over 1 nat; mean |deviation|; mean over responses; root
        mean square, also after an in-sample fit (the leak).
        """
        tokens, responses = max(1, self.tokens), max(1, self.responses)
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
