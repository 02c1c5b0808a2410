"""Stand-ins for two packages that SGLang imports and a CPU environment cannot have.

``sglang_rollout.servers.launch`` puts them in place, in server processes only. Each is a module
object in ``sys.modules``. Nothing is on the path, so no other process (the trainer, the tests) ever
sees them.

Versions: sglang 0.5.17 to 0.5.23 with transformers 5.12. Remove the stand-in of torchvision when
SGLang imports torchvision only where images are read. Remove the stand-in of sgl_kernel when
sglang-kernel has a CPU wheel.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch


def install() -> None:
    """Replace the packages that are not installed, or that do not load without a GPU.

    It must run before anything of SGLang is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        # transformers comes first: it must still find no torchvision.
        _hide_torchvision_from_transformers()
        _install_torchvision()
        _replace_auto_image_processor()
    if not _loads("sgl_kernel"):
        _install_sgl_kernel()


def _loads(name: str) -> bool:
    """Return whether the package can be imported."""
    if importlib.util.find_spec(name) is None:
        return False
    # In the image the package is a CUDA build, which needs the GPU's driver to load.
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        # An import that fails leaves its finished parts behind, and the stand-in would mix with
        # them.
        for loaded in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[loaded]
        return False
    return True


def _module(name: str, **names: object) -> ModuleType:
    """Make a module with these names and put it into sys.modules."""
    module = ModuleType(name, "A stand-in of sglang_rollout.cpu.stand_ins.")
    # find_spec() raises for a loaded module without a spec. A package needs a path as well.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(names)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _refusing(name: str) -> Callable[..., NoReturn]:
    """Return a function that can be imported and refuses to be called."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f"{name} is a stand-in: this server runs on a CPU and serves text models only"
        )

    refuse.__name__ = name.rpartition(".")[2]
    return refuse


# torchvision: sglang/srt/utils/common.py and some files of sglang/srt/configs import four of its
# names at the top. Its wheel on PyPI is a CUDA build, whose operators do not load beside a CPU
# torch. No text model calls any of them.


def _hide_torchvision_from_transformers() -> None:
    """Make transformers remember that there is no torchvision.

    With a torchvision it would import far more of it than the stand-in has.
    """
    from transformers.utils import import_utils

    # The question is cached, so its answer holds for the life of the process.
    assert hasattr(import_utils.is_torchvision_available, "cache_info"), (
        "transformers no longer remembers whether torchvision is there"
    )
    assert not import_utils.is_torchvision_available()


def _install_torchvision() -> None:
    _module("torchvision", __version__="0.0.0")
    _module("torchvision.io", decode_jpeg=_refusing("torchvision.io.decode_jpeg"))
    interpolation = type("InterpolationMode", (), {})
    _module("torchvision.transforms", InterpolationMode=interpolation)
    _module("torchvision.transforms.functional", InterpolationMode=interpolation)


class _NoImageProcessor:
    """Replaces transformers.AutoImageProcessor. It registers nothing and loads nothing."""

    @staticmethod
    def register(*_: object, **__: object) -> None:
        """Ignore a multimodal processor, which SGLang registers while it is imported."""

    from_pretrained = staticmethod(_refusing("transformers.AutoImageProcessor.from_pretrained"))


def _replace_auto_image_processor() -> None:
    """Replace the one class whose register() fails without torchvision.

    sglang/srt/configs/utils.py calls it when it is imported.
    """
    # The import of sglang exchanges the transformers module, so the name is set after it.
    import sglang  # noqa: F401

    vars(sys.modules["transformers"])["AutoImageProcessor"] = _NoImageProcessor


# sgl_kernel: SGLang's compiled kernels (sglang-kernel) have no CPU wheel and no source on PyPI. On
# a CPU without AMX tiles SGLang falls back to plain torch for everything but
# assign_req_to_token_pool_cpu (sglang/srt/mem_cache/allocation.py). Every other *_cpu name can be
# imported and refuses to be called. As torch.ops.sgl_kernel.convert_weight_packed does not exist,
# SGLang leaves AMX alone on a CPU that has it.


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,  # [B] rows of the pool
    req_to_token: torch.Tensor,  # [R, C] the pool
    start_offset: torch.Tensor,  # [B]
    end_offset: torch.Tensor,  # [B]
    out_cache_loc: torch.Tensor,  # [sum(end - start)]
    pool_len: int,
) -> None:
    """Write each request's new cache locations into its row of the pool, at start..end."""
    offset = 0
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in spans:
        # The new locations of all requests lie one behind the other.
        locations = out_cache_loc[offset : offset + end - start]
        req_to_token[row, start:end] = locations.to(req_to_token.dtype)
        offset += end - start


def _install_sgl_kernel() -> None:
    def missing(name: str) -> Any:
        if name.endswith("_cpu"):
            return _refusing(f"sgl_kernel.{name}")
        # Any other name fails at its import, so that a new need of SGLang is noticed at once.
        raise AttributeError(f"sgl_kernel.{name} is not part of the stand-in")

    _module(
        "sgl_kernel",
        __version__="0.0.0",
        __getattr__=missing,
        assign_req_to_token_pool_cpu=assign_req_to_token_pool_cpu,
    )
