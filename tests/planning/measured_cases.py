"""What a trainer's rank really holds, tensor by tensor and by the system's count: a body for
tests.megatron.launch.run_ranks.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.batching import build_microbatch
from lopd.config import TrainSection
from lopd.megatron.model.build import forward
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.objective.supervised import Supervised
from lopd.records import Microbatch, Sample

LENGTH = 256
SEQUENCES = 4
DENSE = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
}
CASES: dict[str, dict[str, Any]] = {
    "dense float32": {"model": DENSE, "dtype": "float32", "parallel": {"ranks": 2}},
    "dense bfloat16 full recompute": {
        "model": DENSE,
        "dtype": "bfloat16",
        "parallel": {"ranks": 2},
        "recompute": "full",
    },
    "experts bfloat16 EP2": {
        "model": {**DENSE, **EXPERTS},
        "dtype": "bfloat16",
        "parallel": {"ranks": 2, "expert": 2},
    },
    "experts float32 TP2 EP2": {
        "model": {**DENSE, **EXPERTS},
        "dtype": "float32",
        "parallel": {"ranks": 2, "tensor": 2, "expert": 2},
    },
    "experts bfloat16 TP2 EP2 adapters": {
        "model": {**DENSE, **EXPERTS},
        "dtype": "bfloat16",
        "parallel": {"ranks": 2, "tensor": 2, "expert": 2},
        "lora": {"rank": 8},
    },
    "dense bfloat16 undistributed": {
        "model": DENSE,
        "dtype": "bfloat16",
        "parallel": {"ranks": 2, "distributed_optimizer": False},
    },
}


def settings_of(name: str) -> TrainSection:
    case = {key: value for key, value in CASES[name].items() if key != "model"}
    return TrainSection(
        **case, num_steps=2, max_tokens_per_microbatch=LENGTH * SEQUENCES, optimizer={"lr": 1e-4}
    )


def measure(folder: str) -> dict[str, dict[str, float]]:
    """Of every case bytes of this rank: weights, gradients, optimizer, and activations kept for the
    backward pass.
    """
    return {
        name: _measure(
            Path(folder) / str(os.environ["RANK"]) / name.replace(" ", "_"),
            CASES[name],
            settings_of(name),
        )
        for name in CASES
    }


def _measure(folder: Path, case: dict[str, Any], settings: TrainSection) -> dict[str, float]:
    trainer, microbatch = _trainer(folder, case, settings)
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.as_tensor(microbatch.token_ids)
        labels = torch.as_tensor(microbatch.labels)
        forward(
            trainer.module,
            token_ids=tokens,
            cu_seqlens=torch.as_tensor(microbatch.cu_seqlens),
            max_seqlen=microbatch.max_seqlen,
            labels=labels,
        )
    activations = _bytes(kept.values())
    kept.clear()
    trainer.train_step([microbatch])
    return {
        "weights": _bytes(trainer.module.parameters()),
        "gradients": _bytes(
            buffer.grad_data
            for buffer in [*trainer.model.buffers, *trainer.model.expert_parallel_buffers]
        ),
        "optimizer": _bytes(_optimizer_tensors(trainer), exclude=own),
        "activations": activations,
    }


def _trainer(
    folder: Path, case: dict[str, Any], settings: TrainSection
) -> tuple[Trainer, Microbatch]:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case["model"]))
    parallel.initialize(settings.parallel, seed=1, timeout_s=500)
    trainer = Trainer(
        settings,
        model_dir=folder,
        init="random",
        init_std=0.02,
        seed=1,
        objective=Supervised(),
        checkpoint_dir=None,
    )
    generator = np.random.default_rng(parallel.data_rank())
    samples = [
        Sample(
            generator.integers(4, 512, LENGTH).astype(np.int32), np.arange(LENGTH) > 9, None, None
        )
        for _ in range(SEQUENCES)
    ]
    return trainer, build_microbatch(samples, settings.parallel.tensor)


LARGE: dict[str, Any] = {
    "model": {
        **DENSE,
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "intermediate_size": 3072,
        "vocab_size": 16384,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "dtype": "float32",
    "parallel": {"ranks": 1},
}


def large_settings() -> TrainSection:
    return TrainSection(
        dtype="float32",
        num_steps=2,
        max_tokens_per_microbatch=LENGTH * SEQUENCES,
        optimizer={"lr": 1e-4},
    )


def measure_resident(folder: str) -> float:
    """Growth of this process's resident memory at its highest, over two steps of a model of 94
    million parameters.
    """
    small, microbatch = _trainer(
        Path(folder) / "small", {"model": {**DENSE, "hidden_size": 64}}, large_settings()
    )
    small.train_step([microbatch])  # loads every library that a step needs
    del small
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    trainer, microbatch = _trainer(Path(folder) / "large", LARGE, large_settings())
    for _ in range(2):
        trainer.train_step([microbatch])
    return _resident("VmHWM") - before


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    for chained in getattr(
        trainer.optimizer.megatron, "chained_optimizers", [trainer.optimizer.megatron]
    ):
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (
                    value
                    for value in chained.optimizer.state[parameter].values()
                    if isinstance(value, Tensor)
                )


def _bytes(tensors: Any, exclude: Any = ()) -> float:
    """Of each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return float(sum(size for pointer, size in storages.items() if pointer not in exclude))


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
