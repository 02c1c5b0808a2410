"""What every step of a distillation reports, as sums.

lopd.objective.reduce_metrics turns the sums into values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lopd.deferred import deferred
from lopd.objective.aggregation import (
    count_sums,
    expand_to_tokens,
    loss_tokens_per_sequence,
    sequence_sums,
)
from lopd.objective.estimators import reverse_kl_terms, token_importance
from lopd.objective.interface import TokenBatch, without_gradient
from lopd.objective.quantiles import advantage_counts

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


@without_gradient
def distillation_sums(
    logprobs: Tensor, batch: TokenBatch, *, advantage_clip: float, ends: Tensor
) -> dict[str, Tensor]:
    """Return the metrics of a distillation as sums over the tokens that carry loss.

    The keys are the same for every batch. A sum is 0 if the batch lacks the data for this sum.
    After reduce_metrics they are reported as:

    - ``advantage``, ``advantage_std``: log pi_T - log pi_theta before the clip, in nats.
    - ``advantage_p01``, ``_p05``, ``_p50``, ``_p95``, ``_p99``: its quantiles over tokens (see
      lopd.objective.quantiles).
    - ``clipped_share``: the share of tokens beyond the clip.
    - ``end_token_advantage``: the mean on end tokens. It is negative where the teacher would
      continue the response.
    - With sampling_logprobs, and with w = pi_theta / pi_sampling for each token: ``weight`` is the
      mean of w. ``weight_squared``, ``chi_square`` and ``effective_sample_share`` are functions of
      w.
    - With sampling_logprobs, ``sequence_log_weight`` and its ``_std``: log w of a whole response,
      the sum over its loss tokens. The negative mean estimates
      KL(pi_sampling || pi_theta) of responses.
    - With sampling_logprobs, ``reverse_kl`` (see reverse_kl_terms), ``gradient_gap`` and
      ``gradient_gap_bound`` (see _weight_sums).
    - With student_entropy: ``student_entropy``, in nats.

    Args:
        logprobs: The student's log-probabilities of the labels [T].
        batch: The packed sequences, with teacher_logprobs.
        advantage_clip: The bound of the advantage, in nats.
        ends: bool [T], the end tokens of responses (see end_tokens).

    Returns:
        float64 [] each, by name.
    """
    assert batch.teacher_logprobs is not None
    mask = batch.loss_mask
    # float64, because sums of squares over millions of tokens follow.
    student = logprobs.double()
    teacher = batch.teacher_logprobs.double()
    # Before the clip. The clip bounds the update; the metrics must show how far the two really are
    # from each other.
    advantage = torch.where(mask, teacher - student, 0.0)  # [T]
    # A selection may have taken the loss from end tokens. Then they do not count here either.
    ends = ends & mask
    sums = count_sums(batch)
    sums["advantage"] = advantage.sum()
    sums["advantage_squared"] = advantage.square().sum()
    sums["clipped"] = (advantage.abs() > advantage_clip).sum(dtype=torch.float64)
    # A count of its own: a truncated response has no end token, so the mean is over fewer
    # responses.
    sums["num_end_tokens"] = ends.sum(dtype=torch.float64)
    sums["end_token_advantage"] = torch.where(ends, advantage, 0.0).sum()
    return {
        **sums,
        **advantage_counts(advantage, mask),
        **_weight_sums(student, teacher, batch),
        **_entropy_sums(batch),
    }


def _weight_sums(student: Tensor, teacher: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Return the sums of w, and of what w says about the offline gradient.

    ``gradient_gap`` is E|(w - 1) A|, and ``gradient_gap_bound`` is sqrt(E[A^2] E[(w - 1)^2]). The
    source is the theorem on the gradient discrepancy in arXiv 2604.13010.
    """
    # Take the gradient with fresh tokens at the states of the rollouts, and subtract the gradient
    # with the rollouts' own tokens. The difference is E[(w - 1) A grad log pi]. So its norm is at
    # most G * E|(w - 1) A|, where G is the largest norm of a token's grad log pi. By Cauchy-Schwarz
    # E|(w - 1) A| is at most sqrt(E[A^2] E[(w - 1)^2]).
    mask = batch.loss_mask
    counts = count_sums(batch)
    if batch.sampling_logprobs is None:
        # The keys must be the same on every rank: the trainer all-reduces the sums as one vector.
        zero = torch.zeros_like(counts["num_tokens"])
        tokens = ("num_weighted_tokens", "reverse_kl", "weight", "weight_squared", "gradient_gap")
        responses = (
            "num_weighted_responses",
            "sequence_log_weight",
            "sequence_log_weight_squared",
        )
        return dict.fromkeys((*tokens, *responses), zero)
    sampling = batch.sampling_logprobs.double()
    # The weight of a token is its ratio alone. The ratio of a whole response is the product, whose
    # logarithm follows below.
    weight = torch.where(mask, token_importance(student, sampling), 0.0)  # [T]
    log_weight = torch.where(mask, student - sampling, 0.0)  # [T]
    sequence = sequence_sums(log_weight, batch)  # [S]
    # A difference of running sums of floats can leave rounding where a sequence adds only zeros.
    sequence = torch.where(loss_tokens_per_sequence(batch) > 0, sequence, 0.0)
    return {
        "num_weighted_tokens": counts["num_tokens"],
        "reverse_kl": torch.where(mask, reverse_kl_terms(student, teacher, sampling), 0.0).sum(),
        "weight": weight.sum(),
        "weight_squared": weight.square().sum(),
        "gradient_gap": torch.where(mask, (weight - 1.0) * (teacher - student), 0.0).abs().sum(),
        "num_weighted_responses": counts["num_responses"],
        "sequence_log_weight": sequence.sum(),
        "sequence_log_weight_squared": sequence.square().sum(),
    }


def _entropy_sums(batch: TokenBatch) -> dict[str, Tensor]:
    if batch.student_entropy is None:
        zero = torch.zeros((), dtype=torch.float64, device=batch.loss_mask.device)
        return {"num_entropy_tokens": zero, "student_entropy": zero}
    entropy = torch.where(batch.loss_mask, batch.student_entropy.double(), 0.0)
    return {
        "num_entropy_tokens": batch.loss_mask.sum(dtype=torch.float64),
        "student_entropy": entropy.sum(),
    }


def sums_by_teacher(
    logprobs: Tensor,
    batch: TokenBatch,
    *,
    advantage_clip: float,
    ends: Tensor,
    teachers: Sequence[str],
) -> dict[str, Tensor]:
    """Return distillation_sums of each teacher's responses, as ``X/NAME``.

    Args:
        logprobs: The student's log-probabilities of the labels [T].
        batch: The packed sequences, with teacher_index.
        advantage_clip: The bound of the advantage, in nats.
        ends: bool [T], the end tokens of responses.
        teachers: The names of the teachers. A response's teacher_index is a place in this list.
    """
    assert batch.teacher_index is not None, "several teachers need teacher_index"
    # The loss needs no such split: each token has the log-probability of its own teacher. The
    # metrics need it, because the mean over two teachers can hide that one of them disagrees.
    scored_by = expand_to_tokens(batch.teacher_index, batch)  # [T]
    named: dict[str, Tensor] = {}
    # Every teacher comes in every batch, with sums of 0 where it scored nothing in it: the keys
    # must be the same for all microbatches and ranks.
    for index, name in enumerate(teachers):
        part = replace(batch, loss_mask=batch.loss_mask & (scored_by == index))
        sums = distillation_sums(logprobs, part, advantage_clip=advantage_clip, ends=ends)
        named |= {f"{key}/{name}": value for key, value in sums.items()}
    return named
