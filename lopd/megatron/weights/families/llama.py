"""Llama 2 and 3. They have no biases, and no norms on queries and keys.

From Llama 3.1 on they scale the rotary frequencies in their own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.megatron.weights.families.fields import decoder, refuse


def llama(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a Llama."""
    refuse(table, where, "attention_bias", False, None)
    refuse(table, where, "mlp_bias", False, None)
    return {**decoder(table, where), "qk_norm": False, "qkv_bias": False}
