"""What the ranks of test_engine.py run: models of Transformer Engine's modules, the real ones or
the stand-in's.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

MARKS = (
    "tensor_model_parallel",
    "partition_dim",
    "partition_stride",
    "sequence_parallel",
    "allreduce",
)
LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "expert": {"expert": 2},
    "tensor and expert": {"tensor": 2, "expert": 2},
    "expert tensor": {"expert_tensor": 2},
    "pipeline": {"pipeline": 2},
}


def describe(models: dict[str, str]) -> dict[str, Any]:
    """Parameters of each model in each layout: shapes, marks as built and as trained, and weights
    there and back.
    """
    import transformer_engine

    from lopd.megatron.model import engine
    from lopd.megatron.ranks import parallel

    engine.uses_engine = lambda dtype: True  # as with a GPU and bfloat16
    _let_modules_be_made()
    found: dict[str, Any] = {
        "version": transformer_engine.__version__,
        "file": transformer_engine.__file__,
    }
    for name, folder in models.items():
        for layout, sizes in LAYOUTS.items():
            if name == "moe" or "expert" not in layout:
                found[f"{name}, {layout}"] = _described(Path(folder), {"ranks": 2, **sizes})
    parallel.shutdown()
    return found


class _Answers:
    """A module with one answer changed."""

    def __init__(self, original: Any, **changed: Any) -> None:
        self.__dict__["original"] = original
        self.__dict__.update(changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


def _let_modules_be_made() -> None:
    """The real modules refuse to be made without CUDA; making them needs none."""
    try:
        base = importlib.import_module("transformer_engine.pytorch.module.base")
    except ModuleNotFoundError:  # the stand-in's are made anywhere
        return
    vars(base)["torch"] = _Answers(torch, cuda=_Answers(torch.cuda, is_available=lambda: True))


def _described(folder: Path, layout: dict[str, int]) -> dict[str, Any]:
    from lopd.config import ParallelSection
    from lopd.megatron.model.build import build_model
    from lopd.megatron.ranks import parallel
    from lopd.megatron.training.wrapping import mark_experts
    from lopd.megatron.weights.architecture import read_architecture
    from lopd.megatron.weights.transfer import export_hf, load_hf

    section = ParallelSection(**layout)
    parallel.initialize(section, seed=1, timeout_s=500)
    arch = read_architecture(folder)
    model = build_model(arch, parallel=section, dtype="float32", recompute="none", moe_aux_loss=0.0)
    built = _marks(model)
    mark_experts(model)
    load_hf(model, arch, folder)
    exported = dict(
        pair for bucket in export_hf(model, arch, bucket_bytes=1 << 20) for pair in bucket
    )
    changed = []
    if parallel.rank() == 0:
        expected = load_file(folder / "model.safetensors")
        same = {
            each
            for each in exported.keys() & expected.keys()
            if torch.equal(exported[each], expected[each])
        }
        changed = sorted((exported.keys() | expected.keys()) - same)
    return {
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "built": built,
        "trained": _marks(model),
        "changed": changed,
    }


def _marks(model: Any) -> dict[str, dict[str, Any]]:
    """A mark that is absent and one that is false say the same to Megatron-Core."""
    return {
        name: {
            mark: getattr(parameter, mark)
            for mark in MARKS
            if getattr(parameter, mark, False) is not False
        }
        for name, parameter in model.named_parameters()
    }
