"""Losses on packed log-probabilities: pure torch, no torch.distributed, no Megatron.

The package is written for teams that have their own training stack. Nothing here starts a process
or calls a collective. In a Megatron-Core loss function with ``calculate_per_token_loss``:

    objective = Lightning(advantage_clip=10.0, aggregation="response_mean")
    # logprobs: float32 [T] of the labels, with gradient. batch: a TokenBatch.
    output = objective(logprobs, batch)
    return output.loss_sum, output.num_items, output.metric_sums

- ``TokenBatch`` holds the mask, the sequence borders and the cached log-probabilities. They are
  shifted already: index t belongs to the label of position t. ``TokenBatch.from_microbatch`` takes
  what ``lopd.batching.build_microbatch`` builds.
- ``Lightning`` is Lightning OPD as a Huber loss. Its negative gradient is the method's update, and
  it needs one forward and one backward pass.
- ``Distillation`` combines a token loss (``Lightning``, ``TopKKL``) with options. ``Prefix``,
  ``DropTruncated`` and ``DropWrong`` select the tokens that carry loss. ``TruncatedImportance``,
  ``EarlyTokenGain``, ``StepDivergence`` and ``WrongWeight`` weight each token. ``VerdictReward``
  and ``Delta`` shift its advantage. ``ReferenceKL`` pulls the student back to the policy that
  sampled the rollouts. docs/objectives.md says when to use which.
- ``objective_from_config`` returns the objective of a configuration. It refuses combinations that
  mean nothing, and gives the reason.
- ``Supervised`` is the negative log-likelihood, for the SFT that comes before distillation.
- ``Objective`` and ``LossOutput`` are the protocol, for objectives of your own. An objective
  returns sums only. The loss of a step is the sum of ``loss_sum`` divided by the sum of
  ``num_items``, both over all microbatches and all data-parallel ranks. So neither the packing nor
  the number of ranks changes the loss.
- ``RefreshRule`` decides from the metrics of a step whether the responses are too old
  (docs/refresh.md).
- ``reduce_metrics`` turns the globally added ``metric_sums`` into the values to report: means,
  spreads, the effective sample share. It is pure Python.
- ``token_weights`` expresses the three aggregations as one weight per token, to build a loss with.
- ``reverse_kl_terms`` is the non-negative estimator of KL(student || teacher) from frozen samples.

A sequence must lie in one microbatch with all its log-probabilities. Where context parallelism has
split a sequence, gather its log-probabilities first.
"""

from lopd.objective.aggregation import Aggregation, token_weights
from lopd.objective.delta import Delta
from lopd.objective.distillation import Distillation, TokenLoss
from lopd.objective.drift import RefreshRule
from lopd.objective.estimators import reverse_kl_terms, token_importance
from lopd.objective.interface import LossOutput, Objective, TokenBatch, reduce_metrics
from lopd.objective.lightning import Lightning
from lopd.objective.reference import ReferenceKL
from lopd.objective.registry import needs_top_k, needs_verdicts, objective_from_config
from lopd.objective.selection import DropTruncated, Prefix
from lopd.objective.steps import StepDivergence
from lopd.objective.supervised import Supervised
from lopd.objective.top_k import TopKKL
from lopd.objective.verdicts import DropWrong, VerdictReward, WrongWeight
from lopd.objective.weighting import EarlyTokenGain, TruncatedImportance

__all__ = [
    "Aggregation",
    "Delta",
    "Distillation",
    "DropTruncated",
    "DropWrong",
    "EarlyTokenGain",
    "Lightning",
    "LossOutput",
    "Objective",
    "Prefix",
    "ReferenceKL",
    "RefreshRule",
    "StepDivergence",
    "Supervised",
    "TokenBatch",
    "TokenLoss",
    "TopKKL",
    "TruncatedImportance",
    "VerdictReward",
    "WrongWeight",
    "needs_top_k",
    "needs_verdicts",
    "objective_from_config",
    "reduce_metrics",
    "reverse_kl_terms",
    "token_importance",
    "token_weights",
]
