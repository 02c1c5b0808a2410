"""Families of models: one small file for each.

A function takes the parsed config.json of one model_type and the path of the file. It returns the
fields of lopd.megatron.weights.architecture.Architecture. A feature that the fields cannot express
is refused by its name. These modules import no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lopd.megatron.weights.families.llama import llama
from lopd.megatron.weights.families.qwen2 import qwen2
from lopd.megatron.weights.families.qwen3 import qwen3, qwen3_moe

# The keys are the model_type of a Hugging Face config.json.
FAMILIES: dict[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
