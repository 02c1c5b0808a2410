"""What the tests of a step's figures, of routers and of fields beside the knobs run under torchrun.
Data and models as in trainer_cases.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd.batching import build_microbatch, plan_step
from lopd.errors import TrainingError
from lopd.megatron.model.build import forward
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.objective import Lightning
from tests.megatron import gpu_cases
from tests.megatron.trainer_cases import (
    MAX_TOKENS,
    microbatches_of,
    samples_of,
    settings_of,
    train,
    trainer_of,
)

# A tiny epsilon: then the first step is the learning rate, whatever the size of the gradient.
NO_DECAY = {"lr": 1e-3, "weight_decay": 0.0, "eps": 1e-8}


def figures_of(trainer: Trainer) -> dict[str, float]:
    """Of the first step."""
    return dict(trainer.train_step(microbatches_of(0)).metrics)


def one_rank(model: str, dense: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"plain": figures_of(trainer_of(model, settings_of()))}
    results["recomputed"] = figures_of(trainer_of(model, settings_of(recompute="full")))
    results["dense"] = figures_of(trainer_of(dense, settings_of()))
    results["dropping"] = figures_of(
        trainer_of(model, settings_of(megatron={"moe_expert_capacity_factor": 0.5}))
    )
    results["padded"] = figures_of_padded(trainer_of(model, settings_of()))
    results["routers"] = routers(model)
    results["resumed"] = resumed_without_routers(model, folder)
    results["five steps"] = train(trainer_of(model, settings_of()))
    results["entropy"] = entropies(model)
    results["parity"] = gpu_cases.parity(model, "float32")
    results["stage"] = gpu_cases.stage(model, 128, 32, "float32", "full", 2)
    return results


def two_ranks(model: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, layout in {
        "tensor and expert": {"tensor": 2, "expert": 2},
        "data": {},
        "pipeline": {"pipeline": 2},
    }.items():
        results[name] = figures_of(trainer_of(model, settings_of(layout)))
    results["padded"] = figures_of_padded(
        trainer_of(model, settings_of({"tensor": 2, "expert": 2}))
    )
    results["overlapped"] = train(
        trainer_of(
            model, settings_of(megatron={"overlap_grad_reduce": True, "bucket_size": 20_000})
        )
    )
    results["routers"] = routers(model, {"tensor": 2, "expert": 2})
    results["not finite"] = poisoned(model)
    return results


def figures_of_padded(trainer: Trainer) -> dict[str, float]:
    """The same step with every microbatch padded to 192 tokens."""
    samples = samples_of(0)
    plan = plan_step([len(sample) for sample in samples], parallel.data_size(), MAX_TOKENS, 2)[
        parallel.data_rank()
    ]
    return dict(
        trainer.train_step(
            [build_microbatch([samples[index] for index in members], 192) for members in plan]
        ).metrics
    )


def weights_of(trainer: Trainer, part: str) -> dict[str, list[float]]:
    return {
        name: tensor.flatten().tolist()
        for bucket in trainer.export()
        for name, tensor in bucket
        if part in name
    }


def routers(model: str, layout: dict[str, Any] | None = None) -> dict[str, Any]:
    """Routers and a norm before, and after one step as usual, with frozen routers, with a tenth of
    the learning rate for them.
    """
    cases: dict[str, dict[str, Any]] = {
        "usual": {},
        "frozen": {"freeze_router": True},
        "scaled": {"router_lr_scale": 0.1},
    }
    results: dict[str, Any] = {}
    for name, knobs in cases.items():
        trainer = trainer_of(model, settings_of(layout, optimizer={**NO_DECAY, **knobs}))
        if not results:
            results["before"] = {
                part: weights_of(trainer, part) for part in ("mlp.gate.weight", "q_norm")
            }
        trainer.train_step(microbatches_of(0))
        results[name] = {part: weights_of(trainer, part) for part in ("mlp.gate.weight", "q_norm")}
    return results


def resumed_without_routers(model: str, folder: str) -> dict[str, Any]:
    """Frozen routers are in the checkpoint and not in the optimizer's state."""
    settings = settings_of(num_steps=3, optimizer={**NO_DECAY, "freeze_router": True})
    first = trainer_of(model, settings, checkpoints=folder)
    first.train_step(microbatches_of(0))
    first.save_checkpoint({})
    resumed = trainer_of(model, settings, checkpoints=folder)
    resumed.resume()
    return {"unbroken": train(first, 3), "resumed": train(resumed, 3), "step": resumed.step}


def poisoned(model: str) -> str:
    """A teacher log-probability of NaN in one response of the second data rank; the message."""
    trainer = trainer_of(model, settings_of())
    microbatches = microbatches_of(0)
    offset = 100 * parallel.data_rank()
    named = []
    for number, microbatch in enumerate(microbatches):
        keys = tuple(
            (f"prompt-{offset + 10 * number + index}", 0)
            for index in range(microbatch.num_sequences)
        )
        named.append(dataclasses.replace(microbatch, keys=keys))
    if parallel.data_rank() == 1:
        teacher = named[-1].teacher_logprobs
        assert teacher is not None
        named[-1] = dataclasses.replace(
            named[-1], teacher_logprobs=np.where(named[-1].loss_mask, np.float32("nan"), teacher)
        )
    try:
        trainer.train_step(named)
    except TrainingError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def entropies(model: str) -> dict[str, Any]:
    """Return the figures of a step with and without entropy, and that of dense logits before it."""
    settings = settings_of()
    parallel.initialize(settings.parallel, seed=1, timeout_s=500)
    microbatches = [build_microbatch(samples_of(0)[:4], 2), build_microbatch(samples_of(0)[4:8], 2)]
    results: dict[str, Any] = {}
    start: dict[str, Any] = {
        "model_dir": Path(model),
        "init": "checkpoint",
        "init_std": 0.02,
        "seed": 1,
        "checkpoint_dir": None,
    }
    for entropy in (True, False):
        trainer = Trainer(settings, objective=Lightning(), entropy=entropy, **start)
        if entropy:
            results["dense"] = [
                _dense_entropies(trainer, microbatch) for microbatch in microbatches
            ]
        results[f"entropy {entropy}"] = [
            trainer.train_step(microbatches).as_dict() for _ in range(2)
        ]
    return results


@torch.no_grad()
def _dense_entropies(trainer: Trainer, microbatch: Any) -> dict[str, float]:
    logits = forward(
        trainer.model,
        token_ids=torch.as_tensor(microbatch.token_ids),
        cu_seqlens=torch.as_tensor(microbatch.cu_seqlens),
        max_seqlen=microbatch.max_seqlen,
    ).squeeze(0)[:, : trainer.architecture.vocab_size]
    logprobs = torch.log_softmax(logits.double(), -1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    mask = torch.as_tensor(microbatch.loss_mask)
    return {
        "loss tokens": entropies[mask].sum().item(),
        "num loss tokens": mask.sum().item(),
        "all": entropies.mean().item(),
    }
