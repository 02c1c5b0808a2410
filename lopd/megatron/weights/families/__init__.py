"""Families of models: what a Hugging Face config.json of one model_type says, as fields of
lopd.megatron.weights.architecture.Architecture.

One small file a family. Each function takes the parsed config.json and its path and gives the
fields; what it cannot represent it refuses by name. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lopd.megatron.weights.families.llama import llama
from lopd.megatron.weights.families.qwen2 import qwen2
from lopd.megatron.weights.families.qwen3 import qwen3, qwen3_moe

FAMILIES: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
