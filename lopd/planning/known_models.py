"""The shapes of public models, so that a plan needs neither a download nor the hub.

They were written down from the config.json files that the models' authors publish. Only the fields
that lopd.megatron.weights.families reads are here. If a model's folder has its own config.json,
that one wins.
"""

from __future__ import annotations

from typing import Any

# What all dense Qwen3 models share. The smaller ones tie their embeddings and say so below.
_QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
}
# The base models have fewer positions than the models trained further.
_BASE = {"max_position_embeddings": 32768}
# What all Qwen3 models with experts share.
_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    # Every layer has experts.
    "decoder_sparse_step": 1,
}
# The models of July 2025 (2507) read 262,144 tokens.
_LONG = {"max_position_embeddings": 262144, "rope_theta": 10000000}


def _shape(hidden: int, layers: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    """Return the config.json of a Qwen3 model.

    Args:
        hidden: Size of the hidden states.
        layers: Number of layers.
        heads: Number of attention heads.
        ffn: Width of the MLP.
        **more: Fields that differ from those of the dense models.
    """
    return {
        **_QWEN3,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        **more,
    }


# Hidden size, layers, heads, and width of the MLP.
_DENSE = {
    "Qwen3-0.6B": _shape(1024, 28, 16, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B": _shape(2048, 28, 16, 6144, tie_word_embeddings=True),
    "Qwen3-4B": _shape(2560, 36, 32, 9728, tie_word_embeddings=True),
    "Qwen3-8B": _shape(4096, 36, 32, 12288),
    "Qwen3-14B": _shape(5120, 40, 40, 17408),
}
# intermediate_size stands in the config.json of models with experts too, but no layer uses it.
_A3B = _shape(2048, 48, 32, 6144, moe_intermediate_size=768, **_MOE)
_A22B = _shape(4096, 94, 64, 12288, moe_intermediate_size=1536, **_MOE)

# The names are those of the hub without the organisation.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    **_DENSE,
    **{f"{name}-Base": {**config, **_BASE} for name, config in _DENSE.items()},
    # No base model of this size is published.
    "Qwen3-32B": _shape(5120, 64, 64, 25600),
    "Qwen3-4B-Thinking-2507": {**_DENSE["Qwen3-4B"], **_LONG, "rope_theta": 5000000},
    "Qwen3-30B-A3B": _A3B,
    "Qwen3-30B-A3B-Base": {**_A3B, **_BASE},
    "Qwen3-30B-A3B-Thinking-2507": {**_A3B, **_LONG},
    "Qwen3-30B-A3B-Instruct-2507": {**_A3B, **_LONG},
    "Qwen3-235B-A22B-Thinking-2507": {**_A22B, **_LONG, "rope_theta": 5000000},
    # A teacher of the paper's comparison of teachers. It is of the previous family.
    "QwQ-32B": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "intermediate_size": 27648,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
    },
}
