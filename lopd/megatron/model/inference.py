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
from lopd.megatron.model.context import gather, part_of
from lopd.megatron.ranks import parallel
from lopd.records import Microbatch


def forward_microbatch(
    model: Any, microbatch: Microbatch, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Last stage: log-probabilities of the labels [T], and their entropy [T] where asked for.
    Elsewhere hidden states, and None.

    With a teacher's top-K [T, 1 + K]: of the label, then of the teacher's tokens. Context ranks
    compute a part each, and all of them get the whole.
    """
    device, part = parallel.device(), part_of(microbatch)
    labels = microbatch.labels
    if microbatch.teacher_top is not None:
        labels = np.column_stack([labels, microbatch.teacher_top.ids])  # int64
    output = forward(
        model,
        token_ids=torch.as_tensor(part.take(microbatch.token_ids), device=device),
        cu_seqlens=torch.as_tensor(part.cu_seqlens, device=device),
        max_seqlen=part.max_seqlen,
        labels=torch.as_tensor(part.take(labels), device=device),
        entropy=entropy,
    )
    if not parallel.is_last_stage():
        return output, None
    logprobs, spread = output
    return gather(logprobs, part), None if spread is None else gather(spread, part)


@torch.no_grad()
def score_microbatches(
    model: Any, microbatches: Sequence[Microbatch], *, entropy: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """(log-probability of every label, float32 [T]; where asked for the entropy of each
    distribution, float32 [T]) of each microbatch, temperature 1.

    On every rank of a data rank's pipeline; they follow each other through it. Collective: every
    data rank must give the same number of them, at least one.
    """
    model.eval()

    def forward_step(pending: Iterator[Microbatch], stage: Any) -> tuple[Tensor, Any]:
        output, spread = forward_microbatch(
            stage, replace(next(pending), teacher_top=None), entropy=entropy
        )
        return output, lambda logprobs, non_loss_data: (logprobs, spread)

    results: list[tuple[Tensor, Tensor | None]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        seq_length=len(
            microbatches[0].token_ids
        ),  # ignored: stages tell each other the length of each microbatch
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not results:  # not the last stage
        sizes = [len(microbatch.token_ids) for microbatch in microbatches]
        results = [(_room(size), _room(size) if entropy else None) for size in sizes]
    if parallel.pipeline_size() > 1:
        for pair in results:
            for values in pair:
                if values is not None:
                    dist.broadcast(
                        values, src=parallel.last_stage_rank(), group=parallel.pipeline_group()
                    )
    return results


def _room(size: int) -> Tensor:
    return torch.empty(size, device=parallel.device())
