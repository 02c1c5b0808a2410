"""Bodies for tests.megatron.launch.run_ranks: context parallelism over gloo, with the attention
across ranks of the stand-in for Transformer Engine.

two_ranks runs in a body of engine_cases; four_ranks, and one_rank with Megatron-Core's local layers
to compare with, on their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch

from lopd.batching import build_microbatch, plan_step
from lopd.batching.context import ContextPart, context_part
from lopd.megatron.model import engine
from lopd.megatron.ranks import parallel
from lopd.megatron.scoring.scorer_worker import answer
from lopd.megatron.training.trainer import Trainer
from lopd.objective import Distillation, TopKKL
from lopd.records import Microbatch, Sample
from tests.megatron.layout_cases import train_few
from tests.megatron.test_top_k import with_top_k
from tests.megatron.trainer_cases import (
    BALANCED,
    MAX_TOKENS,
    NUM_STEPS,
    samples_of,
    settings_of,
    train,
    trainer_of,
    weights_digest,
)

FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tensor, context": {"tensor": 2, "context": 2},
    "tensor, expert, context": {"tensor": 2, "expert": 4, "context": 2},
    "expert, context, data": {"expert": 2, "context": 2},
    "expert tensor, context": {"context": 2, "expert_tensor": 2},
    "pipeline, context": {"pipeline": 2, "context": 2},
    "context, data, plain optimizer": {"context": 2, "distributed_optimizer": False},
    "four context ranks": {"context": 4},
}
RESUMED = {
    "tensor, context": {"tensor": 2, "context": 2},
    "four context ranks": {"context": 4},
    "tensor, expert, data": {"tensor": 2, "expert": 2},
}
# Where few tokens decide, rounding grows faster.
GENTLE: dict[str, Any] = {"optimizer": {"lr": 1e-3}}
CONTROLS = ("contiguous chunks", "positions of each part from 0")


def steps_of(
    trainer: Trainer, num_steps: int = NUM_STEPS
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(losses, gradient norms and first figures; on rank 0 the weights after the last step), every
    sample on the first data rank.
    """
    steps = [trainer.train_step(microbatches_of(step)) for step in range(num_steps)]
    counted = {
        "tokens": round(steps[0].tokens_per_s * steps[0].seconds),
        "num_tokens": steps[0].num_tokens,
    }
    first = {
        name: value
        for name, value in steps[0].metrics.items()
        if name.startswith(("expert_", "advantage", "sequence_", "padding"))
    } | counted
    found = {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "first": first,
    }
    return found, {name: tensor for bucket in trainer.export() for name, tensor in bucket}


def microbatches_of(step: int) -> list[Microbatch]:
    """Of the first data rank all samples, and of the others none; of all one microbatch more,
    without samples.
    """
    samples = samples_of(step)
    plan = plan_step([len(sample) for sample in samples], 1, MAX_TOKENS)[0]
    mine = [
        [samples[index] for index in members] if parallel.data_rank() == 0 else []
        for members in plan
    ]
    return [build_microbatch(members, parallel.tensor_size()) for members in [*mine, []]]


def two_ranks(model: str, dtype: str = "float32") -> dict[str, Any]:
    """Two data ranks of which one has all the data, as one rank; then two context ranks; then what
    must be noticed. weights: distance from the former's.
    """
    alone, expected = steps_of(trainer_of(model, settings_of(dtype=dtype)))
    results: dict[str, Any] = {"one rank": alone}
    for name in ("right", *CONTROLS):
        with broken(name):
            results[name], weights = steps_of(
                trainer_of(model, settings_of({"context": 2}, dtype=dtype))
            )
        distances = [
            float((weights[part] - tensor).float().norm() / tensor.float().norm())
            for part, tensor in expected.items()
        ]
        results[name]["weights"] = max(distances, default=0.0)  # the other ranks have none
    return results


@contextmanager
def broken(name: str) -> Iterator[None]:
    """Context parallelism with a fault, or "right" without one."""
    faults = {
        "contiguous chunks": ("lopd.megatron.model.context.context_part", contiguous),
        "positions of each part from 0": (
            "megatron.core.models.common.embeddings.rope_utils._get_thd_freqs_on_this_cp_rank",
            from_zero,
        ),
    }
    with mock.patch(*faults[name]) if name in faults else nullcontext():
        yield


def contiguous(
    cu_seqlens: Any, num_sequences: int, *, rank: int, size: int, tensor: int = 1
) -> ContextPart:
    """Each rank's chunk of a sequence in one piece: each rank has as many tokens as it should have,
    and everything goes back to its place.
    """
    parts = [
        context_part(cu_seqlens, num_sequences, rank=each, size=size, tensor=tensor)
        for each in range(size)
    ]
    bounds = parts[0].cu_seqlens // size
    rows = np.stack([part.index for part in parts])  # [size, P]
    own = [
        np.array_split(np.sort(rows[:, start:end].flatten()), size)
        for start, end in itertools.pairwise(bounds)
    ]
    by_rank = np.concatenate(
        [np.concatenate([pieces[each] for pieces in own]) for each in range(size)]
    )
    place = np.full(cu_seqlens[-1] + 1, len(by_rank))
    place[by_rank] = np.arange(len(by_rank))
    return ContextPart(
        np.split(by_rank, size)[rank], place[:-1], parts[0].cu_seqlens, parts[0].max_seqlen
    )


def from_zero(
    cp_rank: int, cp_size: int, x: torch.Tensor, freqs: torch.Tensor, offset: int = 0
) -> torch.Tensor:
    return freqs[offset : offset + x.size(0)]


# ---- four ranks ----


def one_rank(model: str) -> dict[str, Any]:
    return {"all": train(trainer_of(model, settings_of())), **cases(model, None)}


def four_ranks(model: str, folder: str) -> dict[str, Any]:
    """With Transformer Engine's layers, as with a GPU and bfloat16, but in float32, so that
    differences show.
    """
    engine.uses_engine = lambda dtype: True
    results: dict[str, Any] = {
        name: train(trainer_of(model, settings_of(layout))) for name, layout in FOUR_RANKS.items()
    }
    results["recomputed"] = train(
        trainer_of(model, settings_of(FOUR_RANKS["tensor, context"], recompute="full"))
    )
    results |= cases(model, {"tensor": 2, "context": 2})
    results["few, data"] = train_few(trainer_of(model, settings_of({"context": 2}, **GENTLE)))
    unscaled = trainer_of(model, settings_of({"tensor": 2, "context": 2}, **BALANCED))
    unscaled._scale_balancing_loss = lambda microbatches: None  # type: ignore[method-assign]
    results["balanced, unscaled"] = train_even(unscaled)
    results["resumed"] = resumed(model, folder)
    trainer = trainer_of(model, settings_of({"context": 2}, megatron={"cp_comm_type": "a2a"}))
    results["cp_comm_type"] = trainer.module.decoder.layers[
        0
    ].self_attention.core_attention.cp_comm_type
    return results


def cases(model: str, layout: dict[str, Any] | None) -> dict[str, Any]:
    """What else a layout does: few responses, the load-balancing loss, a top-K loss, scores of a
    teacher.
    """
    results: dict[str, Any] = {"few": train_few(trainer_of(model, settings_of(layout, **GENTLE)))}
    results["balanced"] = train_even(trainer_of(model, settings_of(layout, **BALANCED)))
    objective = Distillation(TopKKL("reverse"))  # type: ignore[arg-type]
    trainer = trainer_of(model, settings_of(layout, **GENTLE), objective)
    results["scores"] = scores(trainer)
    samples = with_top_k(samples_of(0, 8))
    steps = [
        trainer.train_step([build_microbatch(part, 2) for part in (samples[:5], samples[5:], [])])
        for _ in range(2)
    ]
    results["top-K"] = {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
    }
    return results


def train_even(trainer: Trainer) -> dict[str, Any]:
    """Sequences of 8, 16 and so on tokens, to which no layout adds padding, which routers would
    see; one in a microbatch.
    """
    steps = []
    for step in range(NUM_STEPS):
        samples = [
            cut_short(sample, len(sample) // 8 * 8)
            for sample in samples_of(step)
            if len(sample) >= 16
        ]
        steps.append(trainer.train_step([build_microbatch([sample]) for sample in samples]))
    return {"loss": [step.loss for step in steps], "grad_norm": [step.grad_norm for step in steps]}


def cut_short(sample: Sample, length: int) -> Sample:
    mask = np.arange(length) >= length // 2
    assert sample.teacher_logprobs is not None
    assert sample.sampling_logprobs is not None
    return Sample(
        sample.token_ids[:length],
        mask,
        sample.sampling_logprobs[:length],
        sample.teacher_logprobs[:length],
    )


def scores(trainer: Trainer) -> list[float]:
    """Of the scorer's rank, in the order of responses: log-probabilities and entropies."""
    samples = samples_of(3)
    lengths = np.array([len(sample) for sample in samples])
    chunk = {
        "tokens": np.concatenate([sample.token_ids for sample in samples]),
        "prompt_lens": np.full(len(samples), 3),
        "response_lens": lengths - 3,
    }
    found = answer(trainer.model, chunk, max_tokens=48, entropy=True)
    bounds = np.cumsum([0, *found["lengths"]])
    order = np.argsort(found["index"])
    assert sorted(found["index"]) == list(range(len(samples)))
    return [
        float(value)
        for column in ("logprobs", "entropy")
        for index in order
        for value in found[column][bounds[index] : bounds[index + 1]]
    ]


def resumed(model: str, folder: str) -> dict[str, Any]:
    """Saved by two tensor and two context ranks after three of five steps; gone on with by them and
    by others.
    """
    settings = {name: settings_of(layout) for name, layout in RESUMED.items()}
    first = trainer_of(model, settings["tensor, context"], checkpoints=folder)
    train(first, 3)
    first.save_checkpoint({})
    results: dict[str, Any] = {"unbroken": train(first)}
    for name, section in settings.items():
        trainer = trainer_of(model, section, checkpoints=folder)
        trainer.resume(lambda note: None)
        results[name] = {**train(trainer), "weights": weights_digest(trainer)}
    results["unbroken"]["weights"] = weights_digest(first)
    return results
