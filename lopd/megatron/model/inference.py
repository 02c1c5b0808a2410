"""Forward passes over packed microbatches, alone or as the first half of a training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lopd.megatron.model.build import forward
from lopd.megatron.model.context import gather_rows, part_of
from lopd.megatron.model.routing_replay import set_routing
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch


def forward_microbatch(
    model: Any, microbatch: Microbatch, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Run the model over one microbatch.

    Args:
        model: This rank's part of the model.
        microbatch: The packed sequences, and the teacher's top-K tokens if there are any.
        entropy: Whether the entropies are wanted.

    Returns:
        On the last stage: the log-probabilities of the labels, float32 [T], and the entropies [T]
        or None. With a teacher's top-K the log-probabilities are [T, 1 + K]: first the label, then
        the teacher's tokens. Every context rank has the rows of the whole microbatch. On other
        stages: the hidden states, and None.
    """
    device = parallel.device()
    part = part_of(microbatch)
    set_routing(model, microbatch, part)
    labels = microbatch.labels
    # One pass over the vocabulary answers all K + 1 tokens.
    if microbatch.teacher_top is not None:
        labels = np.column_stack([labels, microbatch.teacher_top.ids])
    output = forward(
        model,
        token_ids=torch.as_tensor(part.take(microbatch.token_ids), device=device),
        cu_seqlens=torch.as_tensor(part.cu_seqlens, device=device),
        max_seqlen=part.max_seqlen,
        labels=torch.as_tensor(part.take(labels), device=device),
        entropy=entropy,
    )
    # The schedule sends the hidden states to the next stage.
    if not parallel.is_last_stage():
        return output, None
    # From here on every context rank has all rows, in the order of the microbatch.
    logprobs, entropies = output
    whole_entropies = None if entropies is None else gather_rows(entropies, part)
    return gather_rows(logprobs, part), whole_entropies


@torch.no_grad()
def score_microbatches(
    model: Any, microbatches: Sequence[Microbatch], *, entropy: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Score microbatches without a gradient. Collective.

    Args:
        model: This rank's part of the model. It is put into evaluation mode.
        microbatches: At least one. Every data rank must give the same number of them.
        entropy: Whether the entropies are wanted.

    Returns:
        For each microbatch the log-probability of every label, float32 [T], and the entropy of each
        distribution, float32 [T] or None, at temperature 1. Every rank of a data rank's pipeline
        gets them.
    """
    model.eval()

    def forward_step(pending: Iterator[Microbatch], stage: Any) -> tuple[Tensor, Any]:
        # A teacher's top-K is data for the loss. Here only the labels are scored.
        microbatch = replace(next(pending), teacher_top=None)
        output, entropies = forward_microbatch(stage, microbatch, entropy=entropy)
        return output, lambda logprobs, non_loss_data: (logprobs, entropies)

    # Megatron's schedule lets the microbatches follow each other through the pipeline, so that the
    # stages work at the same time.
    results: list[tuple[Tensor, Tensor | None]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        # It is ignored: the stages tell each other the length of each microbatch.
        seq_length=len(microbatches[0].token_ids),
        micro_batch_size=1,
        forward_only=True,
        # The schedule then returns what the function beside the output returns, instead of losses.
        collect_non_loss_data=True,
    )
    # Only the last stage has results. The others prepare tensors to receive them.
    if not results:
        sizes = [len(microbatch.token_ids) for microbatch in microbatches]
        results = [(_empty(size), _empty(size) if entropy else None) for size in sizes]
    # The ranks of all stages return the same, so that the caller need not know the stages.
    if parallel.pipeline_size() > 1:
        source = parallel.last_stage_rank()
        for pair in results:
            for values in pair:
                if values is not None:
                    dist.broadcast(values, src=source, group=parallel.pipeline_group())
    return results


def _empty(size: int) -> Tensor:
    return torch.empty(size, device=parallel.device())
