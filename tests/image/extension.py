"""Stands in for transformer_engine_torch, the compiled part of Transformer Engine, where it was not
built.

It has every name that is asked for, and nothing of it can be called. Transformer Engine's own
Python imports with it, and its modules can be made.
"""

from __future__ import annotations

import zlib
from typing import Any


class _Name:
    """Something that Transformer Engine names: a type of numbers, a kernel, a class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Name(f"{self._name}.{name}")
        # Later requests get the same object, so that it can be compared and looked up.
        setattr(self, name, found)
        return found

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"transformer_engine_torch.{self._name} is compiled, and was not built here"
        )

    def __int__(self) -> int:
        """A member of an enumeration: any number that is its own."""
        return zlib.crc32(self._name.encode())

    __index__ = __int__

    def __repr__(self) -> str:
        return f"<{self._name}>"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = _Name(name)
    globals()[name] = found
    return found
