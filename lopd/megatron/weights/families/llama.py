"""Llama 2 and 3: no biases, no norms on queries and keys; from 3.1 on with its own scaling of
rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopd.megatron.weights.families.fields import decoder, refuse


def llama(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    refuse(table, where, "attention_bias", False, None)
    refuse(table, where, "mlp_bias", False, None)
    return {**decoder(table, where), "qk_norm": False, "qkv_bias": False}
