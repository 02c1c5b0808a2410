"""Supervised fine-tuning: the negative log-likelihood of the demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lopd.objective.aggregation import Aggregation, count_sums, token_weights
from lopd.objective.interface import LossOutput, TokenBatch


@dataclass(frozen=True, slots=True)
class Supervised:
    """-log pi_theta of every loss token. aggregation: see token_weights. Metrics: ``nll`` (mean
    over tokens, in nats) and ``perplexity``.
    """

    aggregation: Aggregation = "token_mean"

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """logprobs [T] with gradient. The batch's log-probabilities of teacher and sampler are not
        looked at.
        """
        losses = torch.where(batch.loss_mask, -logprobs, 0.0)  # [T]
        weights, num_items = token_weights(batch, self.aggregation, losses.dtype)
        sums = count_sums(batch)
        sums["nll"] = losses.detach().double().sum()
        return LossOutput((weights * losses).sum(), num_items, sums)
