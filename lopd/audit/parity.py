"""How far two engines' log-probabilities of the same tokens lie apart: the distribution of |d
logprob|, and a KL that it makes of one policy two. Pure numpy.

Two engines that run the same weights differ by rounding, by kernels, and, in mixtures of experts,
by tokens that fall to another expert. What of it matters to on-policy distillation is how much the
trainer's policy seems to differ from the one that sampled before a single update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from lopd.records import Floats, Key

Pair: TypeAlias = tuple[
    Key, Floats, Floats
]  # a response's key and its tokens' log-probabilities by the first and by the second engine, f32[R] each
WORST = 5


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over all tokens of some responses; |d| is the absolute difference of two log-probabilities,
    in nats.

    mean, p50, p99, largest: of |d|. bias: mean of second - first. k3: mean of exp(d) - 1 - d with d
    = second - first, an estimate that is never negative of KL(first || second) for tokens that the
    first policy sampled (Schulman, "Approximating KL Divergence", 2020); of other tokens only a
    distance. worst: the responses with the largest |d|, each with its place in the response.
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
        named = {
            name: getattr(self, name)
            for name in (
                "num_responses",
                "num_tokens",
                "mean",
                "p50",
                "p99",
                "largest",
                "bias",
                "k3",
            )
        }
        return {
            **named,
            "worst": [
                {"response": f"{key[0]}/{key[1]}", "token": place, "difference": size}
                for key, place, size in self.worst
            ],
        }


def agreement(pairs: Iterable[Pair]) -> Agreement:
    """ValueError: no tokens, or two columns of different lengths."""
    parts, worst, num_responses = [], [], 0
    for key, first, second in pairs:
        if len(first) != len(second):
            raise ValueError(f"response {key}: {len(first)} and {len(second)} log-probabilities")
        difference = second.astype(np.float64) - first.astype(np.float64)
        parts.append(difference)
        num_responses += 1
        if len(difference):
            place = int(np.abs(difference).argmax())
            worst.append((key, place, float(abs(difference[place]))))
    every = np.concatenate(parts) if parts else np.zeros(0)
    if not every.size:
        raise ValueError("no tokens")
    size = np.abs(every)
    return Agreement(
        num_responses=num_responses,
        num_tokens=every.size,
        mean=float(size.mean()),
        p50=float(np.quantile(size, 0.5)),
        p99=float(np.quantile(size, 0.99)),
        largest=float(size.max()),
        bias=float(every.mean()),
        k3=float((np.expm1(every) - every).mean()),
        worst=tuple(sorted(worst, key=lambda entry: -entry[2])[:WORST]),
    )
