"""The coefficient of the experts' load-balancing loss, for one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from lopd.megatron.model.context import num_computed_tokens
from lopd.megatron.ranks import parallel
from lopd.objective import Objective, TokenBatch
from lopd.records import Microbatch


def balancing_coefficient(
    moe_aux_loss: float, objective: Objective, microbatches: Sequence[Microbatch]
) -> float:
    """Return the coefficient with which Megatron's router must multiply its loss in this step.

    With it the load-balancing loss is a mean over the step's microbatches, weighted by their
    tokens, in every layout and with every objective. Collective.

    Args:
        moe_aux_loss: The coefficient of that mean.
        objective: The objective. It has the number of items that the step is divided by.
        microbatches: The microbatches of this data rank.
    """
    # Megatron's router multiplies the loss of a microbatch by the tokens on its rank, and
    # finalize_model_grads divides everything by the number of items. Two factors must be undone:
    # items may be responses instead of tokens, and a tensor or context rank has only its share of
    # the tokens.
    device = parallel.device()
    # Two counts in one tensor, for one all-reduce: items, then tokens.
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for microbatch in microbatches:
        batch = TokenBatch.from_microbatch(microbatch, device)
        # The number of items depends on the masks alone, so any log-probabilities will do. The
        # model has not run yet: its forward pass needs the coefficient.
        batch = replace(batch, student_top_logprobs=batch.teacher_top_logprobs)
        logprobs = torch.zeros(len(microbatch.token_ids), device=device)
        counts[0] += objective(logprobs, batch).num_items
        counts[1] += num_computed_tokens(microbatch)
    # The whole step, because finalize_model_grads divides by the items of all data ranks.
    dist.all_reduce(counts, group=parallel.data_group())
    items_per_token = (counts[0] / counts[1]).item()
    shares = parallel.tensor_size() * parallel.context_size()
    return moe_aux_loss * shares * items_per_token
