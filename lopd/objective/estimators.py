"""Importance weights and divergences, estimated from frozen samples with one term per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lopd.deferred import deferred

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")


# In nats. e^20 = 4.9e8, whose square, summed over millions of tokens, still fits into a float32.
LOG_WEIGHT_CAP = 20.0


def token_importance(student_logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """Return w = pi_theta / pi_S of each token [T], from log-probabilities [T].

    log w is capped at LOG_WEIGHT_CAP, so that squares and sums stay finite.
    """
    return (student_logprobs - sampling_logprobs).clamp(max=LOG_WEIGHT_CAP).exp()


def reverse_kl_terms(
    student_logprobs: Tensor, teacher_logprobs: Tensor, sampling_logprobs: Tensor
) -> Tensor:
    """Return terms whose mean estimates KL(pi_theta || pi_T) of the next token.

    The estimate is at the states of the rollouts; the states are not reweighted. At one state, let
    the token come from the sampling policy pi_S. With w = pi_theta / pi_S and
    A = log pi_T - log pi_theta the term is w * (e^A - 1 - A), and

        E_S[w * (e^A - 1 - A)] = sum pi_theta * (pi_T / pi_theta - 1 - A)
                               = sum pi_T - sum pi_theta - sum pi_theta * A
                               = 1 - 1 + KL(pi_theta || pi_T)

    Each term is >= 0, because e^A >= 1 + A. The control variate e^A - 1 is John Schulman's
    ("Approximating KL Divergence", 2020, k3). The weight w carries it over from the current
    student, which did not sample, to the frozen samples.

    The mean is unbiased where pi_S is the distribution that was sampled from: temperature 1, and
    nothing cut off. At another temperature the sampling_logprobs, which are at temperature 1, are
    not the sampler's. The result is then a KL under a tilted choice of tokens. It can be compared
    between steps, but not between temperatures.

    Args:
        student_logprobs: log pi_theta [T]. Use float64: for A near 0 the parts of a term cancel to
            about A^2 / 2.
        teacher_logprobs: log pi_T [T].
        sampling_logprobs: log pi_S [T].

    Returns:
        The terms [T], in nats, never negative.
    """
    # Both exponents are capped. Without caps one token that the student or the teacher holds far
    # likelier than the sampler did would decide the mean. The caps act from a ratio of 4.9e8.
    # A is capped at LOG_WEIGHT_CAP - log w, which is >= 0. So a term stays >= 0 and only shrinks.
    log_weight = (student_logprobs - sampling_logprobs).clamp(max=LOG_WEIGHT_CAP)
    advantage = torch.minimum(teacher_logprobs - student_logprobs, LOG_WEIGHT_CAP - log_weight)
    weight = log_weight.exp()
    # w * e^A is one exponential: a tiny w times a huge e^A would become 0 * inf.
    terms = (advantage + log_weight).exp() - weight - weight * advantage
    # Only rounding can bring a term below 0.
    return terms.clamp(min=0.0)
