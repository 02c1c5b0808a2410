"""What every step of a distillation reports, as sums; lopd.objective.reduce_metrics makes the
values of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lopd.objective.aggregation import (
    count_sums,
    loss_tokens_per_sequence,
    on_tokens,
    sequence_sums,
)
from lopd.objective.estimators import reverse_kl_terms, token_importance
from lopd.objective.interface import TokenBatch


@torch.no_grad()
def distillation_sums(
    logprobs: Tensor, batch: TokenBatch, *, advantage_clip: float, ends: Tensor
) -> dict[str, Tensor]:
    """Sums over the tokens that carry loss, float64 [] each; the same keys for every batch, zeros
    where the batch lacks what a figure needs.

    logprobs [T], ends bool [T]: end tokens of responses (see end_tokens). Reported as:
    ``advantage`` and ``advantage_std`` (log pi_T - log pi_theta before the clip, nats),
    ``clipped_share``, ``end_token_advantage`` (its mean on end tokens: negative where the teacher
    would rather go on). With sampling_logprobs: ``reverse_kl`` (see reverse_kl_terms), of w =
    pi_theta / pi_sampling of a token ``weight`` (mean), ``weight_squared``, ``chi_square`` and
    ``effective_sample_share``, and ``sequence_log_weight`` with its ``_std`` (log w of a whole
    response, the sum over its loss tokens: minus its mean estimates KL(pi_sampling || pi_theta) of
    responses), ``gradient_gap`` and ``gradient_gap_bound`` (see _weight_sums). With
    student_entropy: ``student_entropy``.
    """
    assert batch.teacher_logprobs is not None
    mask = batch.loss_mask
    student, teacher = (
        logprobs.double(),
        batch.teacher_logprobs.double(),
    )  # double: sums of squares over millions of tokens
    advantage = torch.where(mask, teacher - student, 0.0)  # [T]
    ends = ends & mask
    sums = count_sums(batch)
    sums["advantage"] = advantage.sum()
    sums["advantage_squared"] = advantage.square().sum()
    sums["clipped"] = (advantage.abs() > advantage_clip).sum(dtype=torch.float64)
    sums["num_end_tokens"] = ends.sum(dtype=torch.float64)
    sums["end_token_advantage"] = torch.where(ends, advantage, 0.0).sum()
    return {**sums, **_weight_sums(student, teacher, batch), **_entropy_sums(batch)}


def _weight_sums(student: Tensor, teacher: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Of w and of what it says about the offline gradient (arXiv 2604.13010, theorem of the
    gradient discrepancy, at the tokens of the rollouts).

    The gradient with fresh tokens at the rollouts' states less the one with the rollouts' own is
    E[(w - 1) A grad log pi], so it is at most G times ``gradient_gap`` = E|(w - 1) A|, which is at
    most ``gradient_gap_bound`` = sqrt(E[A^2] E[(w - 1)^2]); G: the largest norm of a token's grad
    log pi.
    """
    mask, counts = batch.loss_mask, count_sums(batch)
    if batch.sampling_logprobs is None:
        zero = torch.zeros_like(counts["num_tokens"])
        tokens = ("num_weighted_tokens", "reverse_kl", "weight", "weight_squared", "gradient_gap")
        return dict.fromkeys(
            (
                *tokens,
                "num_weighted_responses",
                "sequence_log_weight",
                "sequence_log_weight_squared",
            ),
            zero,
        )
    sampling = batch.sampling_logprobs.double()
    weight = torch.where(mask, token_importance(student, sampling), 0.0)
    sequence = sequence_sums(torch.where(mask, student - sampling, 0.0), batch)  # [S]
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
    """``X/NAME`` for each teacher: the sums over the responses that it scored, its place in
    ``teachers`` being their teacher_index.
    """
    assert batch.teacher_index is not None, "several teachers need teacher_index"
    scored_by = on_tokens(batch.teacher_index, batch)  # [T]
    found: dict[str, Tensor] = {}
    for index, name in enumerate(teachers):
        part = replace(batch, loss_mask=batch.loss_mask & (scored_by == index))
        found |= {
            f"{key}/{name}": value
            for key, value in distillation_sums(
                logprobs, part, advantage_clip=advantage_clip, ends=ends
            ).items()
        }
    return found
