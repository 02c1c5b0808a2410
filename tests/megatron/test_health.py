"""What a step tells besides its loss, the same in every layout; routers at their own learning rate
or frozen; fields beside the knobs at work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.megatron.training.flops import training_flops
from lopd.megatron.training.health import expert_load
from lopd.megatron.weights.architecture import read_architecture
from tests.limits import apart, close, within
from tests.megatron.health_cases import one_rank, two_ranks
from tests.megatron.launch import run_ranks
from tests.megatron.trainer_cases import samples_of
from tests.models import write_qwen3_moe

LOADS = (
    "expert_entropy_share",
    "expert_entropy_share_min",
    "expert_max_load",
    "expert_dropped_share",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    dense = tmp_path_factory.mktemp("dense")
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=512, max_position_embeddings=512, **sizes)
    ).save_pretrained(dense)
    result: dict[str, Any] = run_ranks(
        one_rank,
        1,
        model=str(model),
        dense=str(dense),
        folder=str(tmp_path_factory.mktemp("checkpoints")),
    )[0]
    return result


@pytest.fixture(scope="module")
def two(model: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, model=str(model))


# ---- experts ----


def test_load_of_hand_counted_experts() -> None:
    load = expert_load(torch.tensor([[5.0, 5.0, 5.0, 5.0], [20.0, 0.0, 0.0, 0.0]]), num_routed=20)
    assert load == pytest.approx(
        {
            "expert_entropy_share": 0.5,
            "expert_entropy_share_min": 0.0,
            "expert_max_load": 4.0,
            "expert_dropped_share": 0.0,
        }
    )
    assert expert_load(torch.full((1, 4), 5.0), num_routed=25)[
        "expert_dropped_share"
    ] == pytest.approx(0.2)


def test_loads_are_those_of_hugging_face_routers(one: dict[str, Any], model: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.zeros(2, 4)
    for sample in samples_of(0):
        with torch.no_grad():
            logits = reference(
                torch.as_tensor(sample.token_ids, dtype=torch.int64)[None],
                output_router_logits=True,
            ).router_logits
        for layer, values in enumerate(logits):
            tokens[layer] += torch.nn.functional.one_hot(values.topk(2).indices, 4).sum(dim=(0, 1))
    expected = expert_load(tokens, 2 * sum(len(sample) for sample in samples_of(0)))
    close({name: one["plain"][name] for name in LOADS}, expected, abs=1e-6)
    assert 1.05 < expected["expert_max_load"] < 4, "an even load would not be told from no load"


@pytest.mark.parametrize("layout", ["tensor and expert", "data", "pipeline"])
def test_figures_of_a_step_do_not_depend_on_the_layout(
    layout: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for name in (*LOADS, "num_tokens", "padding_share"):
        close(two[0][layout][name], one["plain"][name], abs=1e-6, name=name)
    assert two[0][layout].keys() == one["plain"].keys()
    assert {name: two[0][layout][name] for name in LOADS} == {
        name: two[1][layout][name] for name in LOADS
    }


def test_padding_loads_no_expert(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in (one["padded"], two[0]["padded"]):
        expected = {name: one["plain"][name] for name in LOADS}
        close({name: found[name] for name in LOADS}, expected, abs=1e-6)
        assert found["padding_share"] > 0.3 > one["plain"]["padding_share"] > 0


def test_recomputed_layers_are_counted_once(one: dict[str, Any]) -> None:
    assert {name: one["recomputed"][name] for name in LOADS} == {
        name: one["plain"][name] for name in LOADS
    }


def test_a_capacity_factor_drops_and_drops_are_told(one: dict[str, Any]) -> None:
    assert 0.4 < one["dropping"]["expert_dropped_share"] < 0.7, "a capacity of half the tokens"
    assert one["plain"]["expert_dropped_share"] == 0
    assert one["dropping"]["advantage"] != one["plain"]["advantage"]


def test_dense_models_tell_nothing_of_experts(one: dict[str, Any]) -> None:
    assert not [name for name in one["dense"] if name.startswith("expert")]
    assert one["dense"]["model_tflops_per_s"] > 0


# ---- work and memory ----


def test_load_imbalance_is_the_most_work_over_the_mean(
    two: list[dict[str, Any]], one: dict[str, Any], model: Path
) -> None:
    from lopd.batching import plan_step
    from tests.megatron.trainer_cases import MAX_TOKENS

    lengths = [len(sample) for sample in samples_of(0)]
    arch = read_architecture(model)
    work = [
        training_flops(arch, [lengths[index] for members in rank for index in members])
        for rank in plan_step(lengths, 2, MAX_TOKENS, 2)
    ]
    assert two[0]["data"]["load_imbalance"] == pytest.approx(2 * max(work) / sum(work))
    assert two[0]["data"]["load_imbalance"] > 1
    assert one["plain"]["load_imbalance"] == 1


def test_memory_is_that_of_a_process_with_torch(one: dict[str, Any]) -> None:
    assert 0.1 < one["plain"]["peak_memory_gib"] < 20
    if not torch.cuda.is_available():
        assert "mfu" not in one["plain"], "a CPU has no peak in the table"


# ---- routers ----


def moved(found: dict[str, Any], case: str, part: str) -> torch.Tensor:
    """How far each weight moved from where it was."""
    return torch.tensor(
        [
            after - before
            for name in found["before"][part]
            for after, before in zip(
                found[case][part][name], found["before"][part][name], strict=True
            )
        ]
    )


def both(one: dict[str, Any], two: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["routers"], two[0]["routers"]]


def test_a_frozen_router_keeps_every_bit_and_nothing_else_does(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for found in both(one, two):
        assert found["frozen"]["mlp.gate.weight"] == found["before"]["mlp.gate.weight"]
        assert found["usual"]["mlp.gate.weight"] != found["before"]["mlp.gate.weight"]
        apart(moved(found, "frozen", "q_norm").abs().min().item(), 1e-5)


def test_a_router_learns_at_its_own_rate(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """AdamW's first step is the learning rate times the gradient's sign."""
    for found in both(one, two):
        usual = moved(found, "usual", "mlp.gate.weight")
        scaled = moved(found, "scaled", "mlp.gate.weight")
        close(usual.abs().median(), 1e-3, rel=0.02, name="usual")
        close(scaled.abs().median(), 1e-4, rel=0.02, name="scaled")
        assert found["scaled"]["q_norm"] == found["usual"]["q_norm"]


def test_a_training_with_frozen_routers_resumes(one: dict[str, Any]) -> None:
    found = one["resumed"]
    assert found["step"] == 3
    assert found["resumed"] == found["unbroken"]
    assert len(found["resumed"]["loss"]) == 2


# ---- fields beside the knobs, and what is not finite ----


def test_overlapped_gradient_reduction_changes_nothing(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for key in ("loss", "grad_norm"):
        close(two[0]["overlapped"][key], one["five steps"][key], rel=1e-5, name=key)


def test_what_is_not_finite_names_step_rank_responses_and_checkpoint(
    two: list[dict[str, Any]],
) -> None:
    for ranks in two:
        message = ranks["not finite"]
        assert message.startswith(
            "step 1: loss is nan, on rank 1, learning from the responses prompt-1"
        )
        assert "prompt-0/0" not in message, "the first data rank's responses are innocent"
        assert "the last good checkpoint is the initial model" in message
    assert two[0]["not finite"] == two[1]["not finite"]


# ---- the student's entropy ----


def test_the_students_entropy_is_the_mean_over_loss_tokens_of_that_of_dense_logits(
    one: dict[str, Any],
) -> None:
    results = one["entropy"]
    dense = results["dense"]
    expected = sum(each["loss tokens"] for each in dense) / sum(
        each["num loss tokens"] for each in dense
    )
    reported = results["entropy True"][0]["student_entropy"]
    close(reported, expected, rel=1e-5)
    over_all_tokens = sum(each["all"] for each in dense) / len(dense)
    apart(abs(reported / over_all_tokens - 1), 1e-4)


def test_asking_for_the_entropy_changes_nothing_else(one: dict[str, Any]) -> None:
    results = one["entropy"]
    for with_it, without in zip(results["entropy True"], results["entropy False"], strict=True):
        assert "student_entropy" not in without
        for name in ("loss", "grad_norm", "advantage", "reverse_kl"):
            assert with_it[name] == without[name], name


# ---- what tests on a GPU run too (test_on_gpu.py) ----


def test_the_bodies_shared_with_tests_on_a_gpu_are_right_here(one: dict[str, Any]) -> None:
    within(one["parity"]["largest"], 1e-5)
    apart(one["parity"]["control"], 0.1)
    first, second = one["stage"]
    assert first["step"] == 1
    assert second["num_tokens"] == 4 * (32 - 4)
    assert {"peak_memory_gib", "tokens_per_s", "model_tflops_per_s"} <= second.keys()
