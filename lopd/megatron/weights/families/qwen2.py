"""Qwen2 and Qwen2.5, dense. Queries, keys and values have biases and no norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.megatron.weights.families.fields import decoder, refuse


def qwen2(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a dense Qwen2 or Qwen2.5."""
    # The published files do not have this field, because the bias cannot be switched off.
    refuse(table, where, "attention_bias", True, None)
    return {**decoder(table, where), "qk_norm": False, "qkv_bias": True}
