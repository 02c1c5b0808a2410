"""Stand-ins for two packages that SGLang imports and a CPU environment cannot have. Put in place by
``sglang_rollout.servers.launch``, in server processes only.

Each is a module object in ``sys.modules``: nothing is on the path, so no other process (the
trainer, the tests) ever sees them.

torchvision
    Why: ``sglang/srt/utils/common.py`` and some files of ``sglang/srt/configs`` import four of its
    names at the top. Its wheel on PyPI is a CUDA
    build whose operators do not load beside a CPU torch. No text model calls any of them.
    Transformers must go on seeing no torchvision (it would import far more of it), so it is asked
    first and remembers the answer. Its
    ``AutoImageProcessor`` then refuses ``register``, which ``sglang/srt/configs/utils.py`` calls
    when it is imported: that one name gets a stand-in too.
    Versions: sglang 0.5.17 to 0.5.23 with transformers 5.12. Can go: when SGLang imports
    torchvision only where images are read.

sgl_kernel
    Why: SGLang's compiled kernels (sglang-kernel) have no CPU wheel and no source on PyPI. On a CPU
    without AMX tiles SGLang falls back to plain torch for everything but
    ``assign_req_to_token_pool_cpu`` (``sglang/srt/mem_cache/allocation.py``). Every other ``*_cpu``
    name can be imported and refuses to be called. As ``torch.ops.sgl_kernel.convert_weight_packed``
    does not exist, SGLang also leaves AMX alone on a CPU that has it. Versions: sglang 0.5.17 to
    0.5.23. Can go: when sglang-kernel has a CPU wheel.
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
    """Puts the stand-ins in place of packages that are not there, or do not load without a GPU.

    It must run before anything of SGLang is imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        _hide_torchvision_from_transformers()
        _install_torchvision()
        _replace_auto_image_processor()
    if not _loads("sgl_kernel"):
        _install_sgl_kernel()


def _loads(name: str) -> bool:
    """Whether the package imports. In the image it is a CUDA build, which needs the GPU's driver."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        for loaded in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[loaded]
        return False
    return True


def _module(name: str, **names: object) -> ModuleType:
    module = ModuleType(name, "A stand-in of sglang_rollout.cpu.stand_ins.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(names)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f"{name} is a stand-in: this server runs on a CPU and serves text models only"
        )

    refuse.__name__ = name.rpartition(".")[2]
    return refuse


# --- torchvision -----------------------------------------------------------------------------------------------------------------------------------


def _hide_torchvision_from_transformers() -> None:
    from transformers.utils import import_utils

    # lru_cache: the answer holds for the life of the process
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
    """In place of transformers.AutoImageProcessor: registers nothing, loads nothing."""

    @staticmethod
    def register(*_: object, **__: object) -> None:
        """SGLang registers its multimodal processors while it is imported; without torchvision
        there is nothing to register with.
        """

    from_pretrained = staticmethod(_refusing("transformers.AutoImageProcessor.from_pretrained"))


def _replace_auto_image_processor() -> None:
    import sglang  # noqa: F401 - its import exchanges the transformers module, so the name is set afterwards

    vars(sys.modules["transformers"])["AutoImageProcessor"] = _NoImageProcessor


# --- sgl_kernel ------------------------------------------------------------------------------------------------------------------------------------


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,  # [B] rows of the pool
    req_to_token: torch.Tensor,  # [R, C] the pool
    start_offset: torch.Tensor,  # [B]
    end_offset: torch.Tensor,  # [B]
    out_cache_loc: torch.Tensor,  # [sum(end - start)]
    pool_len: int,
) -> None:
    """Write each request's new cache locations into its row of the pool, at start..end; in place."""
    offset = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        req_to_token[row, start:end] = out_cache_loc[offset : offset + end - start].to(
            req_to_token.dtype
        )
        offset += end - start


def _install_sgl_kernel() -> None:
    def missing(name: str) -> Any:
        if name.endswith("_cpu"):
            return _refusing(f"sgl_kernel.{name}")
        raise AttributeError(f"sgl_kernel.{name} is not part of the stand-in")

    _module(
        "sgl_kernel",
        __version__="0.0.0",
        __getattr__=missing,
        assign_req_to_token_pool_cpu=assign_req_to_token_pool_cpu,
    )
