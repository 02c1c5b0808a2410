"""Importance weights and divergences estimated from frozen samples, one term per token."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_WEIGHT_CAP = 20.0  # nats; e^20 = 4.9e8


def token_importance(student_logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """w = pi_theta / pi_S of each token [T], from log-probabilities [T]; log w is capped at
    LOG_WEIGHT_CAP so that squares and sums stay finite.
    """
    return (student_logprobs - sampling_logprobs).clamp(max=LOG_WEIGHT_CAP).exp()


def reverse_kl_terms(
    student_logprobs: Tensor, teacher_logprobs: Tensor, sampling_logprobs: Tensor
) -> Tensor:
    """Per-token terms [T] whose mean estimates KL(pi_theta || pi_T) of the next token at the states
    of the rollouts; never negative.

    At one state, let tokens come from the sampling policy pi_S, w = pi_theta / pi_S, A = log pi_T -
    log pi_theta. The term is w * (e^A - 1 - A), and

        E_S[w * (e^A - 1 - A)] = sum pi_theta * (pi_T / pi_theta - 1 - A) = sum pi_T - sum pi_theta
        - sum pi_theta * A = 1 - 1 + KL(pi_theta || pi_T).

    Each term is >= 0 as e^A >= 1 + A. The idea of adding the control variate e^A - 1 is John
    Schulman's ("Approximating KL Divergence", 2020, k3); the weight w moves it from the current
    student, who did not sample, to the frozen samples. The states themselves are not reweighted.
    The mean is unbiased where pi_S is the distribution that was sampled from: temperature 1,
    nothing cut off. At another temperature sampling_logprobs, being at temperature 1, are not the
    sampler's, and the figure is a KL under a tilted choice of tokens: comparable between steps, not
    between temperatures.

    Written as e^(log pi_T - log pi_S) - w - w * A, a tiny w times a huge e^A cannot become 0 * inf.
    Both exponents are capped at LOG_WEIGHT_CAP: first log w, then A at LOG_WEIGHT_CAP - log w
    (which is >= 0, so a term stays >= 0 and only ever shrinks). The caps act on tokens that the
    current student or the teacher holds 4.9e8 times as likely as the sampler did. Give float64: for
    A near 0 the three parts cancel to about A^2 / 2.
    """
    log_weight = (student_logprobs - sampling_logprobs).clamp(max=LOG_WEIGHT_CAP)
    advantage = torch.minimum(teacher_logprobs - student_logprobs, LOG_WEIGHT_CAP - log_weight)
    weight = log_weight.exp()
    terms = (advantage + log_weight).exp() - weight - weight * advantage
    return terms.clamp(min=0.0)  # rounding alone can fall below 0
