"""What checks find, and what several of them ask of a configuration and of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable

from lopd.config import Config
from lopd.errors import LopdError
from lopd.megatron.architecture import Architecture, read_architecture

Finding = str | LopdError  # what was found right, or what is wrong
ALL_STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
CORES = "CPU cores"
ROLES = ("teacher", "student")


def attempt(function: Callable[[], str]) -> Finding:
    try:
        return function()
    except LopdError as error:
        return error


def architecture_of(config: Config, role: str) -> Architecture | None:
    """None where it cannot be read, which ``teacher`` and ``student`` have said."""
    try:
        return read_architecture(getattr(config.models, role))
    except LopdError:
        return None


def devices() -> tuple[int, str]:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), CORES
