"""What checks find, and what several of them ask of a configuration and of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from lopd.config import Config
from lopd.errors import LopdError
from lopd.megatron.weights.architecture import Architecture, read_architecture

Finding = str | LopdError  # what was found right, or what is wrong
Shapes: TypeAlias = Mapping[
    str, Architecture
]  # of the models that are known, by role: teacher, student, teachers.DOMAIN
ALL_STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
CORES = "CPU cores"
NO_LIMIT = 2**31  # of processes that share the cores of a machine
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


def shapes_of(config: Config) -> Shapes:
    """Of all models that can be read here."""
    folders = {role: getattr(config.models, role) for role in ROLES} | {
        f"teachers.{domain}": folder for domain, folder in config.models.teachers.items()
    }
    found: dict[str, Architecture] = {}
    for role, folder in folders.items():
        with contextlib.suppress(LopdError):  # ``teacher``, ``student`` and ``teachers`` say so
            found[role] = read_architecture(folder)
    return found


def problems_of(findings: Iterable[Finding]) -> Iterator[LopdError]:
    """What is wrong, raised or yielded."""
    try:
        yield from (finding for finding in findings if isinstance(finding, LopdError))
    except LopdError as error:
        yield error


def refusal(check: Callable[[], object]) -> Iterator[LopdError]:
    """What a check that only raises has to say."""
    try:
        check()
    except LopdError as error:
        yield error


def devices_for(config: Config) -> tuple[int, str]:
    """As devices, but without a limit of processes where the configuration asks for a trial on a
    CPU, whose cores they share.
    """
    most, unit = devices()
    return (NO_LIMIT if unit == CORES and config.launch.device == "cpu" else most), unit


def devices() -> tuple[int, str]:
    """How many processes this machine can run at once, and by what."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), CORES
