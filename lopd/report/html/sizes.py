"""How large a model is, from its config.json and the headers of its weights: no weight is read."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from lopd.report.html.source import read_json

# safetensors refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000
# What checkpoints call the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def size_of(folder: Path) -> str:
    """Return layers, hidden size, experts and parameters in words; "" where nothing is known.

    Args:
        folder: A Hugging Face checkpoint. It may have been removed since.
    """
    config = read_json(folder / "config.json")
    # Models that also see keep the part that writes in a section of its own.
    config = {**config, **config.get("text_config", {})}
    parts = []
    layers = config.get("num_hidden_layers")
    if layers is not None:
        parts.append(f"{layers} layers")
    if config.get("hidden_size") is not None:
        parts.append(f"hidden size {config['hidden_size']:,}")
    experts = next((config[name] for name in _EXPERTS if config.get(name)), None)
    if experts is not None:
        active = config.get("num_experts_per_tok")
        parts.append(f"{experts} experts" + (f" ({active} for each token)" if active else ""))
    count = parameters_of(folder)
    if count is not None:
        parts.append(f"{count:,} parameters")
    return ", ".join(parts)


def parameters_of(folder: Path) -> int | None:
    """Return how many values the weights have; None where a file is missing or damaged."""
    files = sorted(folder.glob("*.safetensors"))
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    if not files or set(index.values()) - {path.name for path in files}:
        return None
    try:
        return sum(_count(_header(path)) for path in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        # The report says what it can of a run whose models are gone.
        return None


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length} bytes")
        table: dict[str, Any] = json.loads(file.read(length))
    return table


def _count(header: dict[str, Any]) -> int:
    return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
