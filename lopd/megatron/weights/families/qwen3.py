"""Qwen3, dense and with experts. Queries and keys have norms and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.errors import LopdError
from lopd.megatron.weights.families.fields import boolean, decoder, number, refuse


def qwen3(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a dense Qwen3."""
    refuse(table, where, "attention_bias", False, None)
    return {**decoder(table, where), "qk_norm": True, "qkv_bias": False}


def qwen3_moe(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a Qwen3 with experts in every layer."""
    # Both fields would make some layers dense. The architecture has one kind of layer only.
    refuse(table, where, "mlp_only_layers", [], None)
    refuse(table, where, "decoder_sparse_step", 1, None)
    # transformers 5 writes num_local_experts.
    num_experts = number(table, where, "num_experts", "num_local_experts")
    experts_per_token = number(table, where, "num_experts_per_tok")
    # A router cannot choose more experts than there are, and torch would fail in the first step.
    if experts_per_token > num_experts:
        raise LopdError(
            f"num_experts_per_tok = {experts_per_token} is too large",
            where=where,
            limit=f"at most the number of experts, {num_experts}",
            remedy="copy config.json again from the source of the model, or correct this field",
        )
    return {
        **qwen3(table, where),
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "moe_ffn_hidden_size": number(table, where, "moe_intermediate_size"),
        "norm_topk_prob": boolean(table, where, "norm_topk_prob", False),
    }
