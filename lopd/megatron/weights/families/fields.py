"""Reading fields of a config.json: what all families share, and refusals that name the field and
its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopd.errors import LopdError

# Megatron-Core's rotary embedding (models/common/embeddings/rotary_pos_embedding.py:_apply_scaling)
# has these built in; all published Llamas have them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def decoder(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields that all families share. LopdError: one is missing, is no sensible number, or asks for
    what none of them may have.
    """
    refuse(table, where, "hidden_act", "silu")
    refuse(table, where, "use_sliding_window", False, None)
    refuse(table, where, "attention_dropout", 0, 0.0, None)
    refuse(table, where, "partial_rotary_factor", 1, 1.0, None)
    for kind in table.get("layer_types") or ():
        if kind != "full_attention":
            raise LopdError(
                f"layer_types has {kind!r}, which is not supported",
                where=where,
                limit="every layer must be 'full_attention'",
            )
    hidden_size, num_heads = (
        number(table, where, "hidden_size"),
        number(table, where, "num_attention_heads"),
    )
    num_kv_heads = number(table, where, "num_key_value_heads", "num_attention_heads")
    if num_heads % num_kv_heads:
        raise LopdError(
            f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})",
            where=where,
        )
    norm_eps = table.get("rms_norm_eps")
    if not isinstance(norm_eps, float) or norm_eps <= 0:
        raise LopdError(f"rms_norm_eps = {norm_eps!r} is no positive number", where=where)
    return {
        "family": table["model_type"],
        "num_layers": number(table, where, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": number(table, where, "head_dim")
        if table.get("head_dim") is not None
        else hidden_size // num_heads,
        "ffn_hidden_size": number(table, where, "intermediate_size"),
        "vocab_size": number(table, where, "vocab_size"),
        "max_position_embeddings": number(table, where, "max_position_embeddings"),
        "norm_eps": norm_eps,
        "tied_embeddings": bool(table.get("tie_word_embeddings", False)),
        **_rope(table, where),
    }


def refuse(table: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """LopdError where table[key] (None: not there) is none of the allowed values."""
    value = table.get(key)
    if value not in allowed:
        raise LopdError(
            f"{key} = {value!r} is not supported",
            where=where,
            limit=f"{key} must be {' or '.join(map(repr, allowed))}",
        )


def number(table: Mapping[str, Any], where: str, *keys: str) -> int:
    """The positive whole number under the first of these keys that is there."""
    for key in keys:
        if table.get(key) is not None:
            value = table[key]
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise LopdError(f"{key} = {value!r} is no positive whole number", where=where)
            return value
    raise LopdError(f"{keys[0]} is missing", where=where)


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary frequencies scaled by parts (Peng et al., "YaRN: Efficient Context Window Extension of
    Large Language Models", arXiv 2309.00071).

    factor: by which slow frequencies are divided. original_len: longest sequence before. beta_fast,
    beta_slow: rotations over original_len above which a frequency stays, and below which it is
    divided in full. truncate: bounds between are rounded to whole dimensions. Queries and keys are
    multiplied by 0.1 ln(factor) + 1.
    """

    factor: float
    original_len: int
    beta_fast: float
    beta_slow: float
    truncate: bool


def _rope(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """From rope_parameters (transformers 5) or rope_theta and rope_scaling (before). Of scalings
    Llama 3's and YaRN are known.
    """
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    refuse(rope, where, "partial_rotary_factor", 1, 1.0, None)
    theta = rope.get("rope_theta", table.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor, yarn = 1.0, None
    if kind == "llama3":
        for key, value in _LLAMA3.items():
            refuse(rope, where, key, value)
        factor = _factor(rope, where)
    elif kind == "yarn":
        yarn = _yarn(rope, where)
    elif kind != "default":
        raise LopdError(
            f"rope scaling of type {kind!r} is not supported",
            where=where,
            limit="rope_type must be 'default', 'llama3' or 'yarn'",
        )
    if not isinstance(theta, int | float) or theta <= 0:
        raise LopdError(f"rope_theta = {theta!r} is no positive number", where=where)
    return {"rope_theta": float(theta), "rope_factor": factor, "yarn": yarn}


def _factor(rope: Mapping[str, Any], where: str) -> float:
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise LopdError(
            f"factor = {factor!r} of the rope scaling is no number of at least 1", where=where
        )
    return float(factor)


def _yarn(rope: Mapping[str, Any], where: str) -> Yarn:
    """As transformers reads it; what Megatron-Core's would make otherwise is refused: another
    attention factor than the paper's, DeepSeek's mscale.
    """
    refuse(rope, where, "mscale", None)
    refuse(rope, where, "mscale_all_dim", None)
    factor = _factor(rope, where)
    attention, usual = rope.get("attention_factor"), 0.1 * math.log(factor) + 1.0
    if attention is not None and not (
        isinstance(attention, int | float) and math.isclose(attention, usual, rel_tol=1e-6)
    ):
        raise LopdError(
            f"attention_factor = {attention!r} of the rope scaling is not supported",
            where=where,
            limit=f"0.1 ln(factor) + 1 = {usual:.6f}, or none",
        )
    betas = [
        rope.get(name) or usual_beta
        for name, usual_beta in (("beta_fast", 32.0), ("beta_slow", 1.0))
    ]
    if not all(isinstance(beta, int | float) and beta > 0 for beta in betas):
        raise LopdError(
            f"beta_fast, beta_slow = {betas} of the rope scaling are no positive numbers",
            where=where,
        )
    original_len = number(rope, where, "original_max_position_embeddings")
    return Yarn(
        factor, original_len, float(betas[0]), float(betas[1]), bool(rope.get("truncate", True))
    )
