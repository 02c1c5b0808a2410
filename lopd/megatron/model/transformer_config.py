"""Megatron-Core's TransformerConfig of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lopd.config import ParallelSection
from lopd.errors import ConfigError
from lopd.megatron.model import engine
from lopd.megatron.model.fusions import engine_fusions
from lopd.megatron.model.overrides import build
from lopd.megatron.weights.architecture import Architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def transformer_config(
    arch: Architecture,
    *,
    parallel: ParallelSection,
    dtype: str,
    recompute: str,
    moe_aux_loss: float,
    routing_replay: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Return Megatron-Core's configuration of this architecture.

    Args:
        arch: The architecture of the whole model.
        parallel: The layout of the ranks.
        dtype: "float32" or "bfloat16".
        recompute: What the backward pass computes again: "none", "selective" (selective_modules),
            or "full".
        moe_aux_loss: The coefficient of the load-balancing loss. 0 means that there is none.
        routing_replay: Whether routers can replay recorded choices.
        overrides: Fields that win over ours (lopd.megatron.model.overrides).

    Raises:
        ConfigError: Megatron-Core refuses the settings.
    """
    settings = _shape_fields(arch)
    settings |= _parallel_fields(parallel)
    settings |= _number_fields(dtype)
    # The local layers get no fused kernels, so that they run anywhere.
    settings |= {
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    if arch.num_experts:
        settings |= _expert_fields(arch, dtype, moe_aux_loss)
    # After the local layers' fields, of which it turns some on again.
    if engine.uses_engine(dtype):
        settings |= engine_fusions(arch)
    if routing_replay:
        # The fused router asks nobody for a recorded choice, and would go on choosing by itself.
        if (overrides or {}).get("moe_router_fusion"):
            raise ConfigError(
                "moe_router_fusion and routing replay cannot be used together",
                where="distill.megatron",
                limit="exactly moe_router_fusion = false with distill.routing_replay",
                remedy="remove moe_router_fusion",
            )
        settings |= {"moe_enable_routing_replay": True, "moe_router_fusion": False}
    settings |= _recompute_fields(arch, dtype, recompute)
    # The user's fields last: they win.
    config = build(TransformerConfig, {**settings, **(overrides or {})})
    if arch.yarn is not None:
        _set_yarn(config, arch)
    return config


def _shape_fields(arch: Architecture) -> dict[str, Any]:
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_eps,
        # SiLU with a gate is what all families here have.
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        # With dropout the student's log-probabilities would not be those that SGLang computes.
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _parallel_fields(parallel: ParallelSection) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        # MoE with tensor parallelism demands it. For dense models it saves memory.
        "sequence_parallel": parallel.tensor > 1,
        # Packed microbatches differ in length, so the stages tell each other the shape.
        "variable_seq_lengths": parallel.pipeline > 1,
        # Megatron-Core looks at it for dense models too: the default of this field refuses
        # variable_seq_lengths.
        "moe_token_dispatcher_type": "alltoall",
    }


def _number_fields(dtype: str) -> dict[str, Any]:
    return {
        "params_dtype": DTYPES[dtype],
        "pipeline_dtype": DTYPES[dtype],
        "bf16": dtype == "bfloat16",
        "attention_softmax_in_fp32": True,
        # Losses are sums. finalize_model_grads divides them once, by the global number of items.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Megatron's random weights are overwritten at once, but only while drawing them does it
        # mark parameters as split over tensor ranks. Without the mark the gradient norm counts them
        # on the first tensor rank alone, and clipping is wrong.
        "perform_initialization": True,
    }


def _expert_fields(arch: Architecture, dtype: str, moe_aux_loss: float) -> dict[str, Any]:
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        # A softmax over the chosen logits is the softmax over all of them, normalised over the
        # chosen ones. So norm_topk_prob means a softmax after the choice.
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if moe_aux_loss > 0 else "none",
        "moe_aux_loss_coeff": moe_aux_loss,
        # One product for all experts of a rank. Only Transformer Engine has it.
        "moe_grouped_gemm": engine.uses_engine(dtype),
    }


def _recompute_fields(arch: Architecture, dtype: str, recompute: str) -> dict[str, Any]:
    if recompute == "selective":
        modules = selective_modules(arch, engine=engine.uses_engine(dtype))
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    if recompute == "full":
        # Each layer keeps its input only.
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}


def _set_yarn(config: TransformerConfig, arch: Architecture) -> None:
    # GPTModel and its attention look for these attributes. They are not fields of the dataclass, so
    # they are set after it is built.
    yarn = arch.yarn
    assert yarn is not None
    config.yarn_rotary_scaling_factor = yarn.factor
    config.yarn_original_max_position_embeddings = yarn.original_len
    config.yarn_beta_fast = yarn.beta_fast
    config.yarn_beta_slow = yarn.beta_slow
    # None means the paper's factor: queries and keys are multiplied by 0.1 ln(factor) + 1.
    config.yarn_mscale = None
    config.yarn_mscale_all_dim = None
    config.yarn_correction_range_round_to_int = yarn.truncate


def selective_modules(arch: Architecture, *, engine: bool) -> list[str]:
    """Return what recompute = "selective" computes again in the backward pass.

    It is the part of a layer that frees the most memory for the least time.

    Args:
        arch: The architecture of the model.
        engine: Whether the model has Transformer Engine's layers.
    """
    # The local attention keeps its scores, which grow with the square of the length.
    if not engine:
        return ["core_attn"]
    # Transformer Engine's attention keeps next to nothing, so there it is the feed-forward part.
    # With experts that is most of what a layer keeps. It costs a third of the operations of a
    # forward pass (Qwen3-30B-A3B at 8,000 tokens) and the exchange of the experts.
    return ["moe"] if arch.num_experts else ["mlp"]
