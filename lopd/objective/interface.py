"""What an objective takes and returns: packed tensors in, sums out.

Only the trainer divides, and only the trainer reduces over microbatches and ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lopd.deferred import deferred
from lopd.errors import DataError
from lopd.objective.quantiles import advantage_quantiles, is_count
from lopd.records import Microbatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = deferred("torch")

P = ParamSpec("P")
R = TypeVar("R")

# The count that a metric is a mean over. Metrics that are missing here are means over num_tokens.
_COUNT_OF = {
    "reverse_kl": "num_weighted_tokens",
    "weight": "num_weighted_tokens",
    "weight_squared": "num_weighted_tokens",
    "gradient_gap": "num_weighted_tokens",
    "sequence_log_weight": "num_weighted_responses",
    "sequence_log_weight_squared": "num_weighted_responses",
    "student_entropy": "num_entropy_tokens",
    "end_token_advantage": "num_end_tokens",
}
_RENAMED = {"clipped": "clipped_share"}


def without_gradient(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that records nothing for a backward pass."""

    # torch.no_grad() as a decorator would import torch while this package is imported.
    @functools.wraps(function)
    def unrecorded(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.no_grad():
            return function(*arguments, **named)

    return unrecorded


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Packed sequences on the model's device, already shifted.

    Index t belongs to the label of position t. Sequence s occupies positions cu_seqlens[s] up to
    cu_seqlens[s+1]. The first num_sequences are samples. One more may be padding, which carries no
    loss. T is the number of positions, S the number of sequences with the padding, K the number of
    teacher tokens.

    Log-probabilities are finite natural logarithms. Where loss_mask is False they may be anything.
    The ``student_*`` fields come from the trainer's forward pass, if it gives them; it sets them
    with ``dataclasses.replace``.
    """

    # bool [T], the labels that carry loss.
    loss_mask: Tensor
    # int32 [S+1], the borders of the sequences.
    cu_seqlens: Tensor
    # The number of samples, without the padding.
    num_sequences: int
    # float32 [T], by the teacher.
    teacher_logprobs: Tensor | None = None
    # float32 [T], by the policy that sampled the responses.
    sampling_logprobs: Tensor | None = None
    # float32 [T], by the teacher's own base.
    base_logprobs: Tensor | None = None
    # bool [S], responses that were cut off before an end token.
    truncated: Tensor | None = None
    # int64 [S], which of several teachers scored the sequence.
    teacher_index: Tensor | None = None
    # bool [S], responses whose answer a verifier found right.
    right: Tensor | None = None
    # float32 [T, K], by the teacher, of its K likeliest tokens.
    teacher_top_logprobs: Tensor | None = None
    # float32 [T], by the teacher, of all other tokens together. If it is None, the tail is 1 minus
    # the sum over the K tokens.
    teacher_tail_logprob: Tensor | None = None
    # [T, K], by the current student, of the same K tokens, with gradient.
    student_top_logprobs: Tensor | None = None
    # [T], the entropy of the current student's distribution, in nats.
    student_entropy: Tensor | None = None

    @classmethod
    def from_microbatch(cls, microbatch: Microbatch, device: torch.device | str = "cpu") -> Self:
        """Return the tensors of a microbatch that an objective needs, on this device."""

        # On a CPU as_tensor shares the memory of the arrays, so nothing is copied. Token ids and
        # labels stay out: an objective sees log-probabilities alone.
        def tensor(array: NDArray[np.generic] | None) -> Tensor | None:
            return None if array is None else torch.as_tensor(array, device=device)

        top = microbatch.teacher_top
        return cls(
            loss_mask=torch.as_tensor(microbatch.loss_mask, device=device),
            cu_seqlens=torch.as_tensor(microbatch.cu_seqlens, device=device),
            num_sequences=microbatch.num_sequences,
            teacher_logprobs=tensor(microbatch.teacher_logprobs),
            sampling_logprobs=tensor(microbatch.sampling_logprobs),
            base_logprobs=tensor(microbatch.base_logprobs),
            truncated=tensor(microbatch.truncated),
            teacher_index=tensor(microbatch.teacher_index),
            right=tensor(microbatch.right),
            teacher_top_logprobs=None if top is None else tensor(top.logprobs),
            teacher_tail_logprob=None if top is None else tensor(top.tail_logprob),
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over one microbatch.

    The loss of a step is the sum of loss_sum divided by the sum of num_items, both over all
    microbatches and data ranks.

    An objective gives the same metric keys in the same order for every microbatch, an empty one
    included. So the trainer can stack the sums, add them, and all-reduce them as one vector.
    """

    # A scalar with gradient, in the dtype of the log-probabilities.
    loss_sum: Tensor
    # An int32 scalar without gradient: what the loss is divided by. Megatron-Core takes it as
    # num_tokens with calculate_per_token_loss.
    num_items: Tensor
    # float64 scalars without gradient by name (see reduce_metrics). float64, because they are added
    # up over millions of tokens.
    metric_sums: dict[str, Tensor]


class Objective(Protocol):
    """A loss of the student's log-probabilities. It holds no state and calls no collective."""

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """Return the sums of a microbatch.

        Args:
            logprobs: The current student's log-probability of every label [T] at temperature 1,
                with gradient.
            batch: The packed sequences.
        """
        ...


def reduce_metrics(summed: Mapping[str, float]) -> dict[str, float]:
    """Turn the metric sums of a whole step into the values to report.

    - Counts (num_*) stay sums. Every other name becomes a mean over its count. It is left out where
      the count is 0. The count is num_tokens, but for the names in _COUNT_OF.
    - ``X_squared`` becomes ``X_std``, but for ``weight_squared``, which stays.
    - ``weight_squared`` also gives ``chi_square`` = E[w^2] - 1, ``effective_sample_share`` =
      (sum w)^2 / (n sum w^2), which goes from 1 (all weights equal) down to 1/n, and
      ``gradient_gap_bound`` = sqrt(E[A^2] E[(w - 1)^2]).
    - The counts of lopd.objective.quantiles become the quantiles of the advantage.
    - ``nll`` also gives ``perplexity``. ``clipped`` is reported as ``clipped_share``.
    - ``X/NAME`` is the X of a part of the tokens, those of one teacher. It is reduced with the
      other sums of that part.

    Args:
        summed: The sums, added over all microbatches and data ranks.

    Returns:
        The values to report by name.

    Raises:
        DataError: No token of the step carries loss.
    """
    # A step in which nothing is learned would still count as a step, and its means would be 0 / 0.
    if summed["num_tokens"] <= 0:
        raise DataError(
            "no token of this step carries loss",
            where="batch",
            remedy="remove responses without tokens and responses in which every token is masked",
        )
    # The sums of the whole step stand under "", those of a teacher under "/NAME".
    parts: dict[str, dict[str, float]] = {}
    for name, value in summed.items():
        base, slash, part = name.partition("/")
        parts.setdefault(slash + part, {})[base] = value
    return {
        name + part: value
        for part, sums in parts.items()
        for name, value in _reduce_part(sums).items()
    }


def _reduce_part(summed: Mapping[str, float]) -> dict[str, float]:
    reported: dict[str, float] = {}
    for name, value in summed.items():
        if name.startswith("num_"):
            reported[name] = value
            continue
        if is_count(name):
            continue
        count = summed[_COUNT_OF.get(name, "num_tokens")]
        # For example a step in which every response was truncated has no end token. A figure that
        # is missing is honest; a 0 would look like perfect agreement.
        if count <= 0:
            continue
        if name.endswith("_squared") and name != "weight_squared":
            base = name.removesuffix("_squared")
            mean = summed[base] / count
            # Var[x] = E[x^2] - E[x]^2. Rounding can bring it below 0 where all values are equal.
            reported[f"{base}_std"] = math.sqrt(max(0.0, value / count - mean * mean))
        else:
            reported[_RENAMED.get(name, name)] = value / count
    if "nll" in reported:
        # e^710 does not fit into a float64.
        reported["perplexity"] = math.exp(min(reported["nll"], 700.0))
    return reported | advantage_quantiles(summed) | _weight_figures(summed, reported)


def _weight_figures(summed: Mapping[str, float], reported: Mapping[str, float]) -> dict[str, float]:
    """Return what follows from the first two moments of w = pi_theta / pi_sampling."""
    second_moment = reported.get("weight_squared", 0.0)
    if second_moment <= 0:
        return {}
    mean = reported["weight"]
    figures = {
        # E[w^2 - 1] is the variance of w where the mean of w is 1, as it is in expectation.
        "chi_square": second_moment - 1.0,
        "effective_sample_share": mean**2 / second_moment,
    }
    if "gradient_gap" in reported:
        # E[(w - 1)^2]. The mean of w is near 1 but not equal to it in a finite sample.
        spread = max(0.0, second_moment - 2.0 * mean + 1.0)
        mean_square_advantage = summed["advantage_squared"] / summed["num_tokens"]
        figures["gradient_gap_bound"] = math.sqrt(mean_square_advantage * spread)
    return figures
