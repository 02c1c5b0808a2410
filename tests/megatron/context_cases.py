"""Bodies for tests.megatron.launch.run_ranks: context parallelism over gloo, with the attention across ranks of the stand-in for Transformer Engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

from lopd.batching import build_microbatch, plan_step
from lopd.batching.context import ContextPart, cut
from lopd.megatron import parallel
from lopd.megatron.trainer import Trainer
from lopd.records import Microbatch
from tests.megatron.trainer_cases import MAX_TOKENS, NUM_STEPS, samples_of, settings_of, trainer_of

CONTROLS = ("contiguous chunks", "positions of each part from 0")


def steps_of(trainer: Trainer, num_steps: int = NUM_STEPS) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(losses, gradient norms and first figures; on rank 0 the weights after the last step), every sample on the first data rank."""
    steps = [trainer.train_step(microbatches_of(step)) for step in range(num_steps)]
    counted = {"tokens": round(steps[0].tokens_per_s * steps[0].seconds), "num_tokens": steps[0].num_tokens}
    first = {name: value for name, value in steps[0].metrics.items() if name.startswith(("expert_", "advantage", "sequence_", "padding"))} | counted
    found = {"loss": [step.loss for step in steps], "grad_norm": [step.grad_norm for step in steps], "first": first}
    return found, {name: tensor for bucket in trainer.export() for name, tensor in bucket}


def microbatches_of(step: int) -> list[Microbatch]:
    """Of the first data rank all samples, and of the others none; of all one microbatch more, without samples."""
    samples = samples_of(step)
    plan = plan_step([len(sample) for sample in samples], 1, MAX_TOKENS)[0]
    mine = [[samples[index] for index in members] if parallel.data_rank() == 0 else [] for members in plan]
    return [build_microbatch(members, parallel.tensor_size()) for members in [*mine, []]]


def two_ranks(model: str) -> dict[str, Any]:
    """Two data ranks of which one has all the data, as one rank; then two context ranks; then what must be noticed. weights: distance from the former's."""
    alone, expected = steps_of(trainer_of(model, settings_of()))
    results: dict[str, Any] = {"one rank": alone}
    for name in ("right", *CONTROLS):
        with broken(name):
            results[name], weights = steps_of(trainer_of(model, settings_of({"context": 2})))
        distances = [float((weights[part] - tensor).norm() / tensor.norm()) for part, tensor in expected.items()]
        results[name]["weights"] = max(distances, default=0.0)  # the other ranks have none
    return results


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Context parallelism with a fault, or "right" without one."""
    faults = {
        "contiguous chunks": ("lopd.megatron.context.cut", contiguous),
        "positions of each part from 0": ("megatron.core.models.common.embeddings.rope_utils._get_thd_freqs_on_this_cp_rank", from_zero),
    }
    with mock.patch(*faults[name]) if name in faults else nullcontext():
        yield


def contiguous(cu_seqlens: Any, num_sequences: int, *, rank: int, size: int, tensor: int = 1) -> ContextPart:
    """Each rank's chunk of a sequence in one piece: each rank has as many tokens as it should have, and everything goes back to its place."""
    parts = [cut(cu_seqlens, num_sequences, rank=each, size=size, tensor=tensor) for each in range(size)]
    bounds = parts[0].cu_seqlens // size
    rows = np.stack([part.index for part in parts])  # [size, P]
    own = [np.array_split(np.sort(rows[:, start:end].flatten()), size) for start, end in itertools.pairwise(bounds)]
    by_rank = np.concatenate([np.concatenate([pieces[each] for pieces in own]) for each in range(size)])
    place = np.full(cu_seqlens[-1] + 1, len(by_rank))
    place[by_rank] = np.arange(len(by_rank))
    return ContextPart(np.split(by_rank, size)[rank], place[:-1], parts[0].cu_seqlens, parts[0].max_seqlen)


def from_zero(cp_rank: int, cp_size: int, x: torch.Tensor, freqs: torch.Tensor, offset: int = 0) -> torch.Tensor:
    return freqs[offset : offset + x.size(0)]
