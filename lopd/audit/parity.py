"""How far two engines differ in the log-probabilities of the same tokens.

Two engines that run the same weights differ by rounding, by their kernels and, in mixtures of
experts, by tokens that another expert gets. For on-policy distillation one question matters: how
much does the trainer's policy seem to differ from the policy that sampled, before any update?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lopd.records import Floats, Key

# A response's key, and the log-probabilities [R] of its tokens by the first and the second engine.
Pair: TypeAlias = tuple[Key, Floats, Floats]
# How many responses with the largest differences are named.
WORST = 5


@dataclass(frozen=True, slots=True)
class Agreement:
    """The differences d = second - first over all tokens of some responses, in nats.

    Attributes:
        mean: The mean of |d|. p50, p99 and largest are of |d| too.
        p50: The median.
        p99: The 99th percentile.
        bias: The mean of d.
        k3: The mean of exp(d) - 1 - d, which is never negative. For tokens that the first policy
            sampled it is an estimate of KL(first || second) (Schulman, "Approximating KL
            Divergence", 2020). For other tokens it is only a distance.
        worst: The responses with the largest |d|. Each entry is the key, the number of the token
            within the response, and |d|.
    """

    num_responses: int
    num_tokens: int
    mean: float
    p50: float
    p99: float
    largest: float
    bias: float
    k3: float
    worst: tuple[tuple[Key, int, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics as JSON. Responses are named ``PROMPT_ID/SAMPLE_INDEX``."""
        worst = [
            {"response": f"{key[0]}/{key[1]}", "token": token, "difference": size}
            for key, token, size in self.worst
        ]
        return {
            "num_responses": self.num_responses,
            "num_tokens": self.num_tokens,
            "mean": self.mean,
            "p50": self.p50,
            "p99": self.p99,
            "largest": self.largest,
            "bias": self.bias,
            "k3": self.k3,
            "worst": worst,
        }


def agreement(pairs: Iterable[Pair]) -> Agreement:
    """Compare two engines over all tokens of some responses.

    Raises:
        ValueError: There are no tokens, or a response has two columns of different lengths.
    """
    parts = []
    worst = []
    num_responses = 0
    # The pairs may come from a stream, so they are gone through once.
    for key, first, second in pairs:
        if len(first) != len(second):
            raise ValueError(
                f"response {key} has {len(first)} log-probabilities in one table and "
                f"{len(second)} in the other"
            )
        # In float64, because both values are float32 and nearly equal.
        difference = second.astype(np.float64) - first.astype(np.float64)
        parts.append(difference)
        num_responses += 1
        # One entry per response: a single bad response must not fill the whole list.
        if len(difference):
            token = int(np.abs(difference).argmax())
            worst.append((key, token, float(abs(difference[token]))))
    # Quantiles need all differences at once: 8 bytes per token.
    every = np.concatenate(parts) if parts else np.zeros(0)
    if not every.size:
        raise ValueError("there are no tokens to compare")
    size = np.abs(every)
    return Agreement(
        num_responses=num_responses,
        num_tokens=every.size,
        mean=float(size.mean()),
        p50=float(np.quantile(size, 0.5)),
        p99=float(np.quantile(size, 0.99)),
        largest=float(size.max()),
        bias=float(every.mean()),
        # expm1 keeps the digits of differences near 0, where exp(d) - 1 would lose them.
        k3=float((np.expm1(every) - every).mean()),
        # The sort is stable, so equal differences keep the order of the responses.
        worst=tuple(sorted(worst, key=lambda entry: -entry[2])[:WORST]),
    )
