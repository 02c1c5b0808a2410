"""Defines what a task is.

A task makes or reads prompts, and most tasks tell a right response from a wrong one. A new task is
one module with one class, and one line in ``_TASKS``. The class is a ``TaskOptions`` whose fields
are the keys of ``task.options``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, cast, runtime_checkable

import pydantic
from pydantic import BaseModel, ConfigDict

from lopd.errors import ConfigError
from lopd.records import Prompt


@runtime_checkable
class Task(Protocol):
    """A task. Its ``name`` is also the domain of its prompts.

    A task that can verify is a ``Verifier`` as well. Without one there is no accuracy.
    """

    name: ClassVar[str]

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """Return different prompts.

        Sets with different seeds never share a prompt. A longer set begins with the shorter one.

        Args:
            num: The number of prompts.
            seed: The seed of the set.

        Raises:
            ConfigError: The seed is out of range, or the task does not have so many prompts.
        """
        ...


@runtime_checkable
class Verifier(Task, Protocol):
    """A task that tells a right response from a wrong one."""

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """Return whether a response is right.

        Args:
            prompt: The prompt.
            text: The decoded response, with special tokens but without the token that ended it.
            finish_reason: "stop" or "length".
        """
        ...


class TaskOptions(BaseModel):
    """The base of a task class.

    Its fields are the options, with types and bounds. An unknown option is refused.
    """

    # The same rules as for sections of the configuration, since options stand in the same file.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ClassVar[str]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Return the task with these options.

        Raises:
            ConfigError: An option is unknown, of the wrong type or out of bounds. For an unknown
                one the message names the nearest known one.
        """
        try:
            return cls.model_validate(dict(options))
        except pydantic.ValidationError as error:
            # One mistake is enough here: options are few, and the next call shows the next one.
            first = error.errors()[0]
            # Options are flat, so the first part of the location is the option.
            key = str(first["loc"][0])
            where = f"task.options.{key}"
            # Most mistakes are typing errors, so the nearest option is named.
            if first["type"] == "extra_forbidden":
                raise ConfigError(
                    f"task {cls.name} has no option {key}",
                    where=where,
                    remedy=_nearest(key, cls.model_fields),
                ) from None
            raise ConfigError(
                f"{first['input']!r}: {first['msg']}",
                where=where,
                remedy=cls.model_fields[key].description or "",
            ) from None


# Name -> module and class. A module is imported when its task is asked for, so that a command which
# only reads the configuration does not wait for numpy.
_TASKS = {
    "register_arithmetic": ("lopd.tasks.register_arithmetic", "RegisterArithmetic"),
    "math": ("lopd.tasks.math", "Math"),
    "plain": ("lopd.tasks.plain", "Plain"),
    "code": ("lopd.tasks.code", "Code"),
    "open_ended": ("lopd.tasks.open_ended", "OpenEnded"),
}


def get_task(name: str, options: Mapping[str, Any]) -> Task:
    """Return the task of this name.

    Args:
        name: The name of the task.
        options: Its options, by name.

    Raises:
        ConfigError: The name or an option is unknown, or an option is of the wrong type or out of
            bounds.
    """
    # A user's own task must be entered there first.
    if name not in _TASKS:
        raise ConfigError(
            f"unknown task {name!r}", where="task.name", remedy=_nearest(name, _TASKS)
        )
    # mypy cannot follow an import by name, hence the casts.
    module, class_name = _TASKS[name]
    task_class = cast(type[TaskOptions], getattr(importlib.import_module(module), class_name))
    return cast(Task, task_class.from_options(options))


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    # With the cutoff 0 any known word matches. Nothing is found only if there is none.
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    if not nearest:
        return "it takes no options"
    return f"the nearest known one is {nearest[0]} (all: {', '.join(known)})"
