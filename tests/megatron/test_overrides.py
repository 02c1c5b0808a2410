"""The [sft.megatron] and [distill.megatron] tables: what is taken, what is refused and how it is
said. What taken fields do is in test_health.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from lopd import checks
from lopd.config import OptimizerSection, load_config
from lopd.errors import ConfigError, LopdError
from lopd.megatron.model import overrides
from lopd.megatron.model.overrides import read_overrides
from lopd.megatron.model.reserved_fields import KNOBS, MODEL_SHAPE, TRAINER
from lopd.megatron.training.optimizer import optimizer_config
from lopd.megatron.training.wrapping import ddp_config

EXAMPLE = Path(__file__).parents[2] / "examples/tiny_moe.toml"


def refusal(**table: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_overrides(table, where="distill.megatron")
    return str(caught.value)


def test_each_field_goes_where_megatron_has_it() -> None:
    found = read_overrides(
        {
            "moe_z_loss_coeff": 1e-3,
            "pin_cpu_grads": False,
            "overlap_grad_reduce": True,
            "barrier_with_L1_time": False,
        }
    )
    assert found.transformer == {"moe_z_loss_coeff": 1e-3, "barrier_with_L1_time": False}
    assert found.optimizer == {"pin_cpu_grads": False, "barrier_with_L1_time": False}
    assert found.distributed == {"overlap_grad_reduce": True}


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("moe_expert_capacity_factor", 1, 1.0),
        ("bucket_size", 40_000_000, 40_000_000),
        ("cp_comm_type", "a2a", "a2a"),
        ("main_grads_dtype", "float32", torch.float32),
        ("moe_router_dtype", "fp64", "fp64"),
        ("recompute_modules", ["core_attn", "moe_act"], ["core_attn", "moe_act"]),
    ],
)
def test_values_of_the_right_type_are_taken(name: str, value: object, taken: object) -> None:
    found = read_overrides({name: value})
    assert {**found.transformer, **found.optimizer, **found.distributed}[name] == taken


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("overlap_grad_reduce", 3, "bool"),
        ("bucket_size", 4.0, "int"),
        ("bucket_size", True, "int"),
        ("moe_z_loss_coeff", float("nan"), "float"),
        ("moe_router_dtype", "fp16", "'fp32', 'fp64'"),
        ("main_grads_dtype", "bf16", "float32, bfloat16"),
        ("attention_backend", "flas", "flash, fused"),
        ("timers", 1, "TOML cannot write"),
        ("cp_comm_type", "all_gather", "p2p or a2a for all layers"),
        ("cp_comm_type", ["p2p", "a2a"], "p2p or a2a for all layers"),
    ],
)
def test_values_of_another_type_are_refused_with_the_right_one(
    name: str, value: object, limit: str
) -> None:
    message = refusal(**{name: value})
    assert name in message
    assert limit in message


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    assert "unknown field overlap_grad_reduc" in refusal(overlap_grad_reduc=True)
    assert "the nearest known field is overlap_grad_reduce" in refusal(overlap_grad_reduc=True)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("tensor_model_parallel_size", "the knob distill.parallel.tensor"),
        ("lr", "the knob distill.optimizer.lr"),
        ("bf16", "the knob distill.dtype"),
        ("recompute_granularity", "the knob distill.recompute"),
        ("init_method_std", "the knob sft.init_std"),
        ("num_layers", "the model's config.json"),
        ("overlap_param_gather", "the trainer (weights are read between steps"),
        ("context_parallel_size", "the knob distill.parallel.context"),
        ("hybrid_context_parallel", "the trainer (every sequence is cut over all context ranks"),
    ],
)
def test_a_field_of_somebody_else_is_refused_with_its_owner(name: str, owner: str) -> None:
    assert f"{name} is set by {owner}" in refusal(**{name: 1})


def test_every_owned_field_exists_and_every_owner_too() -> None:
    """A field that Megatron-Core renames would slip through the refusal otherwise."""
    known = {
        field.name
        for kind in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
        for field in dataclasses.fields(kind)
    }
    assert {*KNOBS, *MODEL_SHAPE, *TRAINER} <= known
    config = load_config(EXAMPLE)
    for knob in KNOBS.values():
        value: Any = config.sft
        for part in knob.split("."):
            value = getattr(value, part)


def test_settings_that_need_other_hardware_are_refused_by_name() -> None:
    if not torch.cuda.is_available():
        assert "optimizer_cpu_offload needs CUDA" in refusal(
            optimizer_cpu_offload=True, optimizer_offload_fraction=0.5
        )
        assert "use_precision_aware_optimizer needs" in refusal(
            use_precision_aware_optimizer=True, exp_avg_dtype="bfloat16"
        )
        for name, value in (
            ("moe_grouped_gemm", True),
            ("moe_permute_fusion", True),
            ("fp8", "e4m3"),
        ):
            assert f"{name} needs Transformer Engine and a GPU" in refusal(**{name: value})
        assert read_overrides({"moe_grouped_gemm": False}).transformer == {
            "moe_grouped_gemm": False
        }
    assert "exp_avg_sq_dtype = 'bfloat16' needs use_precision_aware_optimizer" in refusal(
        exp_avg_sq_dtype="bfloat16"
    )


def test_offload_and_precision_settings_reach_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU; precision-aware with offload does not ask for Transformer
    Engine's FusedAdam.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(overrides.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        "megatron.core.optimizer.optimizer_config.is_te_min_version", lambda version: True
    )
    table = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": "bfloat16",
    }
    fields = read_overrides({**table, "grad_reduce_in_fp32": False})
    config = optimizer_config(
        OptimizerSection(), dtype=torch.bfloat16, distributed=True, overrides=fields.optimizer
    )
    assert config.optimizer_cpu_offload
    assert config.optimizer_offload_fraction == 0.5
    assert config.main_grads_dtype == torch.bfloat16
    assert not ddp_config(True, fields.distributed).grad_reduce_in_fp32
    with pytest.raises(
        ConfigError, match=r"OptimizerConfig refuses these settings: .*distributed optimizer"
    ):
        optimizer_config(
            OptimizerSection(), dtype=torch.bfloat16, distributed=False, overrides=fields.optimizer
        )


def findings(*knobs: str) -> list[str | LopdError]:
    return [*checks.megatron(load_config(EXAMPLE, knobs))]


def test_lopd_check_looks_at_the_tables() -> None:
    assert findings() == ["no fields beside the knobs"]
    assert findings("distill.megatron.overlap_grad_reduce=true") == [
        "distill.megatron: overlap_grad_reduce"
    ]
    taken, refused = findings(
        "sft.megatron.moe_z_loss_coeff=0.001",
        "distill.megatron.moe_pad_expert_input_to_capacity=true",
    )
    assert taken == "sft.megatron: moe_z_loss_coeff"
    assert isinstance(refused, ConfigError)
    assert str(refused).startswith(
        "distill.megatron: Megatron-Core's TransformerConfig refuses these settings: "
    )
    assert "moe_expert_capacity_factor" in str(refused)


def test_a_field_is_part_of_what_decides_a_result() -> None:
    from lopd.config import result_keys

    config = load_config(EXAMPLE, ["distill.megatron.moe_z_loss_coeff=0.001"])
    assert (
        json.loads(json.dumps(result_keys(config, ["distill"])))[
            "distill.megatron.moe_z_loss_coeff"
        ]
        == 0.001
    )
