"""An objective that combines a token loss with options.

The options say which tokens carry loss, how much each counts, and how strongly the student is
pulled back to the policy that sampled the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lopd.errors import ConfigError
from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.interface import LossOutput, TokenBatch
from lopd.objective.metrics import sums_by_teacher
from lopd.objective.reference import ReferenceKL
from lopd.objective.selection import Selection, apply_selections, end_tokens
from lopd.objective.top_k import TopKKL
from lopd.objective.weighting import Weighting

if TYPE_CHECKING:
    from torch import Tensor


class TokenLoss(Protocol):
    """Lightning, TopKKL, or one of your own."""

    @property
    def aggregation(self) -> Aggregation: ...

    @property
    def advantage_clip(self) -> float: ...

    def token_losses(self, logprobs: Tensor, batch: TokenBatch) -> Tensor:
        """Return the losses [T] with gradient. Loss and gradient are 0 where there is no loss."""
        ...

    def metric_sums(self, logprobs: Tensor, batch: TokenBatch, ends: Tensor) -> dict[str, Tensor]:
        """Return metrics as sums, float64 [] each, with the same keys for every batch.

        Args:
            logprobs: The student's log-probabilities of the labels [T].
            batch: The packed sequences.
            ends: bool [T], the end tokens of responses.
        """
        ...


@dataclass(frozen=True, slots=True)
class Distillation:
    """The sum over tokens of (product of weightings) * loss + reference, aggregated.

    It is divided by the number of tokens, or of responses, that the selections leave. Weightings do
    not change what it is divided by.

    Attributes:
        loss: The loss of each token.
        selections: Rules that take tokens away.
        weightings: Factors of the token losses.
        reference: The pull back to the policy that sampled, if there is one.
        teachers: The names of the teachers, where several teachers scored the responses (one for
            each domain, for example). The loss needs only each token's log-probability by its own
            teacher. The metrics come for each teacher too, as ``X/NAME``.

    Raises:
        ConfigError: The parts do not go together.
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
                f"{names} cannot be used with a top-K KL: token weights are functions of "
                "the sampled token, but a top-K KL is a sum over the teacher's tokens",
                where="objective",
                remedy="set loss = lightning, or remove the token weights",
            )

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """Return the sums of a microbatch.

        Args:
            logprobs: The student's log-probabilities of the labels [T], with gradient.
            batch: The packed sequences.
        """
        # End tokens first. They are the last loss tokens of whole responses; of a prefix that would
        # be a token in the middle of a sentence.
        ends = end_tokens(batch)
        # From here on every sum and mean, the metrics included, is over the selected tokens alone.
        batch = apply_selections(batch, self.selections)
        losses = self.loss.token_losses(logprobs, batch)
        sums = self.loss.metric_sums(logprobs, batch, ends)
        # The factors have no gradient, so each multiplies the gradient of a token's loss as well.
        for weighting in self.weightings:
            losses = losses * weighting(logprobs, batch)
            sums |= weighting.metric_sums(logprobs, batch)
        if self.reference is not None:
            # After the weightings: they say how much the teacher counts, and the pull back to the
            # reference must not become weaker with it.
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
        # The mean is over the tokens that remain after the selections. Divided by all tokens, a
        # prefix of 10% would make the loss, and with it the step, ten times smaller.
        weights, num_items = token_weights(batch, self.loss.aggregation, losses.dtype)
        return LossOutput((weights * losses).sum(), num_items, sums)
