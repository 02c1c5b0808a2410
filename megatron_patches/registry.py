"""What a patch is, the list of all patches, and the guards.

The guards make a change of upstream fail with a message that names the patch.
"""

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
        until: The change upstream after which the patch can be removed.
        without_cuda: The patch is installed only where CUDA is absent.
        below: The patch is installed only if megatron-core is older than this version. None means
            that every version needs it.
        install: Installs the patch. It raises UpstreamChanged if upstream is not what the patch was
            written for.
    """

    name: str
    why: str
    upstream: str
    checked: str
    until: str
    without_cuda: bool
    below: str | None
    install: Callable[[], None]


# In the order of registration, which is the order of installation.
PATCHES: list[Patch] = []


def patch(
    *, upstream: str, checked: str, until: str, without_cuda: bool, below: str | None = None
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register an installer. Its docstring says what it changes and why.

    The arguments are those of Patch.
    """

    def register(install: Callable[[], None]) -> Callable[[], None]:
        why = inspect.getdoc(install)
        assert why, f"patch {install.__name__} needs a docstring"
        # One line, for the listing.
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
    """Return the upstream object that a patch is about to change.

    Args:
        owner: The module or class of the object.
        attribute: The name of the object.
        parameters: The names of its first parameters, as the patch knows them.
        source: A text that its source must contain, mostly the fault that the patch repairs.

    Raises:
        UpstreamChanged: The object is missing, or its parameters or its source differ. Then
            somebody must look at the patch again. Otherwise it would do something else without a
            message.
    """
    # For messages: "moe_utils.router_gating_linear".
    place = f"{getattr(owner, '__name__', owner)}.{attribute}"
    found = getattr(owner, attribute, None)
    if found is None:
        raise UpstreamChanged(f"{place} does not exist")
    # What another patch or a decorator has wrapped still has the original inside.
    original = inspect.unwrap(found)
    if parameters is not None:
        # Only the first ones are compared. Upstream may have added others with a default.
        names = list(inspect.signature(original).parameters)
        if names[: len(parameters)] != list(parameters):
            raise UpstreamChanged(
                f"{place} takes ({', '.join(names)}), the patch knows ({', '.join(parameters)})"
            )
    if source is not None and source not in inspect.getsource(original):
        raise UpstreamChanged(f"{place} no longer contains {source!r}")
    return found


def replace(owner: Any, attribute: str, replacement: Any) -> None:
    """Set owner.attribute, which must exist.

    A function gets the name and the documentation of the one that it replaces.

    Raises:
        UpstreamChanged: The attribute does not exist.
    """
    original = require(owner, attribute)
    # A class keeps its own name.
    if not isinstance(replacement, type):
        # A static method is an object around its function.
        function = replacement.__func__ if isinstance(replacement, staticmethod) else replacement
        # It also sets __wrapped__, by which `require` finds the original of a patched function.
        functools.update_wrapper(function, original, updated=())
    setattr(owner, attribute, replacement)
