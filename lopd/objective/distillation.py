"""An objective put together from pieces: a loss per token, which tokens carry it, how much each
counts, and a pull back to the rollouts' policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lopd.errors import ConfigError
from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.interface import LossOutput, TokenBatch
from lopd.objective.metrics import sums_by_teacher
from lopd.objective.reference import ReferenceKL
from lopd.objective.selection import Selection, end_tokens, narrowed
from lopd.objective.top_k import TopKKL
from lopd.objective.weighting import Weighting


class TokenLoss(Protocol):
    """Lightning, TopKKL, or one of your own."""

    @property
    def aggregation(self) -> Aggregation: ...

    @property
    def advantage_clip(self) -> float: ...

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """[T] with gradient; 0, with gradient 0, where there is no loss."""
        ...

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        """float64 [] each, the same keys for every batch. ends bool [T]: end tokens of responses."""
        ...


@dataclass(frozen=True, slots=True)
class Distillation:
    """sum over tokens of (product of weightings) * loss + reference, aggregated over the tokens
    that the selections leave.

    What it is divided by counts those tokens or their responses; weightings do not change it.
    teachers: names of the teachers where responses were scored by several (by domain, say); the
    loss needs no more than each token's log-probability by its own teacher, and the metrics come
    for each of them too, as ``X/NAME``. ConfigError: pieces that do not go together.
    """

    loss: TokenLoss
    selections: tuple[Selection, ...] = ()
    weightings: tuple[Weighting, ...] = ()
    reference: ReferenceKL | None = None
    teachers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.loss, TopKKL) and self.weightings:
            names = ", ".join(type(weighting).__name__ for weighting in self.weightings)
            raise ConfigError(
                f"{names} with a top-K KL",
                where="objective",
                limit="token weights are functions of the sampled token, which plays no part in a sum over the teacher's tokens",
                remedy="use the lightning loss, or no token weights",
            )

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """logprobs [T] with gradient."""
        ends = end_tokens(batch)  # of the whole responses
        batch = narrowed(batch, self.selections)
        losses = self.loss.token_losses(logprobs, batch)
        sums = self.loss.metric_sums(logprobs, batch, ends)
        for weighting in self.weightings:
            losses = losses * weighting(logprobs, batch)
            sums |= weighting.metric_sums(logprobs, batch)
        if self.reference is not None:
            losses = losses + self.reference(logprobs, batch)
            sums |= self.reference.metric_sums(logprobs, batch)
        if self.teachers:
            sums |= sums_by_teacher(
                logprobs,
                batch,
                advantage_clip=self.loss.advantage_clip,
                ends=ends,
                teachers=self.teachers,
            )
        weights, num_items = token_weights(batch, self.loss.aggregation, losses.dtype)
        return LossOutput((weights * losses).sum(), num_items, sums)
