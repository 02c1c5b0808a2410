"""What checks find, and what several of them ask of a configuration and of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

from lopd.config import Config
from lopd.devices import num_gpus
from lopd.errors import LopdError
from lopd.megatron.weights.architecture import Architecture, read_architecture

# What was found: text if it is right, an error if it is wrong.
Finding = str | LopdError
# The shapes of the models that can be read, by role: teacher, student, teachers.DOMAIN.
Shapes: TypeAlias = Mapping[str, Architecture]
ALL_STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
CORES = "CPU cores"
# Processes that share the cores of a machine. There may be any number of them.
NO_LIMIT = 2**31
ROLES = ("teacher", "student")


def attempt(function: Callable[[], str]) -> Finding:
    """Return what a function returns, or the error that it raises."""
    try:
        return function()
    except LopdError as error:
        return error


def architecture_of(config: Config, role: str) -> Architecture | None:
    """Return the shape of a model, or None if it cannot be read.

    The checks ``teacher`` and ``student`` say why it cannot. Other checks then have nothing to
    compare, and must not repeat the error.
    """
    try:
        return read_architecture(getattr(config.models, role))
    except LopdError:
        return None


def shapes_of(config: Config) -> Shapes:
    """Return the shapes of all models that can be read on this machine."""
    # The two main roles first: their problems are shown first.
    folders = {role: getattr(config.models, role) for role in ROLES}
    for domain, folder in config.models.teachers.items():
        folders[f"teachers.{domain}"] = folder
    found: dict[str, Architecture] = {}
    for role, folder in folders.items():
        # The checks of this model say why it cannot be read.
        with contextlib.suppress(LopdError):
            found[role] = read_architecture(folder)
    return found


def problems_of(findings: Iterable[Finding]) -> Iterator[LopdError]:
    """Yield the findings that are problems.

    If the checks themselves raise an error, it is the last problem that is yielded."""
    try:
        yield from (finding for finding in findings if isinstance(finding, LopdError))
    except LopdError as error:
        yield error


def refusal(check: Callable[[], object]) -> Iterator[LopdError]:
    """Yield the error that a function raises, or nothing."""
    try:
        check()
    except LopdError as error:
        yield error


def devices_for(config: Config) -> tuple[int, str]:
    """Return how many processes this machine can run for a configuration, and on what.

    A trial on a CPU may have more processes than cores, because they share them.
    """
    count, unit = devices()
    if unit == CORES and config.launch.device == "cpu":
        return NO_LIMIT, unit
    return count, unit


def devices() -> tuple[int, str]:
    """Return how many processes this machine can run at once, and on what."""
    if count := num_gpus():
        return count, "GPUs"
    # Not os.cpu_count(): a container or a job may use fewer cores than the machine has.
    return len(os.sched_getaffinity(0)), CORES
