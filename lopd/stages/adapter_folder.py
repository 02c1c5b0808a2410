"""Adapters on disk, as PEFT reads them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopd.artifacts import (
    fsync_folder,
    publish_bytes,
    publish_json,
    remove_folder,
    storage_errors,
)
from lopd.config import LoraSection
from lopd.megatron.ranks.first_rank import run_on_first_rank

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# What PEFT calls the parts of Megatron-Core's layers. The names are those of all models that the
# trainer knows.
_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


def save_adapter(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, lora: LoraSection, base: Path
) -> None:
    """Write adapters as a folder of PEFT. Collective where the tensors are.

    Global rank 0 writes. All ranks return when the folder is published. An older folder of that
    name is replaced.

    Args:
        tensors: (PEFT's name, tensor), as Trainer.export_adapters gives them.
        folder: Where the adapters go.
        lora: Their settings.
        base: The Hugging Face folder of the model that they belong to.

    Raises:
        ArtifactError: The folder cannot be written. Every rank raises it.
    """
    # PEFT has one file for all adapters. They are on the CPU, and small beside the model.
    collected = dict(tensors)
    run_on_first_rank(lambda: _write(collected, folder, peft_config(lora, base)))


def _write(tensors: dict[str, Tensor], folder: Path, config: dict[str, Any]) -> None:
    # Imported here, because it imports torch, and the parent process needs none.
    from safetensors.torch import save

    partial = folder.with_name(f".{folder.name}.partial")
    # A process that was killed may have left a part.
    remove_folder(partial)
    publish_bytes(partial / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    publish_json(partial / CONFIG, config)
    with storage_errors(folder):
        # The training publishes its result after this. Without a result it is repeated from its
        # newest checkpoint, so that a kill between these two lines loses nothing.
        remove_folder(folder)
        partial.rename(folder)
        fsync_folder(folder.parent)


def peft_config(lora: LoraSection, base: Path) -> dict[str, Any]:
    """Return what adapter_config.json holds.

    Args:
        lora: The settings of the adapters.
        base: The folder of the model that they belong to.
    """
    modules = [module for target in lora.targets for module in _MODULES[target]]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # Not the whole path: equal trainings in two folders have equal files.
        "base_model_name_or_path": "/".join(base.parts[-2:]),
        "r": lora.rank,
        # PEFT reads a whole number in most adapters, and takes any number.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": sorted(set(modules)),
        "lora_dropout": 0.0,
        "bias": "none",
        # The weights are [out, in], as in torch's linear layers.
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
