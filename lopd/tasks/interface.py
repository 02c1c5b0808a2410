"""What a task is: it makes or names prompts, and it tells a right response from a wrong one.

A new task is one module with one class (a ``TaskOptions`` whose fields are the keys of
``task.options``) and one line in ``_TASKS``.
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
    """A verifiable task. ``name`` is also the domain of its prompts."""

    name: ClassVar[str]

    def generate_prompts(self, num: int, seed: int) -> list[Prompt]:
        """num different prompts; sets with different seeds never share one, and a longer set begins
        with the shorter one.

        ConfigError: the seed is out of range, or the task does not have so many prompts.
        """
        ...

    def verify(self, prompt: Prompt, text: str, finish_reason: str) -> bool:
        """Whether a response is right. text: the decoded response, special tokens and the end token
        included.
        """
        ...


class TaskOptions(BaseModel):
    """Base of a task class: its fields are the options, with types and bounds; unknown ones are
    refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ClassVar[str]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """The task with these options. ConfigError: unknown option (with the nearest right one),
        wrong type, out of bounds.
        """
        try:
            return cls.model_validate(dict(options))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][0])
            where = f"task.options.{key}"
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


_TASKS = {  # name -> module, class: imported when asked for
    "register_arithmetic": ("lopd.tasks.register_arithmetic", "RegisterArithmetic"),
    "math": ("lopd.tasks.math", "Math"),
    "plain": ("lopd.tasks.plain", "Plain"),
    "code": ("lopd.tasks.code", "Code"),
}


def get_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of this name. ConfigError: unknown name or option (with the nearest right one),
    wrong type, out of bounds.
    """
    if name not in _TASKS:
        raise ConfigError(
            f"unknown task {name!r}", where="task.name", remedy=_nearest(name, _TASKS)
        )
    module, class_name = _TASKS[name]
    task_class = cast(type[TaskOptions], getattr(importlib.import_module(module), class_name))
    return cast(Task, task_class.from_options(options))


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return (
        f"the nearest known one is {nearest[0]} (all: {', '.join(known)})"
        if nearest
        else "it takes no options"
    )
