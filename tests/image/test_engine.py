"""Transformer Engine's own Python, of the image's version: what our models become of it, and that
the stand-in of tests/megatron does the same.

Runs in the image's environment alone (run.sh). Its kernels need a GPU: no forward pass is made
here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import megatron_patches
from tests.image.engine_cases import LAYOUTS, describe
from tests.megatron.launch import ROOT, run_ranks
from tests.megatron.test_engine_spec import write_qwen2
from tests.models import write_qwen3_dense, write_qwen3_moe

REAL = os.environ.get("LOPD_ENGINE") in ("real", "stub")
pytestmark = pytest.mark.skipif(
    not REAL, reason="needs the image's environment: bash tests/image/run.sh"
)
STAND_IN = ROOT / "tests/megatron/stand_in_engine"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank found with the real one and with the stand-in."""
    root = tmp_path_factory.mktemp("engine")
    folders = {
        "moe": write_qwen3_moe(root / "moe"),
        "dense": write_qwen3_dense(root / "dense"),
        "biased": write_qwen2(root / "biased"),
    }
    models = {name: str(folder) for name, folder in folders.items()}
    mode = os.environ["LOPD_ENGINE"]
    real = run_ranks(describe, 2, env={"LOPD_ENGINE": mode, "PYTHONPATH": str(ROOT)}, models=models)
    stand_in = run_ranks(
        describe,
        2,
        env={"LOPD_ENGINE": "hidden", "PYTHONPATH": f"{STAND_IN}:{ROOT}"},
        models=models,
    )
    return {"real": real, "stand-in": stand_in}


CASES = [
    f"{name}, {layout}"
    for name in ("moe", "dense", "biased")
    for layout in LAYOUTS
    if name == "moe" or "expert" not in layout
]


def test_the_real_one_is_compared_with_the_stand_in(
    engines: dict[str, list[dict[str, Any]]],
) -> None:
    assert engines["real"][0]["version"].startswith("2.16.1")
    assert "stand_in" not in engines["real"][0]["file"]
    assert str(STAND_IN) in engines["stand-in"][0]["file"]


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_mapped_and_comes_back_to_the_bit(
    case: str, engines: dict[str, list[dict[str, Any]]]
) -> None:
    for rank in engines["real"]:
        assert rank[case]["changed"] == []
        assert rank[case]["shapes"]


@pytest.mark.parametrize("case", CASES)
def test_the_stand_in_has_its_names_shapes_and_marks(
    case: str, engines: dict[str, list[dict[str, Any]]]
) -> None:
    for real, stand_in in zip(engines["real"], engines["stand-in"], strict=True):
        assert stand_in[case]["shapes"] == real[case]["shapes"]
        assert stand_in[case]["built"] == real[case]["built"]


@pytest.mark.parametrize("case", CASES)
def test_marks_are_as_the_trainer_needs_them(
    case: str, engines: dict[str, list[dict[str, Any]]]
) -> None:
    """Experts count in the norm on every rank and are reduced over their own group; norms are
    summed over tensor ranks; split weights say so.
    """
    tensor = LAYOUTS[case.split(", ")[1]].get("tensor", 1)
    for rank in engines["real"]:
        marks = rank[case]["trained"]
        for name, found in marks.items():
            if ".mlp.experts." in name:
                assert found.get("tensor_model_parallel") is True, name
                assert found.get("allreduce", False) is False, name
            elif "norm" in name or ".router." in name:
                assert found.get("sequence_parallel", False) is (tensor > 1), name
                assert not found.get("tensor_model_parallel"), name
            elif name.endswith("weight"):
                assert found.get("tensor_model_parallel") is True, name


def test_unmarked_experts_are_what_the_trainer_mends(
    engines: dict[str, list[dict[str, Any]]],
) -> None:
    """When Transformer Engine or Megatron-Core marks them again, the trainer's mark can go."""
    built = engines["real"][0]["moe, tensor and expert"]["built"]
    experts = [marks for name, marks in built.items() if ".mlp.experts." in name]
    assert experts
    assert not any(marks.get("tensor_model_parallel") for marks in experts)


# ---- FusedAdam ----


def _stand_in_optimizers() -> ModuleType:
    path = STAND_IN / "transformer_engine/pytorch/optimizers.py"
    spec = importlib.util.spec_from_file_location("stand_in_optimizers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _adam_of(fused: Any) -> None:
    """Puts a plain torch product in place of FusedAdam's kernels, which need a GPU."""

    def adam(
        chunk: int,
        overflow: Any,
        lists: Any,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: Any,
        mode: int,
        correct: int,
        decay: float,
    ) -> None:
        assert mode == 1, "AdamW"
        for entries in zip(*lists, strict=True):
            gradient, param, mean, spread = entries[:4]
            master = entries[4] if len(entries) > 4 else param
            value = gradient.float()
            mean.lerp_(value, 1 - beta1)
            spread.mul_(beta2).addcmul_(value, value, value=1 - beta2)
            direction = (mean / (1 - beta1**step)) / (spread / (1 - beta2**step)).sqrt().add(eps)
            master.sub_(lr * (direction + decay * master))
            if master is not param:
                param.copy_(master)

    fused.multi_tensor_adam = adam


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with float32 weights": {"master_weights": True, "use_decoupled_grad": True},
    "with remainders": {
        "master_weights": True,
        "use_decoupled_grad": True,
        "store_param_remainders": True,
    },
    "with moments of 16 bits": {
        "master_weights": True,
        "use_decoupled_grad": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_stand_ins_optimizer_keeps_state_as_the_real_one(settings: str) -> None:
    """Names, types and values of its state after it is made, and how that is read and written."""
    megatron_patches.apply()  # FusedAdam asks for the current CUDA device
    from transformer_engine.pytorch.optimizers import FusedAdam

    def made(kind: Any) -> tuple[Any, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        dtype = torch.float32 if settings == "plain" else torch.bfloat16
        param = torch.randn(33, generator=generator).to(dtype).requires_grad_()
        fused = kind([param], **SETTINGS[settings])
        remainders = fused.store_param_remainders and dtype == torch.bfloat16
        fused.initialize_state(param, remainders)
        return fused, param

    real, real_param = made(FusedAdam)
    ours, our_param = made(_stand_in_optimizers().FusedAdam)
    assert real.master_weights == ours.master_weights
    assert real.store_param_remainders == ours.store_param_remainders
    assert real.state[real_param].keys() == ours.state[our_param].keys()
    for kind, tensor in real.state[real_param].items():
        held = ours.state[our_param][kind]
        assert tensor.dtype == held.dtype, kind
        assert torch.equal(tensor, held), kind
        read = real.get_unscaled_state(real_param, kind)
        ours_read = ours.get_unscaled_state(our_param, kind)
        assert read.dtype == ours_read.dtype
        numbers = torch.arange(33)
        new = numbers.to(torch.int16) if tensor.dtype == torch.int16 else numbers / 8
        real.set_scaled_state(real_param, kind, new.clone())
        ours.set_scaled_state(our_param, kind, new.clone())
        assert torch.equal(real.state[real_param][kind], ours.state[our_param][kind])


@pytest.mark.parametrize("settings", ["plain", "with float32 weights"])
def test_its_step_is_the_stand_ins(settings: str) -> None:
    """The real class, counting, bias correction and choice of lists, with torch in place of the
    kernel.
    """
    megatron_patches.apply()  # FusedAdam asks for the current CUDA device
    from transformer_engine.pytorch.optimizers import FusedAdam

    weights = []
    for kind in (FusedAdam, _stand_in_optimizers().FusedAdam):
        generator = torch.Generator().manual_seed(5)
        dtype = torch.float32 if settings == "plain" else torch.bfloat16
        param = torch.randn(33, generator=generator).to(dtype).requires_grad_()
        fused = kind([param], lr=0.1, weight_decay=0.1, betas=(0.9, 0.98), **SETTINGS[settings])
        if kind is FusedAdam:
            _adam_of(fused)
        for _ in range(3):
            gradient = torch.randn(33, generator=generator)
            if settings == "plain":
                param.grad = gradient
            else:
                param.decoupled_grad = gradient  # type: ignore[attr-defined]
            fused.step()
        assert fused.param_groups[0]["step"] == 3
        weights.append(param.detach().clone())
    torch.testing.assert_close(
        weights[0], weights[1], rtol=0, atol=1e-6 if settings == "plain" else 8e-3
    )
    assert not torch.equal(
        weights[0], torch.randn(33, generator=torch.Generator().manual_seed(5)).to(weights[0].dtype)
    )


# ---- imports ----


def test_cublas_has_the_function_that_its_library_calls() -> None:
    """Without it libtransformer_engine.so does not load, and `import megatron.core` fails."""
    libraries = Path(os.environ["LOPD_IMAGE_PACKAGES"], "nvidia/cu13/lib")
    assert hasattr(
        ctypes.CDLL(str(libraries / "libcublasLt.so.13")),
        "cublasLtGroupedMatrixLayoutInit_internal",
    )


def test_megatron_core_finds_it() -> None:
    from megatron.core.extensions import transformer_engine as extensions
    from megatron.core.models.gpt import gpt_layer_specs

    assert extensions.HAVE_TE
    assert gpt_layer_specs.HAVE_TE
    assert Path(importlib.import_module("transformer_engine_torch").__file__ or "").exists()
