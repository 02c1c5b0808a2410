"""An objective that combines a token loss with options.

The options say which tokens carry loss, how much each counts, and how strongly the student is
pulled back to the policy that sampled the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from lopd.deferred import deferred
from lopd.errors import ConfigError
from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.interface import LossOutput, TokenBatch
from lopd.objective.metrics import sums_by_teacher
from lopd.objective.reference import ReferenceKL
from lopd.objective.selection import Selection, apply_selections, end_tokens
from lopd.objective.top_k import TopKKL
from lopd.objective.verdicts import WrongWeight
from lopd.objective.weighting import Weighting

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


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


class Shift(Protocol):
    """Something that is added to the advantage of each token, besides what the teacher says."""

    def __call__(self, batch: TokenBatch) -> Tensor:
        """Return nats [T] without gradient. Tokens without loss may have any value."""
        ...

    def metric_sums(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the metrics of this shift as sums, float64 [] each."""
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
        shifts: What is added to log pi_T before the loss, and so to the advantage, before its
            clip. The metrics are those of the teacher itself, but for ``clipped_share``, and
            ``shifted_advantage`` is the mean advantage with the shifts.

    Raises:
        ConfigError: The parts do not go together.
    """

    loss: TokenLoss
    selections: tuple[Selection, ...] = ()
    weightings: tuple[Weighting, ...] = ()
    reference: ReferenceKL | None = None
    teachers: tuple[str, ...] = ()
    shifts: tuple[Shift, ...] = ()

    def __post_init__(self) -> None:
        # The verdict of a response is the same for every token that might stand in it.
        of_tokens = [one for one in self.weightings if not isinstance(one, WrongWeight)]
        if isinstance(self.loss, TopKKL) and (of_tokens or self.shifts):
            names = ", ".join(type(one).__name__ for one in (*of_tokens, *self.shifts))
            raise ConfigError(
                f"{names} cannot be used with a top-K KL: they are about the advantage of "
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
        shifted = self._shifted(batch)
        # The loss sees the shifted teacher, and the metrics below see the teacher itself.
        losses = self.loss.token_losses(logprobs, shifted)
        sums = self.loss.metric_sums(logprobs, batch, ends)
        if self.shifts:
            sums |= self._shift_sums(logprobs, batch, shifted)
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

    def _shifted(self, batch: TokenBatch) -> TokenBatch:
        """Return the batch with all shifts in teacher_logprobs."""
        for shift in self.shifts:
            # Added to the teacher and not to the loss: so the advantage, its clip and the Huber
            # loss of the residual stay one thing.
            assert batch.teacher_logprobs is not None
            batch = replace(batch, teacher_logprobs=batch.teacher_logprobs + shift(batch))
        return batch

    def _shift_sums(
        self, logprobs: Tensor, batch: TokenBatch, shifted: TokenBatch
    ) -> dict[str, Tensor]:
        """Return what the shifts do to the advantages, and their own metrics, as sums."""
        assert shifted.teacher_logprobs is not None
        residual = shifted.teacher_logprobs.double() - logprobs.detach().double()
        advantage = torch.where(batch.loss_mask, residual, 0.0)
        # The clip acts on the shifted advantage, so this figure replaces the one of the plain
        # advantage.
        beyond = advantage.abs() > self.loss.advantage_clip
        sums = {"shifted_advantage": advantage.sum(), "clipped": beyond.sum(dtype=torch.float64)}
        for shift in self.shifts:
            sums |= shift.metric_sums(batch)
        return sums
