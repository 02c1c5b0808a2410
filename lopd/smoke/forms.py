"""The two forms of the smoke run, and the model folder with random weights.

A form has sizes, a layout and settings. NODE is for 8 GPUs, CPU for two processes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd.config import SGLangSection, TrainSection
from lopd.megatron.weights.architecture import Architecture, read_architecture

# Files of a tokenizer's folder that a server reads.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# What both models share: the config.json of Qwen3-MoE, with 4 layers.
_COMMON = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "num_hidden_layers": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "router_aux_loss_coef": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The sizes of Qwen3-30B-A3B.
_NODE_MODEL = {
    **_COMMON,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
# Small sizes, for two processes without a GPU.
_CPU_MODEL = {
    **_COMMON,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class Form:
    """Everything that differs between a node and a CPU.

    Attributes:
        name: What is tried, in words.
        model: The config.json of the model.
        training: The settings of the trainer.
        server: The settings of the SGLang server.
        num_sequences: Sequences of a training step.
        sequence_len: The most tokens of a sequence.
        collective_elements: Float32 numbers that all ranks sum up.
        attention_tolerance: The largest difference between packed attention and torch's attention
            over each sequence alone.
        transports: The transports by which weights are synced, in order.
    """

    name: str
    model: dict[str, Any]
    training: TrainSection
    server: SGLangSection
    num_sequences: int
    sequence_len: int
    collective_elements: int
    attention_tolerance: float
    transports: tuple[str, ...]


NODE = Form(
    name="8 GPUs: Qwen3-30B-A3B with 4 layers, TP4 EP8",
    model=_NODE_MODEL,
    # The layout and the microbatch of the paper's 30B-A3B run.
    training=TrainSection.model_validate(
        {
            "num_steps": 2,
            "max_tokens_per_microbatch": 12288,
            # As in the paper's run, which recomputes every layer.
            "recompute": "full",
            "parallel": {"ranks": 8, "tensor": 4, "expert": 8},
            "optimizer": {"lr": 1e-5},
            "timeout_s": 300,
        }
    ),
    # The server shares GPUs with the trainer, so it takes less than a third of their memory.
    server=SGLangSection.model_validate(
        {
            "tensor": 2,
            # More than the answers need: the cache is made for real lengths.
            "context_length": 4096,
            "mem_fraction": 0.3,
            "max_running_requests": 16,
            "restarts": 0,
        }
    ),
    # About 48,000 tokens, which make several microbatches.
    num_sequences=32,
    sequence_len=2048,
    # 512 MiB, so that the time is that of the bandwidth and not of the latency.
    collective_elements=2**27,
    # Bfloat16 has 8 bits of mantissa: a few units in the last place of numbers near 1.
    attention_tolerance=2e-2,
    # NCCL takes no two ranks on one GPU, so "distributed" cannot be tried on shared GPUs.
    transports=("disk", "tensor"),
)
CPU = Form(
    name="CPU: a tiny mixture of experts, TP2 EP2",
    model=_CPU_MODEL,
    training=TrainSection.model_validate(
        {
            "num_steps": 2,
            "max_tokens_per_microbatch": 512,
            "dtype": "float32",
            "parallel": {"ranks": 2, "tensor": 2, "expert": 2},
            "optimizer": {"lr": 1e-3},
            "timeout_s": 120,
        }
    ),
    server=SGLangSection.model_validate(
        {
            "dtype": "float32",
            "context_length": 128,
            "mem_fraction": 0.1,
            "max_total_tokens": 4096,
            "max_running_requests": 8,
            "restarts": 0,
        }
    ),
    # About 380 tokens, which fit into one microbatch.
    num_sequences=8,
    sequence_len=64,
    # 256 KiB: on a CPU only the result matters.
    collective_elements=2**16,
    # Float32 on both sides, so only the order of sums differs.
    attention_tolerance=1e-5,
    transports=("disk", "tensor", "distributed"),
)
FORMS = {"node": NODE, "cpu": CPU}


def write_model(form: Form, folder: Path, tokenizer: Path) -> Architecture:
    """Write a Hugging Face checkpoint with random weights.

    Args:
        form: The form, which has the model's shape.
        folder: The folder to make.
        tokenizer: The folder whose tokenizer is copied. Any will do, because prompts are token ids.

    Returns:
        The shape of the model.
    """
    import torch
    from safetensors.torch import save_file

    from lopd.megatron.weights.hf_mapping import hf_shapes

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(form.model, indent=1), encoding="utf-8")
    for name in _TOKENIZER:
        shutil.copyfile(tokenizer / name, folder / name)
    architecture = read_architecture(folder)
    dtype = getattr(torch, form.model["torch_dtype"])
    # A seed of its own, so that two runs on one machine can be compared.
    generator = torch.Generator().manual_seed(1)
    # The shapes come from the mapping that the trainer reads with, so no tensor is missing.
    tensors = {}
    for name, shape in hf_shapes(architecture).items():
        # Vectors are the weights of norms. Ones keep activations finite at any depth.
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            # 0.02 is the usual standard deviation of fresh weights.
            tensors[name] = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return architecture
