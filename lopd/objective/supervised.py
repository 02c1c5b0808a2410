"""Supervised fine-tuning: the negative log-likelihood of the demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.aggregation import Aggregation, count_sums, token_weights
from lopd.objective.interface import LossOutput, TokenBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@dataclass(frozen=True, slots=True)
class Supervised:
    """-log pi_theta of every loss token.

    The metrics are ``nll``, the mean over tokens in nats, and ``perplexity``.

    Attributes:
        aggregation: How token losses become the loss of a batch; see token_weights.
    """

    aggregation: Aggregation = "token_mean"

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """Return the sums of a microbatch.

        Args:
            logprobs: The student's log-probabilities of the labels [T], with gradient.
            batch: The packed sequences. Their teacher and sampling log-probabilities are not used.
        """
        # where, not a product with the mask: a product would turn an infinite log-probability of a
        # prompt token into nan.
        losses = torch.where(batch.loss_mask, -logprobs, 0.0)  # [T]
        weights, num_items = token_weights(batch, self.aggregation, losses.dtype)
        sums = count_sums(batch)
        # In float64, because the sums of all microbatches and ranks are added up.
        sums["nll"] = losses.detach().double().sum()
        return LossOutput((weights * losses).sum(), num_items, sums)
