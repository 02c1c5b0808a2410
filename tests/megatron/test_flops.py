"""Operations counted by formula are those that torch counts while a Hugging Face model of the same
shape runs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lopd.megatron.training.flops import active_matrix_weights, peak_flops, training_flops
from lopd.megatron.weights.architecture import read_architecture

LENGTH = 96


@pytest.mark.parametrize("num_experts", [0, 4], ids=["dense", "mixture of experts"])
def test_the_formula_counts_what_torch_counts(num_experts: int, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    about = {"head_dim": 32, "attn_implementation": "eager", "tie_word_embeddings": False, **sizes}
    if num_experts:
        experts = {
            "num_experts": num_experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**about, **experts))
        model.set_experts_implementation("eager")
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**about))
    model.config.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    tokens = torch.randint(0, 320, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    # Eager attention masks the upper half of the scores, but computes it.
    uncausal = (
        training_flops(arch, [LENGTH])
        - training_flops(arch, [])
        + 6 * arch.num_layers * arch.num_heads * arch.head_dim * LENGTH**2
    )
    assert counter.get_total_flops() == pytest.approx(uncausal, rel=0.01)
    without_heads = dataclasses.replace(arch, vocab_size=1)
    assert training_flops(without_heads, [LENGTH]) < 0.9 * training_flops(arch, [LENGTH]), (
        "a forgotten LM head would not be noticed"
    )


def test_packed_sequences_do_not_attend_to_each_other(tmp_path: Path) -> None:
    arch = read_architecture(_qwen3_30b_a3b(tmp_path))
    apart = training_flops(arch, [4096] * 4)
    together = training_flops(arch, [16384])
    assert together - apart == 6 * 48 * 32 * 128 * (16384**2 - 4 * 4096**2)


def test_active_weights_of_a_known_model(tmp_path: Path) -> None:
    """Qwen3-30B-A3B activates 3.3 billion parameters, 0.31 billion of which are the embedding that
    multiplies nothing.
    """
    assert active_matrix_weights(read_architecture(_qwen3_30b_a3b(tmp_path))) == pytest.approx(
        3.04e9, rel=0.01
    )


def _qwen3_30b_a3b(folder: Path) -> Path:
    shape = {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bfloat16") == peak
    assert peak_flops(name, "float32") is None
