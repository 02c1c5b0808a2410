"""All that changes Megatron-Core's behaviour, and nothing else. Imports nothing of lopd.

``apply()`` before the model is built; ``listing()`` says what was changed, why, where, and when each change can go. device.py: run on CPU and gloo, does
nothing where CUDA is. upstream.py and saving.py: faults of Megatron-Core that the trainer meets. norm.py, attention.py, layer_spec.py: the modules that
take the place of Transformer Engine's where it is not installed; they are used by the layer spec, not patched in.
"""

from __future__ import annotations

from importlib import metadata

import torch

from megatron_patches.registry import PATCHES, Patch, UpstreamChanged

__all__ = ["Patch", "apply", "listing"]

_applied: set[str] = set()


def apply() -> None:
    """Install every patch that this machine needs; harmless when called again. Before or after importing megatron.core.

    RuntimeError, naming the patch and the versions, where upstream is not what a patch was written for.
    """
    cuda = torch.cuda.is_available()
    for entry in listing():
        if entry.name in _applied or (entry.without_cuda and cuda):
            continue
        try:
            entry.install()
        except UpstreamChanged as error:
            installed = ", ".join(f"{package} {metadata.version(package)}" for package in ("megatron-core", "torch"))
            raise RuntimeError(f"megatron_patches: {entry.name} no longer fits: {error}; checked with {entry.checked}; installed: {installed}") from error
        _applied.add(entry.name)


def listing() -> tuple[Patch, ...]:
    """Every patch, in the order of installation."""
    from megatron_patches import device, saving, upstream  # noqa: F401  (importing them fills PATCHES)

    return tuple(PATCHES)
