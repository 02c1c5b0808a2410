"""A package that takes seconds to import is imported where it is first used, not where it is named.

torch takes two seconds of processor time. ``lopd status`` and ``lopd check`` import the stages and
the losses for what they say of themselves, and compute no tensor. tests/test_light_verbs.py holds
which verbs import what.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Deferred(ModuleType):
    """Stands for a module, and imports it when an attribute of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        # Nothing is kept here: import_module finds a module that is there already in a microsecond,
        # and a copy would hide what a test or a patch puts in an attribute's place.
        return getattr(importlib.import_module(self.__name__), name)


def deferred(name: str) -> Any:
    """Return what stands for a module until it is used.

    Write ``if TYPE_CHECKING: import torch`` and ``else: torch = deferred("torch")``, so that
    a type checker sees the module itself.
    """
    return _Deferred(name)
