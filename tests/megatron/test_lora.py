"""Adapters: they alone are trained, alike in every layout; what is exported is what was trained, as
a whole model and as PEFT names it; a killed training goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lopd.config import LoraSection, load_config
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.adapters import adapter_weights, adapters
from lopd.megatron.weights.architecture import read_architecture
from lopd.megatron.weights.hf_mapping import global_name
from lopd.stages.adapter_folder import peft_config
from tests.limits import apart, within
from tests.megatron.launch import run_ranks
from tests.megatron.lora_cases import LAYOUTS, SAVED_AT, one_rank, two_ranks
from tests.megatron.parity_cases import LIMIT
from tests.megatron.test_trainer import difference
from tests.megatron.trainer_cases import NUM_STEPS
from tests.models import write_qwen3_dense, write_qwen3_moe
from tests.test_config import written

MODELS = ["experts", "dense"]
# Of tensors after another order of float32 additions.
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("lora")
    dense = write_qwen3_dense(root / "source")
    results: dict[str, Any] = run_ranks(
        one_rank, 1, model=str(model), dense=str(dense), folder=str(root)
    )[0]
    return results


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return run_ranks(two_ranks, 2, model=str(model), folder=str(folder))


# ---- what is trained ----


@pytest.mark.parametrize("name", MODELS)
def test_adapters_alone_have_gradients_and_optimizer_state(name: str, one: dict[str, Any]) -> None:
    found = one[name]
    assert found["trained"]["names"] == ["lora_A", "lora_B"]
    assert found["trained"]["gradients"] == found["trained"]["adapters"]
    assert found["trained"]["moments"] == 2 * found["trained"]["adapters"]
    assert found["frozen weights stay"]
    assert found["base"], "the weights without adapters are those of the file, bit for bit"


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_falls(name: str, one: dict[str, Any]) -> None:
    losses = one[name]["same data"]
    assert sorted(losses, reverse=True) == losses


def test_the_first_step_is_that_of_the_base_model_whatever_the_settings(
    one: dict[str, Any],
) -> None:
    """B is zero: the adapters change nothing yet. Then they do."""
    losses = {name: one[name]["loss"] for name in ("experts", "experts alone", "alpha doubled")}
    assert len({loss[0] for loss in losses.values()}) == 1
    assert len({loss[1] for loss in losses.values()}) == 3


def test_recompute_changes_nothing_and_would_train_nothing_without_a_gradient_of_its_input(
    one: dict[str, Any],
) -> None:
    within(difference(one["full recompute"], one["experts"]), 1e-5)
    without = one["full recompute, no gradient asked for"]
    assert without["grad_norm"] == [0.0] * NUM_STEPS, "nothing is trained, and nothing says so"


# ---- what is exported ----


@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_is_the_one_that_was_trained(name: str, one: dict[str, Any]) -> None:
    within(one[name]["merged"], LIMIT)
    assert one[name]["names"], "the names are those of the base"
    apart(one[name]["without"], 100 * LIMIT, "the base without adapters")


@pytest.mark.parametrize("name", MODELS)
def test_the_base_and_the_adapter_by_pefts_names_are_the_same_model(
    name: str, one: dict[str, Any]
) -> None:
    within(one[name]["tensors"], ROUNDING)
    within(one[name]["by names"], LIMIT)
    apart(one[name]["doubled"], 100 * LIMIT, "B doubled")


@pytest.mark.parametrize("name", MODELS)
def test_projections_alone_are_changed(name: str, one: dict[str, Any]) -> None:
    assert all(weight.endswith("_proj.weight") for weight in one[name]["changed"])
    experts = 4 if name == "experts" else 1
    assert len(one[name]["changed"]) == 2 * (4 + 3 * experts), "every projection of every layer"


def test_the_adapters_config_is_what_peft_reads(one: dict[str, Any]) -> None:
    assert one["experts"]["config"] == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": one["experts"]["config"]["base_model_name_or_path"],
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted(
            f"{module}_proj" for module in ("q", "k", "v", "o", "gate", "up", "down")
        ),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    assert one["experts"]["left"] == ["adapter", "by names", "doubled", "merged"], "no partial ones"


def test_adapters_have_the_type_of_the_weights(one: dict[str, Any]) -> None:
    assert one["bfloat16"]["types"] == ["torch.bfloat16"]
    assert one["bfloat16"]["merged types"] == ["torch.bfloat16"]


# ---- layouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_are_the_same_in_every_layout(
    layout: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    within(difference(two[0][layout], one["experts"]), 1e-5)
    assert two[0][layout] == two[1][layout]


def test_matrices_without_their_marks_are_noticed(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    apart(difference(two[0]["unmarked"], one["experts"]), 1e-3, "gradients not summed")
    norms = two[0]["counted twice"]["grad_norm"]
    apart(abs(norms[1] / one["experts"]["grad_norm"][1] - 1), 1e-3, "counted twice")


def test_new_adapters_are_the_same_in_every_layout(two: list[dict[str, Any]]) -> None:
    found = two[0]["adapters"]
    assert found["data"] == found["tensor and expert"]
    assert two[1]["adapters"]["data"] == {}, "the first rank gets them"
    q, k = (
        found["data"][f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_A.weight"]
        for name in "qk"
    )
    o = found["data"]["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"]
    assert q == k != o


# ---- checkpoints ----


@pytest.mark.parametrize("layout", ["tensor and expert", "expert tensor", "data, plain optimizer"])
def test_a_resumed_training_is_bit_for_bit_the_unbroken_one(
    layout: str, two: list[dict[str, Any]]
) -> None:
    for rank in two:
        found = rank["checkpoints"][layout]
        assert found["resumed"] == found["unbroken"]
        assert found["weights"][0] == found["weights"][1]
        assert found["state"] == {"cursor": SAVED_AT}


def test_so_is_one_of_bfloat16_weights(one: dict[str, Any]) -> None:
    assert one["bfloat16"]["resumed"] == one["bfloat16"]["unbroken"]
    assert one["bfloat16"]["weights"][0] == one["bfloat16"]["weights"][1]


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_a_training_goes_on_under_another_layout(layout: str, two: list[dict[str, Any]]) -> None:
    found = two[0]["checkpoints"]
    unbroken = found["tensor and expert"]["unbroken"]
    within(difference(found[f"tensor and expert -> {layout}"], unbroken), 2e-6)
    apart(difference(found["a matrix changed"], unbroken), 1e-4, "a matrix changed by 1%")


def test_a_checkpoint_has_the_adapters_alone(two: list[dict[str, Any]]) -> None:
    """Their weights and two moments."""
    found = two[0]["checkpoints"]
    assert {name.rpartition(".")[2] for name in found["stored"]} == {"lora_A", "lora_B"}
    assert sum(found["stored"].values()) == 3 * found["adapters"]


def test_a_checkpoint_of_other_adapters_is_refused_in_a_line(two: list[dict[str, Any]]) -> None:
    ours = "rank 4, alpha 8, linear_fc1 linear_fc2 linear_proj linear_qkv"
    found = two[0]["checkpoints"]
    assert f"was written with lora = {ours}" in found["another rank"]
    assert "limit: exactly lora = rank 8, alpha 8, " in found["another rank"]
    assert "limit: exactly lora = none, as in this run" in found["no adapters"]
    assert "use the same lora as the checkpoint" in found["no adapters"]


# ---- names ----


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "decoder.layers.1.mlp.experts.linear_fc1.lora_A2",
            "decoder.layers.4.mlp.experts.local_experts.10.linear_fc1.lora_A",
        ),
        (
            "decoder.layers.0.self_attention.linear_qkv.lora_B",
            "decoder.layers.3.self_attention.linear_qkv.lora_B",
        ),
    ],
)
def test_adapters_of_any_layers_become_the_names_of_the_table(theirs: str, ours: str) -> None:
    assert global_name(theirs, first_layer=3, first_expert=8) == ours


def test_every_target_has_adapters_and_others_have_none(model: Path) -> None:
    arch = read_architecture(model)
    for target in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"):
        found = [*adapters(arch, LoraSection(rank=2, targets=[target]))]
        assert len(found) == arch.num_layers * (arch.num_experts if "fc" in target else 1)
        assert {adapter.base.megatron.rpartition(".")[0][-len(target) :] for adapter in found} == {
            target
        }
    assert adapter_weights(arch, LoraSection()) == []


def test_targets_become_pefts_modules_and_the_whole_path_is_not_written(tmp_path: Path) -> None:
    config = peft_config(LoraSection(rank=2, alpha=3.5, targets=["linear_fc1"]), tmp_path / "a/b")
    assert config["target_modules"] == ["gate_proj", "up_proj"]
    assert config["lora_alpha"] == 3.5
    assert config["base_model_name_or_path"] == "a/b"


# ---- mistakes ----


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distill.lora.rank=0", "distill.lora.rank = 0 is not allowed; limit: at least 1"),
        (
            'distill.lora={rank=4,targets=["q_proj"]}',
            "distill.lora.targets.0 = 'q_proj' is not allowed; limit: 'linear_qkv', 'linear_proj',",
        ),
        ("distill.lora={rank=4,targets=[]}", "distill.lora.targets = [] is not allowed"),
        ("sft.lora.alpha=16", "sft.lora.alpha has no effect without rank"),
        ("sft.lora={rank=4,alpha=0}", "sft.lora.alpha = 0 is not allowed; limit: above 0"),
        (
            "sft={lora={rank=4},optimizer={router_lr_scale=0.1}}",
            "sft.optimizer.router_lr_scale has no effect with lora.rank",
        ),
        (
            "distill={lora={rank=4},megatron={use_transformer_engine_op_fuser=true}}",
            "distill.megatron.use_transformer_engine_op_fuser cannot be used with lora.rank",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_were_written_out_are_read_again(tmp_path: Path) -> None:
    """A rank reads the configuration with every key set, also where there are no adapters."""
    for overrides in ([], ["sft.lora.rank=4"]):
        config = load_config(written(tmp_path), overrides)
        assert type(config).model_validate(config.model_dump(mode="json")) == config


def test_a_folder_of_adapters_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LopdError, match="this folder has adapters and no model") as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)
