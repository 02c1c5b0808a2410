"""What an objective gets and gives: packed tensors in, sums out. Only the trainer divides and
reduces over microbatches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lopd.errors import DataError
from lopd.records import Microbatch

_COUNT_OF = {  # what a metric is a mean over, where that is not num_tokens
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


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Packed sequences on the device of the model, already shifted: index t belongs to the label of
    position t.

    Sequence s occupies cu_seqlens[s]..cu_seqlens[s+1]. The first num_sequences are samples; one
    more may be padding, which carries no loss. Log-probabilities are finite; where loss_mask is
    False they may be anything. ``student_*`` come from the trainer's forward pass, where it gives
    them (``dataclasses.replace``).
    """

    loss_mask: Tensor  # bool [T]
    cu_seqlens: Tensor  # int32 [S+1]
    num_sequences: int
    teacher_logprobs: Tensor | None = None  # float32 [T]
    sampling_logprobs: Tensor | None = None  # float32 [T]
    truncated: Tensor | None = None  # bool [S], cut off before an end token
    teacher_index: Tensor | None = None  # int64 [S], which of several teachers scored the sequence
    teacher_top_logprobs: Tensor | None = (
        None  # float32 [T, K], of the teacher's K likeliest tokens
    )
    teacher_tail_logprob: Tensor | None = (
        None  # float32 [T], of all others together; absent: what is missing to 1
    )
    student_top_logprobs: Tensor | None = (
        None  # [T, K], the current student's of the same tokens at temperature 1, with gradient
    )
    student_entropy: Tensor | None = None  # [T], the current student's, in nats

    @classmethod
    def from_microbatch(cls, microbatch: Microbatch, device: torch.device | str = "cpu") -> Self:
        """The tensors of a microbatch that an objective needs, on this device."""

        def tensor(array: NDArray[np.generic] | None) -> Tensor | None:
            return None if array is None else torch.as_tensor(array, device=device)

        top = microbatch.teacher_top
        return cls(
            loss_mask=torch.as_tensor(microbatch.loss_mask, device=device),
            cu_seqlens=torch.as_tensor(microbatch.cu_seqlens, device=device),
            num_sequences=microbatch.num_sequences,
            teacher_logprobs=tensor(microbatch.teacher_logprobs),
            sampling_logprobs=tensor(microbatch.sampling_logprobs),
            truncated=tensor(microbatch.truncated),
            teacher_index=tensor(microbatch.teacher_index),
            teacher_top_logprobs=None if top is None else tensor(top.logprobs),
            teacher_tail_logprob=None if top is None else tensor(top.tail_logprob),
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Sums over one microbatch. The loss of a step is the sum of loss_sum over the sum of
    num_items, both over all microbatches and data ranks.

    loss_sum: scalar with gradient, in the dtype of the log-probabilities. num_items: scalar int32
    without gradient (what Megatron-Core takes for ``num_tokens`` with
    ``calculate_per_token_loss``). metric_sums: float64 scalars without gradient; an objective gives
    the same keys in the same order for every microbatch, an empty one included, so that they can be
    stacked, added and all-reduced as one vector; see reduce_metrics.
    """

    loss_sum: Tensor  # []
    num_items: Tensor  # int32 []
    metric_sums: dict[str, Tensor]  # each float64 []


class Objective(Protocol):
    """A loss of the student's log-probabilities; it holds no state and calls no collective."""

    def __call__(self, logprobs: Tensor, batch: TokenBatch) -> LossOutput:
        """logprobs [T]: the current student's log-probability of every label at temperature 1, with
        gradient.
        """
        ...


def reduce_metrics(summed: Mapping[str, float]) -> dict[str, float]:
    """Metric sums of a whole step (added over microbatches and data ranks) to the values to report.

    Counts (num_*) stay sums. Every other name is a mean over its count, and left out where that is
    0: ``reverse_kl``, ``weight``, ``weight_squared`` and
    ``gradient_gap`` over num_weighted_tokens, ``sequence_log_weight`` over num_weighted_responses,
    ``student_entropy`` over num_entropy_tokens,
    ``end_token_advantage`` over num_end_tokens, all the rest over num_tokens. On top: ``X_squared``
    becomes ``X_std``, but for ``weight_squared``, which stays
    and gives ``chi_square`` = E[w^2] - 1, ``effective_sample_share`` = (sum w)^2 / (n sum w^2),
    from 1 (all weights equal) down to 1/n, and
    ``gradient_gap_bound`` = sqrt(E[A^2] E[(w - 1)^2]); ``nll`` also gives ``perplexity``;
    ``clipped`` is called ``clipped_share``. ``X/NAME`` is the X of a part of the tokens (those of
    one teacher): reduced in the same way among its like.
    DataError: no token of the step carries loss.
    """
    if summed["num_tokens"] <= 0:
        raise DataError(
            "no token of this step carries loss",
            where="batch",
            remedy="drop responses without tokens, or with every token masked",
        )
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
        count = summed[_COUNT_OF.get(name, "num_tokens")]
        if count <= 0:
            continue
        if name.endswith("_squared") and name != "weight_squared":
            base = name.removesuffix("_squared")
            mean = summed[base] / count
            reported[f"{base}_std"] = math.sqrt(max(0.0, value / count - mean * mean))
        else:
            reported[_RENAMED.get(name, name)] = value / count
    if "nll" in reported:
        reported["perplexity"] = math.exp(min(reported["nll"], 700.0))  # e^710 overflows a double
    if reported.get("weight_squared", 0.0) > 0:
        reported["chi_square"] = reported["weight_squared"] - 1.0
        reported["effective_sample_share"] = reported["weight"] ** 2 / reported["weight_squared"]
        spread = max(
            0.0, reported["weight_squared"] - 2.0 * reported["weight"] + 1.0
        )  # E[(w - 1)^2]
        if "gradient_gap" in reported:
            reported["gradient_gap_bound"] = math.sqrt(
                summed["advantage_squared"] / summed["num_tokens"] * spread
            )
    return reported
