"""What the ranks of test_hybrid_optimizer.py run: trainings whose optimizer is offloaded to the
CPU.

Megatron-Core's HybridDeviceOptimizer moves the state of parameters whose ``is_cuda`` is true. Here
a
CPU stands for the GPU: every tensor says that it is on one, but those that were pinned, and what is
made of them. All else is Megatron-Core's own code.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import optimizer_config

from lopd.errors import ConfigError
from lopd.megatron.checkpoints import parameter_state, writing
from lopd.megatron.model import overrides
from lopd.megatron.ranks import parallel
from tests.megatron.trainer_cases import (
    microbatches_of,
    settings_of,
    train,
    trainer_of,
    weights_digest,
)

OFFLOAD = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0, "pin_cpu_grads": False}
CASES: dict[str, dict[str, Any]] = {
    "float32 weights by Megatron": OFFLOAD,
    "precision-aware": {**OFFLOAD, "use_precision_aware_optimizer": True},
    "half of it": {
        **OFFLOAD,
        "optimizer_offload_fraction": 0.5,
        "use_precision_aware_optimizer": True,
    },
    "overlapped": {
        **OFFLOAD,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    },
}
FIRST_STEPS = 3
LAST_STEP = 6


class OnHost(torch.Tensor):
    """A tensor in the host's memory. What torch makes of it is one too."""


def _is_cuda(tensor: torch.Tensor) -> bool:
    """What HybridDeviceOptimizer, and nobody else, is told."""
    asks = sys._getframe(1).f_globals["__name__"]
    return asks.endswith(".hybrid_optimizer") and not isinstance(tensor, OnHost)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Lets Megatron-Core offload from this CPU to this CPU."""
    refuse = overrides._refuse_missing_hardware
    pin = torch.Tensor.pin_memory
    read = parameter_state.HybridState.read

    def read_plain(self: Any, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {
            kind: tensor.as_subclass(torch.Tensor) for kind, tensor in read(self, kinds).items()
        }

    newest = optimizer_config.is_te_min_version
    optimizer_config.is_te_min_version = lambda *_, **__: True
    parameter_state.HybridState.read = read_plain  # type: ignore[method-assign]
    overrides._refuse_missing_hardware = lambda table, where: None
    torch.Tensor.pin_memory = lambda self: self.as_subclass(OnHost)  # type: ignore[method-assign]
    torch.Tensor.is_cuda = property(_is_cuda)  # type: ignore[assignment]
    try:
        yield
    finally:
        overrides._refuse_missing_hardware = refuse
        torch.Tensor.pin_memory = pin  # type: ignore[method-assign]
        optimizer_config.is_te_min_version = newest
        parameter_state.HybridState.read = read  # type: ignore[method-assign]
        del torch.Tensor.is_cuda


def resume_offloaded(model: str, folder: str) -> dict[str, Any]:
    """Compare a training that was saved and continued with an unbroken one, on two ranks."""
    with as_on_a_gpu():
        results = {
            name: _there_and_back(model, folder, name, table) for name, table in CASES.items()
        }
        results["kept on the GPU"] = _unbroken(model, {})
        results["another layout"] = _crossed(model, folder, {"expert": 1}, CASES["precision-aware"])
        results["no longer offloaded"] = _crossed(model, folder, {"expert": 2}, {})
        with pytest.raises(ConfigError) as refusal:
            trainer_of(model, _settings(OFFLOAD, dtype="float32"))
        results["refused"] = str(refusal.value)
        results["control: weights of the copies stay"] = _with_stale_copies(model, folder)
        results["control: the count stands still"] = _with_wrong_count(model, folder)
        results["background"] = _written_late(model, folder)
    parallel.shutdown()
    return results


def _settings(
    table: dict[str, Any],
    layout: dict[str, int] | None = None,
    dtype: str = "bfloat16",
    **fields: Any,
) -> Any:
    return settings_of(
        layout or {"expert": 2}, num_steps=LAST_STEP, dtype=dtype, megatron=table, **fields
    )


def _unbroken(model: str, table: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    trainer = trainer_of(model, _settings(table, dtype=dtype))
    figures = train(trainer, LAST_STEP)
    return {**figures, "weights": weights_digest(trainer)}


def _there_and_back(
    model: str, folder: str, name: str, table: dict[str, Any], dtype: str = "bfloat16"
) -> dict[str, Any]:
    path = str(Path(folder) / name.replace(" ", "-"))
    first = trainer_of(model, _settings(table, dtype=dtype), checkpoints=path)
    kinds = [type(each.optimizer).__name__ for each in first.optimizer.megatron.chained_optimizers]
    train(first, FIRST_STEPS)
    first.save_checkpoint({})
    second = trainer_of(model, _settings(table, dtype=dtype), checkpoints=path)
    second.resume()
    figures = train(second, LAST_STEP)
    resumed = {**figures, "weights": weights_digest(second)}
    return {
        "kinds": kinds,
        "offloaded": _num_offloaded(first),
        "resumed": resumed,
        "unbroken": _unbroken(model, table, dtype),
    }


def _num_offloaded(trainer: Any) -> list[int]:
    """Weights whose state is on the CPU, and all, of this rank."""
    hybrids = [each.optimizer for each in trainer.optimizer.megatron.chained_optimizers]
    away = sum(p.numel() for each in hybrids for p in each.gpu_params_map_cpu_copy)
    return [
        away,
        sum(p.numel() for each in hybrids for group in each.param_groups for p in group["params"]),
    ]


def _crossed(
    model: str, folder: str, layout: dict[str, int], table: dict[str, Any]
) -> dict[str, Any]:
    """The precision-aware case's checkpoint, gone on with otherwise."""
    told: list[str] = []
    trainer = trainer_of(
        model, _settings(table, layout), checkpoints=str(Path(folder) / "precision-aware")
    )
    trainer.resume(told.append)
    return {**train(trainer, LAST_STEP), "told": told}


def _with_stale_copies(model: str, folder: str) -> dict[str, Any]:
    """The copies on the CPU keep the weights of the beginning."""
    write = parameter_state.HybridState.write

    def write_moments(self: Any, tensors: Any) -> None:
        held = self.read(tuple(tensors))
        for kind in parameter_state.MOMENTS:
            held[kind].copy_(tensors[kind])

    parameter_state.HybridState.write = write_moments  # type: ignore[method-assign]
    found = _crossed(model, folder, {"expert": 2}, CASES["precision-aware"])
    parameter_state.HybridState.write = write  # type: ignore[method-assign]
    return found


def _with_wrong_count(model: str, folder: str) -> dict[str, Any]:
    trainer = trainer_of(
        model,
        _settings(CASES["precision-aware"]),
        checkpoints=str(Path(folder) / "precision-aware"),
    )
    trainer.resume()
    trainer.optimizer.set_num_updates(0)
    return train(trainer, LAST_STEP)


def _written_late(model: str, folder: str) -> dict[str, Any]:
    """Write a checkpoint in the background only after the next step has changed the state."""
    found = {}
    own_copies = writing.own_copies
    for name, copies in (
        ("copied", own_copies),
        ("control: not copied", lambda staged, sources: staged),
    ):
        writing.own_copies = copies
        path = str(Path(folder) / f"background-{name.split()[-1]}")
        table = CASES["precision-aware"]
        first = trainer_of(model, _settings(table, checkpoint_in_background=True), checkpoints=path)
        train(first, FIRST_STEPS)
        write = writing.Writing._write
        changed = threading.Event()

        def write_late(self: Any, act: Any, write: Any = write, changed: Any = changed) -> None:
            assert changed.wait(500)
            write(self, act)

        writing.Writing._write = write_late  # type: ignore[method-assign]
        first.save_checkpoint({})
        first.train_step(microbatches_of(FIRST_STEPS))
        writing.Writing._write = write  # type: ignore[method-assign]
        changed.set()
        first.finish_checkpoint()
        second = trainer_of(model, _settings(table), checkpoints=path)
        second.resume()
        found[name] = train(second, LAST_STEP)
    writing.own_copies = own_copies
    return found
