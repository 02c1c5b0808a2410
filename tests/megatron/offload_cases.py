"""What the ranks of tests/megatron/test_offload.py run: trainings that leave the device between
their steps, and one that does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from tests.megatron.trainer_cases import (
    microbatches_of,
    settings_of,
    train,
    trainer_of,
    weights_digest,
)

CASES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "frozen": {"dtype": "bfloat16", "optimizer": {"lr": 1e-2, "freeze_router": True}},
}
PLAIN = {"distributed_optimizer": False}
STEPS = 3


def one_case(
    model: str, layout: dict[str, Any], fields: dict[str, Any], checkpoints: str | None = None
) -> dict[str, Any]:
    settings = settings_of(layout, **fields)
    stayed = _trained(trainer_of(model, settings))
    trainer = trainer_of(model, settings, checkpoints=checkpoints)
    memory = []
    resident = _resident(trainer)
    return {
        "stayed": stayed,
        "left": _trained(trainer, memory),
        "memory": memory,
        "resident": resident,
    }


def leave_and_come_back(model: str, folder: str, layout: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, fields in CASES.items():
        for optimizer, more in {"distributed": {}, "plain": PLAIN}.items():
            results[f"{name} {optimizer}"] = one_case(
                model, {**layout, **more}, fields, f"{folder}/{name}-{optimizer}"
            )
    forgetful = trainer_of(model, settings_of(layout))
    results["forgetful"] = _trained(_without_copies(forgetful), [])
    results["refused"] = _refusals(model, layout, folder)
    parallel.shutdown()
    return results


def on_device(model: str) -> dict[str, Any]:
    """On a GPU, where a kernel need not repeat to the bit: losses with and without leaving, and
    bytes as the allocator counts them.
    """
    stayed = train(trainer_of(model, settings_of(dtype="bfloat16")), STEPS)["loss"]
    trainer = trainer_of(model, settings_of(dtype="bfloat16"))
    left = []
    allocated = []
    reserved = []

    def measure() -> None:
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())

    for step in range(STEPS):
        left += train(trainer, step + 1)["loss"]
        torch.cuda.empty_cache()
        held = trainer.memory.held_bytes()
        measure()
        trainer.memory.offload_optimizer()
        measure()
        trainer.memory.offload_weights()
        measure()
        trainer.memory.reload()
        measure()
    parallel.shutdown()
    return {
        "stayed": stayed,
        "left": left,
        "held": held,
        "allocated": allocated,
        "reserved": reserved,
    }


def _trained(trainer: Trainer, memory: list[dict[str, int]] | None = None) -> dict[str, Any]:
    """Three steps and a checkpoint; memory: leave the device after each, and write down what is
    held.
    """
    losses: list[float] = []
    for step in range(STEPS):
        losses += train(trainer, step + 1)["loss"]
        if memory is not None:
            memory.append(trainer.memory.held_bytes())
            trainer.memory.offload_optimizer()
            memory.append(trainer.memory.held_bytes())
            assert weights_digest(trainer)  # as a sync does
            trainer.memory.offload_weights()
            memory.append(trainer.memory.held_bytes())
            trainer.memory.reload()
            trainer.memory.reload()
            memory.append(trainer.memory.held_bytes())
        if step == 1 and trainer._checkpoints is not None:
            trainer.save_checkpoint({})
    state = [
        value
        for chained in trainer.optimizer.megatron.chained_optimizers
        for held in chained.optimizer.state.values()
        for value in held.values()
    ]
    moments = [
        value.double().abs().sum().item() for value in state if isinstance(value, torch.Tensor)
    ]
    return {"loss": losses, "weights": weights_digest(trainer), "moments": moments}


def _resident(trainer: Trainer) -> int:
    """Bytes of the model's parameters as they are counted without the code under test."""
    return sum(
        parameter.numel() * parameter.element_size() for parameter in trainer.module.parameters()
    )


def _without_copies(trainer: Trainer) -> Trainer:
    """The control: comes back with zeros in the optimizer's state."""
    release = trainer.memory._release
    trainer.memory._release = lambda kind, storages, keep: release(
        kind, storages, keep=keep and kind != "optimizer"
    )  # type: ignore[method-assign]
    return trainer


def _refusals(model: str, layout: dict[str, Any], folder: str) -> list[str]:
    trainer = trainer_of(model, settings_of(layout), checkpoints=f"{folder}/refused")
    trainer.train_step(microbatches_of(0))
    said = []

    def refused(action: Any) -> None:
        try:
            action()
        except AssertionError as error:
            said.append(str(error))

    trainer.memory.offload_optimizer()
    refused(lambda: trainer.train_step(microbatches_of(1)))
    refused(lambda: trainer.save_checkpoint({}))
    refused(trainer.memory.offload_optimizer)
    trainer.memory.offload_weights()
    refused(trainer.export)
    refused(lambda: trainer.logprobs(microbatches_of(0)[0]))
    refused(trainer.memory.offload_weights)
    assert not list(Path(folder, "refused").glob("step-*"))
    trainer.memory.reload()
    trainer.train_step(microbatches_of(1))
    return said
