"""Reading the fields of a config.json that all families share.

A refusal names the field and its value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopd.errors import LopdError

# Megatron-Core's rotary embedding (models/common/embeddings/rotary_pos_embedding.py:_apply_scaling)
# has these values built in. All published Llamas have them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Where a field is nonsense, the file is damaged or was edited.
_BROKEN = "copy config.json again from the source of the model, or correct this field"
# Where a field is sound, the model computes something that the trainer does not.
_UNSUPPORTED = "choose a model without this feature: docs/models.md lists what is supported"

# What config.json may call the type of the weights.
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float", "half", "auto")


def decoder(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that all families share.

    Args:
        table: The parsed config.json.
        where: The path of the file, for the messages.

    Raises:
        LopdError: A field is missing, is not a sensible number, or asks for a feature that no
            family may have here.
    """
    # Each of these would change the forward pass in a way that the trainer's model does not have.
    refuse(table, where, "hidden_act", "silu")
    refuse(table, where, "use_sliding_window", False, None)
    refuse(table, where, "attention_dropout", 0, 0.0, None)
    refuse(table, where, "partial_rotary_factor", 1, 1.0, None)
    # Newer files name the kind of each layer in addition.
    for kind in table.get("layer_types") or ():
        if kind != "full_attention":
            raise LopdError(
                f"layer_types has {kind!r}, which is not supported",
                where=where,
                limit="every layer must be 'full_attention'",
                remedy=_UNSUPPORTED,
            )
    hidden_size = number(table, where, "hidden_size")
    num_heads = number(table, where, "num_attention_heads")
    # A file without this field means that every query head has its own key and value.
    num_kv_heads = number(table, where, "num_key_value_heads", "num_attention_heads")
    if num_heads % num_kv_heads:
        raise LopdError(
            f"num_attention_heads = {num_heads} is not a multiple of num_key_value_heads",
            where=where,
            limit=f"a multiple of num_key_value_heads = {num_kv_heads}",
            remedy=_BROKEN,
        )
    # It has no default here. A wrong one would change every log-probability a little, without an
    # error.
    norm_eps = table.get("rms_norm_eps")
    if not isinstance(norm_eps, float) or norm_eps <= 0:
        raise LopdError(
            f"rms_norm_eps = {norm_eps!r} is not a positive number", where=where, remedy=_BROKEN
        )
    # Without a field of its own the size of a head follows from the hidden size.
    head_dim = hidden_size // num_heads
    if table.get("head_dim") is not None:
        head_dim = number(table, where, "head_dim")
    return {
        "family": table["model_type"],
        "num_layers": number(table, where, "num_hidden_layers"),
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "ffn_hidden_size": number(table, where, "intermediate_size"),
        "vocab_size": number(table, where, "vocab_size"),
        "max_position_embeddings": number(table, where, "max_position_embeddings"),
        "norm_eps": norm_eps,
        "tied_embeddings": boolean(table, where, "tie_word_embeddings", False),
        **_rope(table, where),
    }


def refuse_quantised(table: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint whose weights are no plain floating-point numbers of 16 bits or more.

    Args:
        table: The parsed config.json.
        where: The path of the file, for the message.

    Raises:
        LopdError: It says that the weights are quantised, and how.
    """
    methods = []
    # compressed-tensors has had both names.
    for key in ("quantization_config", "compression_config"):
        about = table.get(key)
        if about:
            method = about.get("quant_method", "?") if isinstance(about, Mapping) else about
            methods.append((f"{key}.quant_method", method))
    # transformers has renamed this field, and both names are in use.
    for key in ("dtype", "torch_dtype"):
        dtype = table.get(key)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            methods.append((key, dtype))
    for key, method in methods:
        raise LopdError(
            f"the weights are quantised: {key} = {method!r}",
            where=where,
            limit="one of float64, float32, float16, bfloat16",
            remedy="give the checkpoint that was not quantised, or dequantise it first",
        )


def boolean(table: Mapping[str, Any], where: str, key: str, default: bool) -> bool:
    """Return a field that is true or false.

    Raises:
        LopdError: It is another value. The text "false" would otherwise count as true.
    """
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise LopdError(f"{key} = {value!r} is neither true nor false", where=where, remedy=_BROKEN)
    return value


def refuse(table: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """Refuse a field that has none of the allowed values.

    Args:
        table: The parsed config.json.
        where: The path of the file, for the message.
        key: The name of the field.
        allowed: The values that are supported. None stands for a field that is not there.

    Raises:
        LopdError: The field has another value.
    """
    value = table.get(key)
    if value not in allowed:
        raise LopdError(
            f"{key} = {value!r} is not supported",
            where=where,
            limit=f"{key} must be {' or '.join(map(repr, allowed))}",
            remedy=_UNSUPPORTED,
        )


def number(table: Mapping[str, Any], where: str, *keys: str) -> int:
    """Return the positive whole number under the first of these keys that is there.

    Raises:
        LopdError: The table has none of the keys, or the value is not a positive whole number.
    """
    for key in keys:
        if table.get(key) is not None:
            value = table[key]
            # JSON's true would pass as the number 1.
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise LopdError(
                    f"{key} = {value!r} is not a positive whole number",
                    where=where,
                    remedy=_BROKEN,
                )
            return value
    raise LopdError(f"{keys[0]} is missing", where=where, remedy=_BROKEN)


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary frequencies that are scaled by parts.

    Source: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models",
    arXiv 2309.00071. Queries and keys are multiplied by 0.1 ln(factor) + 1.

    Attributes:
        factor: Slow frequencies are divided by this number.
        original_len: The longest sequence, in tokens, before the extension.
        beta_fast: A frequency with more rotations than this over original_len stays as it is.
        beta_slow: A frequency with fewer rotations than this is divided by the whole factor.
        truncate: The bounds between both are rounded to whole dimensions.
    """

    factor: float
    original_len: int
    beta_fast: float
    beta_slow: float
    truncate: bool


def _rope(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of the rotary embedding. Of the scalings Llama 3's and YaRN are known."""
    # transformers 5 writes everything into rope_parameters. Before, rope_theta stood beside
    # rope_scaling, and the kind of scaling was called type.
    rope = table.get("rope_parameters") or table.get("rope_scaling") or {}
    refuse(rope, where, "partial_rotary_factor", 1, 1.0, None)
    theta = rope.get("rope_theta", table.get("rope_theta"))
    kind = rope.get("rope_type", rope.get("type", "default"))
    factor = 1.0
    yarn = None
    if kind == "llama3":
        # The other three numbers cannot be given to Megatron-Core.
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
            remedy=_UNSUPPORTED,
        )
    # JSON often has it as a whole number.
    if not isinstance(theta, int | float) or theta <= 0:
        raise LopdError(
            f"rope_theta = {theta!r} is not a positive number", where=where, remedy=_BROKEN
        )
    return {"rope_theta": float(theta), "rope_factor": factor, "yarn": yarn}


def _factor(rope: Mapping[str, Any], where: str) -> float:
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or factor < 1:
        raise LopdError(
            f"factor = {factor!r} of the rope scaling is not supported",
            where=where,
            limit="at least 1",
            remedy=_BROKEN,
        )
    return float(factor)


def _yarn(rope: Mapping[str, Any], where: str) -> Yarn:
    """Return YaRN's scaling, read in the way of transformers."""
    # These two fields are DeepSeek's. Megatron-Core would read them in another way.
    refuse(rope, where, "mscale", None)
    refuse(rope, where, "mscale_all_dim", None)
    factor = _factor(rope, where)
    # Megatron-Core computes the paper's factor itself. Another one cannot be given to it.
    usual = 0.1 * math.log(factor) + 1.0
    attention = rope.get("attention_factor")
    if attention is not None and not (
        isinstance(attention, int | float) and math.isclose(attention, usual, rel_tol=1e-6)
    ):
        raise LopdError(
            f"attention_factor = {attention!r} of the rope scaling is not supported",
            where=where,
            limit=f"exactly 0.1 ln(factor) + 1 = {usual:.6f}, or no such field",
            remedy=_UNSUPPORTED,
        )
    # The defaults are those of the paper. transformers uses them for 0 and null too.
    betas = [rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0]
    # A string would pass through float() below.
    if not all(isinstance(beta, int | float) and beta > 0 for beta in betas):
        raise LopdError(
            f"beta_fast, beta_slow = {betas} of the rope scaling are not supported",
            where=where,
            limit="two positive numbers",
            remedy=_BROKEN,
        )
    return Yarn(
        factor=factor,
        original_len=number(rope, where, "original_max_position_embeddings"),
        beta_fast=float(betas[0]),
        beta_slow=float(betas[1]),
        truncate=boolean(rope, where, "truncate", True),
    )
