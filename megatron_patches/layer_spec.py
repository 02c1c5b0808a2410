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
    """Return whether Megatron-Core has found Transformer Engine, and there is a GPU for it."""
    return bool(gpt_layer_specs.HAVE_TE) and torch.cuda.is_available()


def decoder_spec(config: Any, *, qk_norm: bool, engine: bool) -> TransformerBlockSubmodules:
    """Return the decoder's layers and its last norm.

    Both kinds of layers are called in the same way, with packed sequences.

    Args:
        config: The TransformerConfig.
        qk_norm: Whether queries and keys have norms.
        engine: Whether the layers are Transformer Engine's, else the local ones.
    """
    # The choice is the caller's: it depends on the dtype as well.
    return engine_spec(config, qk_norm=qk_norm) if engine else local_spec(config, qk_norm=qk_norm)


def engine_spec(config: Any, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Return the decoder of Transformer Engine's modules, as Megatron-Core puts them together.

    With config.moe_grouped_gemm all experts of a rank are in one grouped product.
    """
    # Imported here, because the module does not import without Transformer Engine.
    from megatron.core.extensions.transformer_engine import TENorm

    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=qk_norm,
    )
    # The layers of this pipeline stage are all alike.
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)


def local_spec(config: Any, *, qk_norm: bool) -> TransformerBlockSubmodules:
    """Return the decoder of Megatron-Core's local layers, with our norm and our attention.

    What upstream does: the parts of get_gpt_layer_local_spec
    (megatron/core/models/gpt/gpt_layer_specs.py) take neither packed sequences nor sequence
    parallelism. attention.py and norm.py state when each of the two replacements can be removed.

    Args:
        config: The TransformerConfig.
        qk_norm: Whether queries and keys have norms.

    Raises:
        RuntimeError: The parts of the upstream layer are not those that are known here.
    """
    # The numbers of heads and sizes come from config when the layer is built.
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=qk_norm, normalization="RMSNorm"
    )
    parts = layer.submodules
    attention = parts.self_attention.submodules
    # To set an attribute that upstream has renamed would succeed, and the layer would keep its own
    # norm and attention. So the names are checked first.
    _require_parts(parts, "input_layernorm", "pre_mlp_layernorm")
    _require_parts(attention, "core_attention", "q_layernorm", "k_layernorm")
    parts.input_layernorm = SequenceParallelRMSNorm
    parts.pre_mlp_layernorm = SequenceParallelRMSNorm
    attention.core_attention = PackedAttention
    # Without norms these two are identities, which take no weight.
    if qk_norm:
        attention.q_layernorm = SequenceParallelRMSNorm
        attention.k_layernorm = SequenceParallelRMSNorm
    layers = [layer] * get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelRMSNorm)


def _require_parts(owner: Any, *names: str) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"megatron_patches: local_spec no longer fits: {type(owner).__name__} has no"
            f" {', '.join(missing)}; checked with megatron-core 0.16.1 and 0.18.2"
        )
