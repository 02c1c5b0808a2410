"""Qwen2 and Qwen2.5, dense: biases on queries, keys and values, no norms on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.megatron.weights.families.fields import decoder, refuse


def qwen2(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    refuse(table, where, "attention_bias", True, None)  # not in the file: it cannot be switched off
    return {**decoder(table, where), "qk_norm": False, "qkv_bias": True}
