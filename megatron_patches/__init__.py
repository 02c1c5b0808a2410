"""All that changes Megatron-Core's behaviour, and nothing else. It imports nothing of lopd.

Call ``apply()`` before the model is built. ``listing()`` says for each change what upstream does,
why it is changed, where, and when the change can be removed.

device.py: Megatron-Core on a CPU over gloo. It does nothing where CUDA is.
upstream.py, saving.py: faults of Megatron-Core that the trainer meets.
experts.py, gloo.py, products.py, rotary.py: less time on a CPU. They do nothing where CUDA is.
norm.py, attention.py, layer_spec.py: modules that take the place of Transformer Engine's where it
    is not installed. The layer spec uses them, so nothing is patched for them.
"""

from __future__ import annotations

from importlib import metadata

import torch
from packaging.version import Version

from megatron_patches.registry import PATCHES, Patch, UpstreamChanged

__all__ = ["Patch", "apply", "is_needed", "listing"]

# The names of the patches that are installed in this process. Some must not be installed twice,
# because they would wrap their own replacement.
_applied: set[str] = set()


def apply() -> None:
    """Install every patch that this machine and this version of megatron-core need.

    It may be called before or after megatron.core is imported, and again without effect.

    Raises:
        RuntimeError: Upstream is not what a patch was written for. The message names the patch and
            the versions.
    """
    for entry in listing():
        # apply() is called wherever Megatron is first needed, and a patch must go on once.
        if entry.name in _applied or not is_needed(entry):
            continue
        try:
            entry.install()
        # A patch that does not fit must stop everything: a run without it would be wrong in
        # silence.
        except UpstreamChanged as error:
            installed = ", ".join(
                f"{package} {metadata.version(package)}" for package in ("megatron-core", "torch")
            )
            raise RuntimeError(
                f"megatron_patches: {entry.name} no longer fits: {error};"
                f" checked with {entry.checked}; installed: {installed}"
            ) from error
        _applied.add(entry.name)


def is_needed(entry: Patch) -> bool:
    """Return whether this machine (CUDA or not) and the installed megatron-core need the patch."""
    # Patches for the CPU would break a machine with CUDA.
    if entry.without_cuda and torch.cuda.is_available():
        return False
    return entry.below is None or Version(metadata.version("megatron-core")) < Version(entry.below)


def listing() -> tuple[Patch, ...]:
    """Return every patch, in the order of installation."""
    # Importing them fills PATCHES. Here and not at the top, because a module of this package is
    # imported by users that want no patch, for example local_spec.
    from megatron_patches import device, experts, gloo, products, rotary, saving, upstream  # noqa: F401

    return tuple(PATCHES)
