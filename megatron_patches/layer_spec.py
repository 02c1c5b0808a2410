"""Layer specs: which modules a transformer layer is made of."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_patches.attention import PackedAttention
from megatron_patches.norm import SequenceParallelRMSNorm


def has_transformer_engine() -> bool:
    """Whether Megatron-Core has found Transformer Engine, and there is a GPU for it."""
    return bool(gpt_layer_specs.HAVE_TE) and torch.cuda.is_available()


def decoder_spec(config: Any, *, qk_norm: bool, engine: bool) -> TransformerBlockSubmodules:
    """The decoder's layers and last norm: Transformer Engine's where engine, else the local ones.
    Both are called in the same way, with packed sequences.
    """
    return engine_spec(config, qk_norm=qk_norm) if engine else local_spec(config, qk_norm=qk_norm)


def engine_spec(config: Any, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """The decoder of Transformer Engine's modules, as Megatron-Core puts them together; experts in
    one grouped product where config.moe_grouped_gemm.
    """
    from megatron.core.extensions.transformer_engine import TENorm

    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=qk_norm,
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TENorm
    )


def local_spec(config: Any, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """The decoder without Transformer Engine: Megatron-Core's local layers with our norm and
    attention.

    Upstream: megatron/core/models/gpt/gpt_layer_specs.py:get_gpt_layer_local_spec. Checked with
    megatron-core 0.16.1 and 0.18.2. Raises RuntimeError if its parts are not the ones known here.
    """
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=qk_norm, normalization="RMSNorm"
    )
    parts = layer.submodules
    attention = parts.self_attention.submodules
    for owner, names in (
        (parts, ("input_layernorm", "pre_mlp_layernorm")),
        (attention, ("core_attention", "q_layernorm", "k_layernorm")),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        if missing:
            raise RuntimeError(
                f"megatron_patches: local_spec no longer fits: {type(owner).__name__} has no {', '.join(missing)}; checked with megatron-core 0.16.1 and 0.18.2"
            )
    parts.input_layernorm = parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention.core_attention = PackedAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=SequenceParallelRMSNorm
    )
