"""What a patch is, the list of all, and the guards that make an upstream change fail loudly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


class UpstreamChanged(RuntimeError):
    """Upstream is not what a patch was written for."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One change of upstream behaviour.

    Attributes:
        name: The name of the installing function.
        why: What the patch changes and why, in whole sentences.
        upstream: The file and the function that the patch changes.
        checked: The versions that the patch was run with.
        until: When the patch can go.
        without_cuda: The patch is installed only where CUDA is absent.
        below: The patch is installed only if megatron-core is older than this version; None: in
            every version.
        install: Installs the patch. Raises UpstreamChanged where upstream is another.
    """

    name: str
    why: str
    upstream: str
    checked: str
    until: str
    without_cuda: bool
    below: str | None
    install: Callable[[], None]


PATCHES: list[Patch] = []


def patch(
    *, upstream: str, checked: str, until: str, without_cuda: bool, below: str | None = None
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers an installer. Its docstring says what it changes and why. See Patch."""

    def register(install: Callable[[], None]) -> Callable[[], None]:
        why = inspect.getdoc(install)
        assert why, f"patch {install.__name__} needs a docstring"
        why = " ".join(why.split())
        name = install.__name__
        PATCHES.append(Patch(name, why, upstream, checked, until, without_cuda, below, install))
        return install

    return register


def require(
    owner: Any,
    attribute: str,
    *,
    parameters: Sequence[str] | None = None,
    source: str | None = None,
) -> Any:
    """The upstream object that a patch is about to change.

    UpstreamChanged where it is missing, where its first parameters are not those the patch was
    written for, or where its source no longer contains the given text: the patch must be looked at
    again instead of doing something else silently.
    """
    place = f"{getattr(owner, '__name__', owner)}.{attribute}"
    found = getattr(owner, attribute, None)
    if found is None:
        raise UpstreamChanged(f"{place} does not exist")
    original = inspect.unwrap(found)
    if parameters is not None:
        names = list(inspect.signature(original).parameters)
        if names[: len(parameters)] != list(parameters):
            raise UpstreamChanged(
                f"{place} takes ({', '.join(names)}), the patch knows ({', '.join(parameters)})"
            )
    if source is not None and source not in inspect.getsource(original):
        raise UpstreamChanged(f"{place} no longer contains {source!r}")
    return found


def replace(owner: Any, attribute: str, replacement: Any) -> None:
    """Set owner.attribute, which must exist. A function keeps the name and documentation of the one
    it replaces.
    """
    original = require(owner, attribute)
    if not isinstance(replacement, type):
        function = replacement.__func__ if isinstance(replacement, staticmethod) else replacement
        functools.update_wrapper(function, original, updated=())
    setattr(owner, attribute, replacement)
