"""Bodies for tests.megatron.launch.run_ranks: trainings of adapters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from safetensors.torch import load_file, save_file

from lopd.megatron.training.trainer import Trainer
from lopd.megatron.weights.transfer import export_hf, local_adapters, local_parameters, save_hf
from lopd.stages.adapter_folder import CONFIG, WEIGHTS, save_adapter
from tests.megatron.parity_cases import Case, difference
from tests.megatron.trainer_cases import (
    microbatches_of,
    refused,
    settings_of,
    train,
    trainer_of,
    weights_digest,
)

LORA = {"rank": 4, "alpha": 8.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "data, plain optimizer": {"distributed_optimizer": False},
    "tensor and expert": {"tensor": 2, "expert": 2},
    "tensor": {"tensor": 2},
    "expert tensor": {"expert_tensor": 2},
    "pipeline": {"pipeline": 2},
}
SAVED_AT = 2
LAST_STEP = 4


def lora_trainer(
    model: str, layout: dict[str, Any] | None = None, checkpoints: str | None = None, **fields: Any
) -> Trainer:
    fields = {"lora": LORA, **fields}
    return trainer_of(model, settings_of(layout, **fields), checkpoints=checkpoints)


# ---- one rank ----


def one_rank(model: str, dense: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, source in (("experts", model), ("dense", dense)):
        root = Path(folder) / name
        trainer = lora_trainer(source)
        before = _frozen_bytes(trainer)
        results[name] = train(trainer)
        results[name]["frozen weights stay"] = _frozen_bytes(trainer) == before
        results[name]["trained"] = _trained(trainer)
        results[name] |= _compare_exports(trainer, Path(source), root)
        results[name]["same data"] = _same_data(source)
    results["full recompute"] = train(lora_trainer(model, recompute="full"))
    unhooked = lora_trainer(model, recompute="full")
    unhooked.module.embedding._forward_hooks.clear()
    results["full recompute, no gradient asked for"] = train(unhooked)
    only = {**LORA, "targets": ["linear_fc1"]}
    results["experts alone"] = train(lora_trainer(model, lora=only))
    results["alpha doubled"] = train(lora_trainer(model, lora={**LORA, "alpha": 16.0}))
    results["bfloat16"] = _bfloat16(model, Path(folder) / "bfloat16")
    return results


def _same_data(model: str) -> list[float]:
    """The losses of steps that all learn from the same responses."""
    trainer = lora_trainer(model, optimizer={"lr": 1e-3})
    return [trainer.train_step(microbatches_of(0)).loss for _ in range(4)]


def _frozen_bytes(trainer: Trainer) -> list[int]:
    """A checksum of each weight that is not trained."""
    return [
        int(parameter.detach().view(torch.uint8).long().sum())
        for parameter in trainer.module.parameters()
        if not parameter.requires_grad
    ]


def _trained(trainer: Trainer) -> dict[str, Any]:
    """What has a gradient, and how many numbers the buffers of gradients and the optimizer have."""
    parameters = dict(trainer.module.named_parameters())
    adapters = [parameter for parameter in parameters.values() if parameter.requires_grad]
    buffers = [*trainer.model.buffers, *trainer.model.expert_parallel_buffers]
    state = [
        value
        for chained in trainer.optimizer.megatron.chained_optimizers
        for held in chained.optimizer.state.values()
        for value in held.values()
        if value.dim() > 0
    ]
    return {
        "names": sorted(
            {name.rpartition(".")[2] for name, p in parameters.items() if p.requires_grad}
        ),
        "adapters": sum(parameter.numel() for parameter in adapters),
        "gradients": sum(buffer.numel_unpadded for buffer in buffers),
        "moments": sum(value.numel() for value in state),
    }


def _compare_exports(trainer: Trainer, source: Path, root: Path) -> dict[str, Any]:
    """The model with its adapters, as it is exported, against the base and PEFT's adapters."""
    settings = trainer.settings.lora
    save_hf(trainer.export(), root / "merged", source=source, shard_bytes=2**30)
    save_adapter(trainer.export_adapters(), root / "adapter", lora=settings, base=source)
    merge_by_peft_names(source, root / "adapter", root / "by names")
    merge_by_peft_names(source, root / "adapter", root / "doubled", times=2.0)
    merged = load_file(root / "merged" / "model.safetensors")
    by_names = load_file(root / "by names" / "model.safetensors")
    base = load_file(source / "model.safetensors")
    plain = {
        name: tensor
        for bucket in export_hf(trainer.module, trainer.architecture, bucket_bytes=2**20)
        for name, tensor in bucket
    }
    return {
        "names": sorted(merged) == sorted(base),
        "tensors": max((merged[name] - by_names[name]).abs().max().item() for name in base),
        "changed": sorted(name for name in base if not torch.equal(merged[name], base[name])),
        "base": all(torch.equal(plain[name], base[name]) for name in base),
        # The trainer's model computes with its adapters beside the weights.
        "merged": _apart(trainer, root / "merged"),
        "by names": _apart(trainer, root / "by names"),
        "doubled": _apart(trainer, root / "doubled"),
        "without": _apart(trainer, source),
        "config": json.loads((root / "adapter" / CONFIG).read_text()),
        "left": sorted(path.name for path in root.iterdir()),
    }


def _apart(trainer: Trainer, folder: Path) -> float:
    """The largest difference of logits, log-probabilities and entropies to transformers."""
    trainer.module.eval()
    return max(difference(trainer.module, Case(folder)).values())


def merge_by_peft_names(source: Path, adapter: Path, target: Path, times: float = 1.0) -> None:
    """Add an adapter to a checkpoint by the names alone that PEFT's documents give."""
    config = json.loads((adapter / CONFIG).read_text())
    tensors = load_file(source / "model.safetensors")
    matrices = load_file(adapter / WEIGHTS)
    for name, b in matrices.items():
        stem, matrix, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        if matrix == "lora_B":
            assert stem.rpartition(".")[2] in config["target_modules"]
            a = matrices[name.replace("lora_B", "lora_A")]
            tensors[f"{stem}.weight"] += times * config["lora_alpha"] / config["r"] * (b @ a)
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _bfloat16(model: str, root: Path) -> dict[str, Any]:
    """The types of the exports, and a training that goes on from a checkpoint."""
    fields = {"dtype": "bfloat16", "num_steps": LAST_STEP}
    first = lora_trainer(model, checkpoints=str(root), **fields)
    train(first, SAVED_AT)
    first.save_checkpoint({})
    resumed = lora_trainer(model, checkpoints=str(root), **fields)
    resumed.resume()
    return {
        "types": sorted({str(tensor.dtype) for _, tensor in first.export_adapters()}),
        "merged types": sorted({str(t.dtype) for bucket in first.export() for _, t in bucket}),
        "unbroken": train(first, LAST_STEP),
        "resumed": train(resumed, LAST_STEP),
        "weights": [weights_digest(first), weights_digest(resumed)],
    }


# ---- two ranks ----


def two_ranks(model: str, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {
        name: train(lora_trainer(model, layout)) for name, layout in LAYOUTS.items()
    }
    results["unmarked"] = train(_unmark(lora_trainer(model, LAYOUTS["tensor"])))
    results["counted twice"] = _counted_twice(model)
    results["adapters"] = _adapters_of(model)
    results["checkpoints"] = _checkpoints(model, Path(folder))
    return results


def _unmark(trainer: Trainer) -> Trainer:
    """Control: the matrices that all tensor ranks have, as plain weights."""
    for name, parameter in trainer.module.named_parameters():
        if "lora_" in name:
            parameter.sequence_parallel = False
    return trainer


def _counted_twice(model: str) -> dict[str, list[float]]:
    """Control: what all ranks of an expert have counts in the norm on each of them."""
    trainer = lora_trainer(model, LAYOUTS["expert tensor"])
    for chained in trainer.optimizer.megatron.chained_optimizers:
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.shared = False
    return train(trainer)


def _adapters_of(model: str) -> dict[str, Any]:
    """What rank 0 gets of the adapters before any step, in two layouts."""
    found = {}
    for name in ("data", "tensor and expert"):
        trainer = lora_trainer(model, LAYOUTS[name])
        tensors = dict(trainer.export_adapters())
        found[name] = {key: tensor.double().sum().item() for key, tensor in tensors.items()}
    return found


def _checkpoints(model: str, folder: Path) -> dict[str, Any]:
    """A training of adapters that goes on from its checkpoint, in its layout and in others."""
    results: dict[str, Any] = {}
    for name in ("tensor and expert", "expert tensor", "data, plain optimizer"):
        place = str(folder / name)
        first = lora_trainer(model, LAYOUTS[name], place, num_steps=LAST_STEP)
        train(first, SAVED_AT)
        first.save_checkpoint({"cursor": SAVED_AT})
        resumed = lora_trainer(model, LAYOUTS[name], place, num_steps=LAST_STEP)
        state = resumed.resume()
        results[name] = {
            "state": state,
            "unbroken": train(first, LAST_STEP),
            "resumed": train(resumed, LAST_STEP),
            "weights": [weights_digest(first), weights_digest(resumed)],
        }
    saved = folder / "tensor and expert"
    stored = load_tensors_metadata(str(saved / "step-000002"))
    results["stored"] = {name: math.prod(each.global_shape) for name, each in stored.items()}
    results["adapters"] = _num_adapters(model)
    for name in ("data", "pipeline"):
        other = lora_trainer(model, LAYOUTS[name], str(saved), num_steps=LAST_STEP)
        other.resume(lambda note: None)
        results[f"tensor and expert -> {name}"] = train(other, LAST_STEP)
    forgetful = lora_trainer(model, LAYOUTS["data"], str(saved), num_steps=LAST_STEP)
    forgetful.resume(lambda note: None)
    with torch.no_grad():
        for name, parameter in local_parameters(forgetful.module, forgetful.architecture).items():
            if name.endswith("linear_proj.lora_A"):
                parameter.mul_(1.01)
    forgetful.optimizer.megatron.reload_model_params()
    results["a matrix changed"] = train(forgetful, LAST_STEP)
    more = {**LORA, "rank": 8}
    results["another rank"] = refused(
        lambda: lora_trainer(model, LAYOUTS["tensor and expert"], str(saved), lora=more).resume()
    )
    results["no adapters"] = refused(
        lambda: trainer_of(
            model, settings_of(LAYOUTS["tensor and expert"]), checkpoints=str(saved)
        ).resume()
    )
    return results


def _num_adapters(model: str) -> int:
    trainer = lora_trainer(model)
    return sum(
        tensor.numel() for tensor in local_adapters(trainer.module, trainer.architecture).values()
    )
