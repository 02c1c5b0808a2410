"""The states of the random number generators of one rank, as JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import tensor_parallel


def generator_states() -> dict[str, Any]:
    """Return the states of torch's generators and of Megatron-Core's tracker."""
    # The tracker has the generators of dropout that differs between tensor ranks.
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "cpu": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "tracker": {name: _encode(state) for name, state in tracker.items()},
    }


def restore_generators(saved: Mapping[str, Any]) -> None:
    """Put the states of generator_states in place."""
    torch.set_rng_state(_decode(saved["cpu"]))
    # A checkpoint may have been written on a CPU, or be read on one.
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(saved["cuda"]))
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name: _decode(state) for name, state in saved["tracker"].items()}
    )


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    # A bytearray, because torch.frombuffer warns about memory that cannot be written.
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
