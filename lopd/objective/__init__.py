"""Losses on packed log-probabilities: pure torch, no torch.distributed, no Megatron.

For teams with a training stack of their own: nothing here starts a process or calls a collective.
In a Megatron-Core loss function with ``calculate_per_token_loss``:

    objective = Lightning(advantage_clip=10.0, aggregation="response_mean")
    output = objective(logprobs, batch)                      # logprobs f32[T] of the labels, with gradient; batch: TokenBatch
    return output.loss_sum, output.num_items, output.metric_sums

- ``TokenBatch``: mask, sequence borders and cached log-probabilities, already shifted (index t belongs to the label of position t).
  ``TokenBatch.from_microbatch`` takes what ``lopd.batching.build_microbatch`` builds.
- ``Lightning``: Lightning OPD as a Huber loss; its negative gradient is the method's update, with one forward and one backward pass.
- ``Distillation``: a loss of tokens (``Lightning``, ``TopKKL``) with pieces: ``Prefix``, ``DropTruncated`` (which tokens carry loss),
  ``TruncatedImportance``, ``EarlyTokenGain`` (how much each counts), ``ReferenceKL`` (a pull back
  to the rollouts' policy). docs/objectives.md tells when.
- ``objective_from_config``: the objective of a configuration; combinations that mean nothing are refused with the reason.
- ``Supervised``: negative log-likelihood, for the SFT before it.
- ``Objective``, ``LossOutput``: the protocol of the two, for objectives of your own. Sums only: the loss of a step is the sum of ``loss_sum`` over the sum
  of ``num_items``, both over all microbatches and data-parallel ranks. So neither packing nor the
  number of ranks changes the loss.
- ``RefreshRule``: from a step's figures, whether the responses are too old: docs/refresh.md.
- ``reduce_metrics``: the globally added ``metric_sums`` to the values to report (means, spreads, effective sample share). Pure python.
- ``token_weights``: the three aggregations as one weight per token, to build a loss with.
- ``reverse_kl_terms``: the non-negative estimator of KL(student || teacher) from frozen samples.

A sequence must lie in one microbatch with all its log-probabilities: gather them first where
context parallelism has split it.
"""

from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.distillation import Distillation, TokenLoss
from lopd.objective.drift import RefreshRule
from lopd.objective.estimators import reverse_kl_terms, token_importance
from lopd.objective.interface import LossOutput, Objective, TokenBatch, reduce_metrics
from lopd.objective.lightning import Lightning
from lopd.objective.reference import ReferenceKL
from lopd.objective.registry import needs_top_k, objective_from_config
from lopd.objective.selection import DropTruncated, Prefix
from lopd.objective.supervised import Supervised
from lopd.objective.top_k import TopKKL
from lopd.objective.weighting import EarlyTokenGain, TruncatedImportance

__all__ = [
    "Aggregation",
    "Distillation",
    "DropTruncated",
    "EarlyTokenGain",
    "Lightning",
    "LossOutput",
    "Objective",
    "Prefix",
    "ReferenceKL",
    "RefreshRule",
    "Supervised",
    "TokenBatch",
    "TokenLoss",
    "TopKKL",
    "TruncatedImportance",
    "needs_top_k",
    "objective_from_config",
    "reduce_metrics",
    "reverse_kl_terms",
    "token_importance",
    "token_weights",
]
