"""Transformer Engine's layer spec, chosen where it is there: the same model under other parameter
names. Run with a stand-in in plain torch, no GPU needed; that the real one does the same is for a
machine that has it (docs/gpu_results.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.limits import apart, close, within
from tests.megatron.context_cases import CONTROLS
from tests.megatron.engine_cases import LAYOUTS, PRECISE, two_ranks
from tests.megatron.launch import ROOT, run_ranks
from tests.megatron.parity_cases import LIMIT
from tests.megatron.test_trainer import difference
from tests.models import write_qwen3_dense, write_qwen3_moe

ENGINE_PATH = {"PYTHONPATH": f"{Path(__file__).parent / 'stand_in_engine'}:{ROOT}"}


def write_qwen2(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=512,
            max_position_embeddings=512,
            initializer_range=0.15,
            tie_word_embeddings=False,
            **sizes,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("engine")
    models = {
        "moe": write_qwen3_moe(root / "moe"),
        "dense": write_qwen3_dense(root / "dense"),
        "biased": write_qwen2(root / "biased"),
    }
    return run_ranks(
        two_ranks,
        2,
        env=ENGINE_PATH,
        folder=str(root / "checkpoints"),
        **{name: str(folder) for name, folder in models.items()},
    )


def test_it_is_used_where_it_imports_and_a_gpu_is_there(measured: list[dict[str, Any]]) -> None:
    assert measured[0]["found"]
    assert measured[0]["used without a GPU"] == torch.cuda.is_available()


@pytest.mark.parametrize("model", [*LAYOUTS, "dense", "biased"])
def test_a_model_of_its_modules_is_that_of_transformers(
    model: str, measured: list[dict[str, Any]]
) -> None:
    for rank in measured:
        within(max(rank[model]["difference"].values()), LIMIT)


def test_experts_in_each_others_place_would_be_noticed(measured: list[dict[str, Any]]) -> None:
    apart(max(measured[0]["one expert wrong"].values()), 100 * LIMIT)


@pytest.mark.parametrize("model", [*LAYOUTS, "dense", "biased"])
def test_weights_go_there_and_back_bit_for_bit(model: str, measured: list[dict[str, Any]]) -> None:
    assert measured[0][model]["changed"] == []


def test_its_parameters_have_its_names(measured: list[dict[str, Any]]) -> None:
    """So that the tests above are of these names, not of the local ones."""
    layer = "decoder.layers.0."
    moe = set(measured[0]["tensor and expert"]["names"])
    dense = set(measured[0]["biased"]["names"])
    assert {
        f"{layer}self_attention.linear_qkv.layer_norm_weight",
        f"{layer}pre_mlp_layernorm.weight",
        f"{layer}mlp.experts.linear_fc1.weight1",
    } <= moe
    assert {
        f"{layer}self_attention.linear_qkv.bias",
        f"{layer}mlp.linear_fc1.layer_norm_weight",
    } <= dense
    assert not [
        name for name in moe | dense if "local_experts" in name or "input_layernorm" in name
    ]


@pytest.mark.parametrize("training", ["training", "recomputed", "pipeline"])
def test_five_steps_are_those_of_the_local_layers_and_torchs_optimizer(
    training: str, measured: list[dict[str, Any]]
) -> None:
    assert measured[0]["optimizer"] == "FusedAdam"
    for figures in ("loss", "grad_norm"):
        expected = measured[0]["local training"][figures]
        close(measured[0][training][figures], expected, rel=1e-5, name=figures)


@pytest.mark.parametrize("model", ["moe", "biased"])
def test_adapters_are_trained_as_on_the_local_layers(
    model: str, measured: list[dict[str, Any]]
) -> None:
    """Experts are one grouped layer here, and the norm before a layer is a part of it."""
    found = measured[0]["adapters"][model]
    local = measured[0]["local adapters"][model]
    for figures in ("loss", "grad_norm"):
        close(found[figures], local[figures], rel=1e-5, name=figures)
    assert found["adapters"] == local["adapters"] > 0
    assert len(set(found["loss"])) == 5


def test_experts_without_the_mark_would_be_missing_in_the_norm(
    measured: list[dict[str, Any]],
) -> None:
    """Half of them, those of the second tensor rank: Transformer Engine leaves grouped weights
    unmarked.
    """
    unmarked, whole = (
        measured[0][name]["grad_norm"][0] for name in ("experts unmarked", "local training")
    )
    assert unmarked < 0.99 * whole  # seen: 0.976
    first = measured[0]["local training"]["loss"][0]
    close(measured[0]["experts unmarked"]["loss"][0], first, rel=1e-5)


def test_a_training_resumes_and_not_from_a_checkpoint_of_the_other_layers(
    measured: list[dict[str, Any]],
) -> None:
    """Its FusedAdam counts updates in its groups, where a resume puts them."""
    found = measured[0]["resumed"]
    assert found["resumed"] == {key: values[-2:] for key, values in found["unbroken"].items()}
    assert (
        "the checkpoint was written with layers = transformer_engine; limit: exactly layers = local"
        in measured[0]["refused"]
    )


@pytest.mark.parametrize("kept", PRECISE)
def test_a_precision_aware_training_resumes_to_the_bit(
    kept: str, measured: list[dict[str, Any]]
) -> None:
    """And goes on where Megatron keeps the weights.

    Whole weights go on to the bit. With remainders FusedAdam rounds halves up, torch to even (seen:
    1.3e-7). Moments of 16 bits are no longer rounded.
    """
    limit = {"float32": 1e-6, "whole": 0, "remainders": 1e-5, "moments of 16 bits": 1e-2}[kept]
    for rank in measured:
        found = rank["precise"][kept]
        assert found["resumed"] == found["unbroken"][3:]
        assert found["weights"][0] == found["weights"][1]
        if limit:
            close(found["by Megatron"], found["unbroken"][3:], rel=limit, name=kept)
        else:
            assert found["by Megatron"] == found["unbroken"][3:]
        assert len(set(found["unbroken"])) == 5
        types = {
            "float32": ["float32"],
            "whole": ["float32"],
            "remainders": ["float32", "int16"],
            "moments of 16 bits": ["bfloat16", "int16"],
        }[kept]
        assert found["types"] == [f"torch.{name}" for name in types]


def test_megatrons_own_way_to_make_this_state_fails(measured: list[dict[str, Any]]) -> None:
    """When it no longer does, lopd.megatron.training.optimizer can leave it to Megatron-Core."""
    assert "store_param_remainders" in measured[0]["precise"]["Megatron's own"]


# ---- context parallelism (on four ranks: test_context.py) ----


def test_five_steps_of_two_context_ranks_are_those_of_one_rank(
    measured: list[dict[str, Any]],
) -> None:
    """Uneven sequences, and a last microbatch without samples. Weights may differ more: AdamW
    divides small gradients by their size.
    """
    for rank in measured:
        found = rank["context"]["right"]
        alone = rank["context"]["one rank"]
        within(difference(found, alone), 1e-5, "steps")
        within(found["weights"], 1e-4, "weights")
        within(difference(alone, rank["local training"]), 1e-5, "other layers")
    assert measured[0]["context"]["right"]["weights"] > 0, "nothing was compared"


def test_context_ranks_count_every_token_once(measured: list[dict[str, Any]]) -> None:
    found, alone = (measured[0]["context"][name]["first"] for name in ("right", "one rank"))
    assert found.pop("padding_share") > alone.pop("padding_share"), (
        "each sequence is padded to a multiple of four tokens"
    )
    close(found, alone, rel=1e-5)


@pytest.mark.parametrize("fault", CONTROLS)
def test_a_wrong_cut_and_wrong_positions_would_be_noticed(
    fault: str, measured: list[dict[str, Any]]
) -> None:
    found = measured[0]["context"][fault]
    apart(difference(found, measured[0]["context"]["one rank"]), 1e-3, "steps")
    apart(found["weights"], 1e-3, "weights")
