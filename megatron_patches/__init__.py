"""All that changes Megatron-Core's behaviour, and nothing else. Imports nothing of lopd.

``apply()`` before the model is built; ``listing()`` says what was changed, why, where, and when
each change can go. device.py: run on CPU and gloo, does nothing where CUDA is. upstream.py and
saving.py: faults of Megatron-Core that the trainer meets. norm.py, attention.py, layer_spec.py: the
modules that take the place of Transformer Engine's where it is not installed; they are used by the
layer spec, not patched in.
"""

from __future__ import annotations

from importlib import metadata

import torch
from packaging.version import Version

from megatron_patches.registry import PATCHES, Patch, UpstreamChanged

__all__ = ["Patch", "apply", "is_needed", "listing"]

_applied: set[str] = set()


def apply() -> None:
    """Installs every patch that this machine and this version of megatron-core need.

    It may be called before or after megatron.core is imported, and again without effect.

    Raises:
        RuntimeError: Upstream is not what a patch was written for. It names the patch and versions.
    """
    for entry in listing():
        if entry.name in _applied or not is_needed(entry):
            continue
        try:
            entry.install()
        except UpstreamChanged as error:
            installed = ", ".join(
                f"{package} {metadata.version(package)}" for package in ("megatron-core", "torch")
            )
            raise RuntimeError(
                f"megatron_patches: {entry.name} no longer fits: {error}; checked with {entry.checked}; installed: {installed}"
            ) from error
        _applied.add(entry.name)


def is_needed(entry: Patch) -> bool:
    """Whether this machine (CUDA or not) and the installed megatron-core need the patch."""
    if entry.without_cuda and torch.cuda.is_available():
        return False
    return entry.below is None or Version(metadata.version("megatron-core")) < Version(entry.below)


def listing() -> tuple[Patch, ...]:
    """Every patch, in the order of installation."""
    from megatron_patches import device, saving, upstream  # noqa: F401  (importing them fills PATCHES)

    return tuple(PATCHES)
