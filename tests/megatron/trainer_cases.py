"""What the trainer's tests run under torchrun: bodies for tests.megatron.launch.run_ranks, and the
data they train on.

Small, uneven sequences; the same 16 responses at a step whatever the layout. Results are floats,
which travel as JSON bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopd.batching import build_microbatch, plan_step
from lopd.config import TrainSection
from lopd.errors import TrainingError
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.objective import Objective
from lopd.objective.lightning import Lightning
from lopd.objective.supervised import Supervised
from lopd.records import Microbatch, Sample

NUM_STEPS = 5
MAX_TOKENS = 128  # several microbatches a step
PEAK_LR = 1e-2
# Adam divides by the gradient's size. With a tiny epsilon, weights whose gradient is rounding alone
# move as far as all others, in a direction that the processor decides: after five steps losses then
# differed by 1e-6 to 1e-3 between layouts. With this one, on no processor by more than 4e-7.
EPS = 1e-4
# Gentler than the others: the load-balancing loss counts chosen experts, and a rounding error that
# flips one choice would grow into a difference.
BALANCED: dict[str, Any] = {"moe_aux_loss": 0.5, "optimizer": {"lr": 1e-3}}


def samples_of(step: int, count: int = 16, vocab_size: int = 512) -> list[Sample]:
    """Responses of 2 to 39 tokens whose last part carries loss, with random log-probabilities."""
    generator = np.random.default_rng(step)
    samples = []
    for _ in range(count):
        length = int(generator.integers(5, 40))
        mask = np.arange(length) >= generator.integers(1, length - 1)
        teacher, sampling = (-3 * generator.random(length, dtype=np.float32) for _ in range(2))
        samples.append(
            Sample(
                generator.integers(4, vocab_size, length).astype(np.int32), mask, sampling, teacher
            )
        )
    return samples


def microbatches_of(step: int, vocab_size: int = 512) -> list[Microbatch]:
    """This data rank's part. Padded to even lengths in every layout, so that all layouts see the
    same tokens.
    """
    samples = samples_of(step, vocab_size=vocab_size)
    plan = plan_step([len(sample) for sample in samples], parallel.data_size(), MAX_TOKENS, 2)
    return [
        build_microbatch([samples[index] for index in members], 2)
        for members in plan[parallel.data_rank()]
    ]


def settings_of(layout: dict[str, Any] | None = None, **fields: Any) -> TrainSection:
    """fields: of TrainSection. Float32, 5 steps of a high learning rate, so that a wrong gradient
    shows in the next loss; where the optimizer's epsilon is not given, it is EPS."""
    defaults = {
        "num_steps": NUM_STEPS,
        "dtype": "float32",
        "max_tokens_per_microbatch": MAX_TOKENS,
    }
    optimizer = {"eps": EPS, **fields.pop("optimizer", {"lr": PEAK_LR})}
    parallel_section = {"ranks": int(os.environ["WORLD_SIZE"]), **(layout or {})}
    return TrainSection(parallel=parallel_section, optimizer=optimizer, **{**defaults, **fields})


def trainer_of(
    model: str,
    settings: TrainSection,
    objective: Objective | None = None,
    checkpoints: str | None = None,
) -> Trainer:
    parallel.initialize(settings.parallel, seed=1, timeout_s=500)
    folder = None if checkpoints is None else Path(checkpoints)
    return Trainer(
        settings,
        model_dir=Path(model),
        init="checkpoint",
        init_std=0.02,
        seed=1,
        objective=objective or Lightning(),
        checkpoint_dir=folder,
    )


def train(
    trainer: Trainer, num_steps: int = NUM_STEPS, vocab_size: int = 512
) -> dict[str, list[float]]:
    """Steps from where the trainer stands up to num_steps."""
    steps = [
        trainer.train_step(microbatches_of(step, vocab_size))
        for step in range(trainer.step, num_steps)
    ]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "lr": [step.lr for step in steps],
    }


def train_on_one_rank(model: str, dtype: str) -> dict[str, list[float]]:
    return train(trainer_of(model, settings_of(dtype=dtype)))


def weights_digest(trainer: Trainer) -> str:
    """sha256 over all weights under their Hugging Face names."""
    tensors = {name: tensor for bucket in trainer.export() for name, tensor in bucket}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- layouts ----


def one_rank(model: str, dense: str, every_expert: str) -> dict[str, Any]:
    results: dict[str, Any] = {"lightning": train(trainer_of(model, settings_of()))}
    optimizer = {
        "lr": PEAK_LR,
        "schedule": "cosine",
        "warmup": 0.4,
        "weight_decay": 0.5,
        "clip_grad": 1.0,
    }
    results["supervised"] = train(trainer_of(model, settings_of(optimizer=optimizer), Supervised()))
    for recompute in ("selective", "full"):
        results[recompute] = train(trainer_of(model, settings_of(recompute=recompute)))
    results["every expert"] = train(trainer_of(every_expert, settings_of()))
    for distributed in (True, False):
        settings = settings_of({"distributed_optimizer": distributed}, dtype="bfloat16")
        results[f"bfloat16 {distributed}"] = train(trainer_of(every_expert, settings))
    results["unbalanced"] = train(trainer_of(model, settings_of(optimizer=BALANCED["optimizer"])))
    results["balanced"] = train(trainer_of(model, settings_of(**BALANCED)))
    results["passes"] = _count_passes(model)
    results["dense"] = train(trainer_of(dense, settings_of()))
    results["lone"] = _lone_response(model)
    results["logprobs"] = trainer_of(model, settings_of()).logprobs(microbatches_of(0)[0]).tolist()
    return results


def two_ranks(model: str, dense: str) -> dict[str, Any]:
    layouts = {
        "data": {},
        "data, plain optimizer": {"distributed_optimizer": False},
        "tensor and expert": {"tensor": 2, "expert": 2},
        "tensor and expert, plain optimizer": {
            "tensor": 2,
            "expert": 2,
            "distributed_optimizer": False,
        },
        "tensor": {"tensor": 2},
        "expert": {"expert": 2},
        "expert tensor": {"expert_tensor": 2},
        "pipeline": {"pipeline": 2},
    }
    results: dict[str, Any] = {
        name: train(trainer_of(model, settings_of(layout))) for name, layout in layouts.items()
    }
    results["untagged norms"] = train(
        _untag(trainer_of(model, settings_of({"tensor": 2, "expert": 2})))
    )
    for name in ("tensor and expert", "pipeline"):
        results[f"balanced: {name}"] = train(
            trainer_of(model, settings_of(layouts[name], **BALANCED))
        )
        results[f"logprobs: {name}"] = (
            trainer_of(model, settings_of(layouts[name])).logprobs(microbatches_of(0)[0]).tolist()
        )
    unscaled = trainer_of(model, settings_of(layouts["tensor and expert"], **BALANCED))
    unscaled._scale_balancing_loss = lambda microbatches: None  # type: ignore[method-assign]
    results["balanced, unscaled"] = train(unscaled)
    for name in ("data", "tensor", "pipeline"):
        results[f"dense: {name}"] = train(trainer_of(dense, settings_of(layouts[name])))
    results["lone"] = _lone_response(model)
    results["not finite"] = _not_finite(model)
    results["unequal"] = _unequal(model)
    results["leaves"] = _leaves(model)
    return results


def _leaves(model: str) -> dict[str, Any]:
    from tests.megatron.offload_cases import one_case  # which is built on this module

    return one_case(model, {"expert": 2}, {"dtype": "bfloat16"})


def _lone_response(model: str) -> dict[str, list[float]]:
    """A step of a single response: with two data ranks, one of them has nothing to learn from."""
    trainer = trainer_of(model, settings_of())
    samples = samples_of(0)[:1]
    plan = plan_step([len(samples[0])], parallel.data_size(), MAX_TOKENS, 2)
    step = trainer.train_step(
        [
            build_microbatch([samples[index] for index in members], 2)
            for members in plan[parallel.data_rank()]
        ]
    )
    return {
        "loss": [step.loss],
        "grad_norm": [step.grad_norm],
        "tokens": [round(step.tokens_per_s * step.seconds)],
    }


def _untag(trainer: Trainer) -> Trainer:
    """Norms as a plain torch module would have them: not marked as seeing only a part of the
    tokens.
    """
    for name, parameter in trainer.module.named_parameters():
        if "norm" in name:
            parameter.sequence_parallel = False
    return trainer


def _count_passes(model: str) -> dict[str, int]:
    """Forward and backward passes of the first layer in one step, and with a scoring pass before
    it, as PPO-like trainers do it.
    """
    counts = {
        "microbatches": len(microbatches_of(0)),
        "forward": 0,
        "backward": 0,
        "forward with scoring": 0,
    }
    trainer = trainer_of(model, settings_of())
    layer = trainer.module.decoder.layers[0]

    def forward_hook(module: Any, inputs: Any, output: Any) -> None:
        counts["forward"] += 1

    def backward_hook(gradient: torch.Tensor) -> None:
        counts["backward"] += 1

    def output_hook(module: Any, inputs: Any, output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(backward_hook)

    layer.register_forward_hook(forward_hook)
    layer.register_forward_hook(output_hook)
    microbatches = microbatches_of(0)
    trainer.train_step(microbatches)
    once = dict(counts)
    for microbatch in microbatches:
        trainer.logprobs(microbatch)
    trainer.train_step(microbatches)
    return {**once, "forward with scoring": counts["forward"] - once["forward"]}


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except TrainingError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _not_finite(model: str) -> dict[str, Any]:
    """A teacher log-probability of NaN in the second data rank's data, and a weight so large that
    only the gradient overflows.
    """
    trainer = trainer_of(model, settings_of())
    before = weights_digest(trainer)
    microbatches = microbatches_of(0)
    if parallel.data_rank() == 1:
        poisoned = np.where(microbatches[0].loss_mask, np.float32("nan"), np.float32(0))
        microbatches[0] = dataclasses.replace(microbatches[0], teacher_logprobs=poisoned)
    loss = refused(lambda: trainer.train_step(microbatches))

    class Steep:
        """A finite loss with an infinite gradient."""

        def __call__(self, logprobs: torch.Tensor, batch: Any) -> Any:
            result = Lightning()(logprobs, batch)
            return dataclasses.replace(
                result, loss_sum=result.loss_sum + (logprobs - logprobs.detach()).abs().sqrt().sum()
            )

    trainer.objective = Steep()
    gradient = refused(lambda: trainer.train_step(microbatches_of(0)))
    return {
        "loss": loss,
        "gradient": gradient,
        "same weights": weights_digest(trainer) == before,
        "step": trainer.step,
    }


def _unequal(model: str) -> str:
    trainer = trainer_of(model, settings_of())
    microbatches = microbatches_of(0)
    return refused(lambda: trainer.train_step(microbatches[: 1 + parallel.data_rank()]))
