"""Where teacher and student disagree: by token, by position, by kind of token. One pass.

The deviation of a token is log pi_teacher - log pi_student, in nats, where the student is the model
that has sampled the response. On the rollouts it is the advantage at the start of distill.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lopd.cache.regime import ADVANTAGE_CLIP, FAR
from lopd.records import Floats, Response
from lopd.report.html.entropy import Entropies

# Bins of the fine histogram of deviations: quantiles are exact to half of a bin.
_EDGE = 40.0
_BIN = 0.01
QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# The first tokens, middle and end of a response differ most. Each bin is a tenth of its length.
NUM_POSITIONS = 10
# How many tokens a table shows of each order.
_SHOWN_TOKENS = 40


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """The deviations of one model's responses, as JSON.

    Attributes:
        overall: tokens, mean, mean_abs, over_1, over_far, over_clip (shares of tokens whose
            absolute deviation is beyond 1, FAR and ADVANTAGE_CLIP nats), top_1_percent (the share
            of the sum of absolute deviations that the one percent of largest ones has), quantiles.
        positions: For each tenth of a response [mean, mean absolute deviation], in nats.
        kinds: By kind of token [tokens, mean, share of the sum of absolute deviations].
        tokens: By token id [text, occurrences, mean, share of the sum of absolute deviations].
        entropy: How sure the teacher is (lopd.report.html.entropy); None where it is not known.
    """

    overall: Mapping[str, Any]
    positions: list[list[float | None]]
    kinds: Mapping[str, list[float]]
    tokens: Mapping[int, list[Any]]
    entropy: Mapping[str, Any] | None


class Deviations:
    """Adds up the deviations of a stream of responses, in memory of the size of the vocabulary."""

    def __init__(self) -> None:
        self._bins = np.zeros(2 * round(_EDGE / _BIN) + 1, np.int64)
        # Rows are the count, the sum and the sum of absolute values.
        self._by_position = np.zeros((3, NUM_POSITIONS))
        self._by_token = np.zeros((3, 0))
        self._over_far = 0
        self._over_clip = 0
        self._entropies = Entropies(NUM_POSITIONS, QUANTILES)

    @property
    def num_tokens(self) -> int:
        return int(self._bins.sum())

    @property
    def mean(self) -> float:
        """The mean deviation of all tokens, in nats."""
        return float(self._by_token[1].sum() / max(1, self.num_tokens))

    def quantile(self, share: float) -> float:
        """Return the deviation below which a share of the tokens lies, in nats."""
        below = np.cumsum(self._bins)
        place = int(np.searchsorted(below, share * below[-1]))
        return (place - len(self._bins) // 2) * _BIN

    def add(self, response: Response, scores: Floats, entropy: Floats | None = None) -> None:
        """Add one response.

        Args:
            response: The response.
            scores: The teacher's log-probabilities [R].
            entropy: The teacher's entropy at each token [R], in nats, where it is known.
        """
        deviation = scores.astype(np.float64) - response.sampling_logprobs  # [R]
        # A damaged value would spoil every mean, and tokens without loss, such as those of a tool,
        # have no log-probabilities: the zeros in their place would look like agreement.
        known = np.isfinite(deviation)
        if response.loss_mask is not None:
            known &= response.loss_mask
        deviation = deviation[known]
        if not deviation.size:
            return
        ids = response.token_ids[known]
        edge = len(self._bins) // 2
        bins = np.clip(np.rint(deviation / _BIN), -edge, edge).astype(np.int64) + edge
        self._bins += np.bincount(bins, minlength=len(self._bins))
        self._over_far += int((np.abs(deviation) > FAR).sum())
        self._over_clip += int((np.abs(deviation) > ADVANTAGE_CLIP).sum())
        # Of a response of one token, that token is the first tenth.
        places = np.arange(len(response.token_ids))[known] * NUM_POSITIONS
        positions = places // len(response.token_ids)
        self._by_position += _sums(positions, deviation, NUM_POSITIONS)
        if entropy is not None:
            self._entropies.add(entropy[known], deviation, positions)
        highest = int(ids.max()) + 1
        if highest > self._by_token.shape[1]:
            grown = np.zeros((3, highest))
            grown[:, : self._by_token.shape[1]] = self._by_token
            self._by_token = grown
        self._by_token[:, :highest] += _sums(ids, deviation, highest)

    def figures(self, text_of: Callable[[int], str], is_special: set[int]) -> TokenFigures | None:
        """Return the figures, or None if there was no token.

        Args:
            text_of: The text of one token id.
            is_special: The ids of special tokens.
        """
        if not self.num_tokens:
            return None
        count, total, absolute = self._by_token
        whole = max(float(absolute.sum()), 1e-12)
        ids = np.flatnonzero(count)
        kinds: dict[str, list[float]] = {}
        for token in ids.tolist():
            kind = "special token" if token in is_special else kind_of(text_of(token))
            sums = kinds.setdefault(kind, [0.0, 0.0, 0.0])
            for index, part in enumerate((count, total, absolute)):
                sums[index] += float(part[token])
        shown = _most(absolute, _SHOWN_TOKENS) | _most(count, _SHOWN_TOKENS // 2)
        return TokenFigures(
            self._overall(whole),
            [
                [float(mean / number), float(size / number)] if number else [None, None]
                for number, mean, size in self._by_position.T
            ],
            {
                kind: [number, mean / number, size / whole]
                for kind, (number, mean, size) in kinds.items()
            },
            {token: self._row(token, text_of, whole) for token in sorted(shown)},
            self._entropies.figures(),
        )

    def row_of(self, token: int, text_of: Callable[[int], str]) -> list[Any] | None:
        """Return the figures of one token as in TokenFigures.tokens, or None if it is absent."""
        if token >= self._by_token.shape[1] or not self._by_token[0, token]:
            return None
        return self._row(token, text_of, max(float(self._by_token[2].sum()), 1e-12))

    def _row(self, token: int, text_of: Callable[[int], str], whole: float) -> list[Any]:
        count, total, absolute = (float(value) for value in self._by_token[:, token])
        return [text_of(token), int(count), total / count, absolute / whole]

    def _overall(self, whole: float) -> dict[str, Any]:
        edge = len(self._bins) // 2
        values = np.arange(-edge, edge + 1) * _BIN
        number = self.num_tokens
        quantiles = {str(share): self.quantile(share) for share in QUANTILES}
        # Bins by the absolute value, the largest first: those of -x and x together.
        sizes = self._bins[edge:].copy()
        sizes[1:] += self._bins[edge - 1 :: -1]
        largest = values[edge:][::-1]
        before = np.cumsum(sizes[::-1]) - sizes[::-1]
        taken = np.clip(0.01 * number - before, 0, sizes[::-1])
        binned = max(float((largest * sizes[::-1]).sum()), 1e-12)
        return {
            "tokens": number,
            "mean": self.mean,
            "mean_abs": whole / number,
            "over_1": float(self._bins[np.abs(values) > 1.0].sum() / number),
            "over_far": self._over_far / number,
            "over_clip": self._over_clip / number,
            "top_1_percent": float((largest * taken).sum() / binned),
            "quantiles": quantiles,
        }


def kind_of(text: str) -> str:
    """Return what a token is, by its text. Special tokens are known by their id and not by this."""
    core = text.strip()
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "part of a character"
    if not core:
        return "line break" if "\n" in text else "space"
    if any(character.isdigit() for character in core):
        return "number"
    if any(character.isalpha() for character in core):
        return "beginning of a word" if text[:1].isspace() else "part of a word"
    symbols = {unicodedata.category(character)[0] for character in core}
    return "mathematical or other symbol" if symbols & {"S"} else "punctuation"


def _sums(groups: NDArray[Any], values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """Return count, sum and sum of absolute values of each group, [3, length]."""
    return np.stack(
        [
            np.bincount(groups, minlength=length).astype(np.float64),
            np.bincount(groups, values, minlength=length),
            np.bincount(groups, np.abs(values), minlength=length),
        ]
    )


def _most(values: NDArray[np.float64], count: int) -> set[int]:
    """Return the indices of the largest values above 0."""
    largest = np.argsort(values)[::-1][:count]
    return {int(index) for index in largest if values[index] > 0}
