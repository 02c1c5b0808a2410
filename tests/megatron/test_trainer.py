"""The trainer: the same steps in every layout, those of a plain Hugging Face loop, one forward and
one backward, nothing updated on nonsense.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lopd.batching import plan_step
from lopd.config import OptimizerSection
from lopd.megatron.training.optimizer import learning_rate
from tests.limits import apart, close, within
from tests.megatron.launch import run_ranks
from tests.megatron.trainer_cases import (
    EPS,
    MAX_TOKENS,
    NUM_STEPS,
    PEAK_LR,
    one_rank,
    samples_of,
    two_ranks,
)
from tests.models import write_qwen3_dense, write_qwen3_moe

LAYOUTS = [
    "data",
    "data, plain optimizer",
    "tensor and expert",
    "tensor and expert, plain optimizer",
    "tensor",
    "expert",
    "expert tensor",
    "pipeline",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_moe(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def every_expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token goes to all four experts: rounding has no choice to turn."""
    return write_qwen3_moe(tmp_path_factory.mktemp("every_expert"), num_experts_per_tok=4)


@pytest.fixture(scope="module")
def one(model: Path, dense: Path, every_expert: Path) -> dict[str, Any]:
    models = {"model": model, "dense": dense, "every_expert": every_expert}
    folders = {name: str(folder) for name, folder in models.items()}
    result: dict[str, Any] = run_ranks(one_rank, 1, **folders)[0]
    return result


@pytest.fixture(scope="module")
def two(model: Path, dense: Path) -> list[dict[str, Any]]:
    return run_ranks(two_ranks, 2, model=str(model), dense=str(dense))


def difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Largest relative difference of loss and gradient norm over the steps."""
    pairs = [
        pair for key in ("loss", "grad_norm") for pair in zip(left[key], right[key], strict=True)
    ]
    return max(abs(a - b) / abs(b) for a, b in pairs)


# ---- layouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps_are_the_same_in_every_layout(
    layout: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    within(difference(two[0][layout], one["lightning"]), 1e-5)
    assert len(two[0][layout]["loss"]) == NUM_STEPS


@pytest.mark.parametrize("layout", ["data", "tensor", "pipeline"])
def test_dense_models_with_tied_embeddings_too(
    layout: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    within(difference(two[0][f"dense: {layout}"], one["dense"]), 1e-5)


def test_a_data_rank_with_nothing_to_learn_from_changes_nothing(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    within(difference(two[1]["lone"], one["lone"]), 1e-5)
    assert two[1]["lone"]["tokens"] == [len(samples_of(0)[0])], "padding is not counted"


def test_all_ranks_report_the_same_numbers(two: list[dict[str, Any]]) -> None:
    for layout in LAYOUTS:
        assert two[0][layout] == two[1][layout]


def test_norms_without_the_tag_of_sequence_parallelism_are_noticed(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    apart(difference(two[0]["untagged norms"], one["lightning"]), 1e-4)


@pytest.mark.parametrize("layout", ["tensor and expert", "pipeline"])
def test_load_balancing_loss_weighs_the_same_in_every_layout(
    layout: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    within(difference(two[0][f"balanced: {layout}"], one["balanced"]), 1e-5)
    apart(difference(one["balanced"], one["unbalanced"]), 1e-4, "the load-balancing loss's effect")


def test_megatrons_own_scale_of_the_load_balancing_loss_depends_on_the_layout(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    apart(difference(two[0]["balanced, unscaled"], one["balanced"]), 1e-4)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(recompute: str, one: dict[str, Any]) -> None:
    within(difference(one[recompute], one["lightning"]), 1e-5)


@pytest.mark.parametrize("distributed", [True, False])
def test_bfloat16_stays_close_to_float32(distributed: bool, one: dict[str, Any]) -> None:
    """Of a model that uses every expert: a router that chooses another one after rounding makes
    differences of order 1 in single tokens."""
    found = difference(one[f"bfloat16 {distributed}"], one["every expert"])
    within(found, 0.05)  # 8.5e-3 seen
    apart(found, 1e-5, "another dtype's effect")


# ---- against Hugging Face ----


def hugging_face_steps(folder: Path, *, spare_norms: bool) -> dict[str, list[float]]:
    """The same supervised steps by transformers and torch.optim.AdamW, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [
        parameter for parameter in model.parameters() if parameter.dim() > 1 or not spare_norms
    ]
    spared = [parameter for parameter in model.parameters() if parameter.dim() == 1 and spare_norms]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=EPS)
    losses = []
    norms = []
    # There are two steps of warm-up, then a cosine over three.
    for step, share in enumerate((0.5, 1.0, 1.0, 0.75, 0.25)):
        total = torch.zeros(())
        count = 0
        for sample in samples_of(step):
            token_ids = torch.as_tensor(sample.token_ids, dtype=torch.int64)
            carries_loss = torch.as_tensor(sample.loss_mask[1:])
            logits = model(token_ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(
                logits[carries_loss], token_ids[1:][carries_loss], reduction="sum"
            )
            count += int(carries_loss.sum())
        loss = total / count
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"loss": losses, "grad_norm": norms}


def test_five_steps_are_those_of_a_hugging_face_loop(one: dict[str, Any], model: Path) -> None:
    reference = hugging_face_steps(model, spare_norms=True)
    within(difference(one["supervised"], reference), 1e-4)
    assert max(reference["grad_norm"]) > 1.0, "the clip is not tested"
    assert one["supervised"]["lr"] == pytest.approx(
        [PEAK_LR * share for share in (0.5, 1.0, 1.0, 0.75, 0.25)]
    )


def test_weight_decay_on_norms_would_be_noticed(one: dict[str, Any], model: Path) -> None:
    apart(difference(one["supervised"], hugging_face_steps(model, spare_norms=False)), 1e-3)


def test_logprobs_of_every_layout_are_those_of_hugging_face(
    one: dict[str, Any], two: list[dict[str, Any]], model: Path
) -> None:
    """Of the first microbatch, which all layouts without data parallelism share; on every rank of a
    pipeline.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    members = plan_step([len(sample) for sample in samples_of(0)], 1, MAX_TOKENS, 2)[0][0]
    expected = []
    known = []
    for sample in (samples_of(0)[index] for index in members):
        token_ids = torch.as_tensor(sample.token_ids, dtype=torch.int64)
        with torch.no_grad():
            logprobs = reference(token_ids[None]).logits[0].log_softmax(-1)
        expected += [*logprobs[:-1].gather(1, token_ids[1:, None])[:, 0].tolist(), 0.0]
        # The last position of a sequence predicts nothing.
        known += [True] * (len(sample) - 1) + [False]
    expected = torch.tensor(expected)
    mask = torch.tensor(known)
    for values in (
        one["logprobs"],
        *(
            ranks[f"logprobs: {layout}"]
            for ranks in two
            for layout in ("tensor and expert", "pipeline")
        ),
    ):
        found = torch.tensor(values)[: len(mask)]
        close(found[mask], expected[mask], abs=2e-5)  # 2.9e-6 seen
        assert (found.roll(1) - expected)[mask].abs().max() > 1.0, (
            "a shift by one would not be noticed"
        )


# ---- the step ----


def test_one_forward_and_one_backward_per_microbatch(one: dict[str, Any]) -> None:
    passes = one["passes"]
    assert passes["microbatches"] > 1
    assert passes["forward"] == passes["backward"] == passes["microbatches"]
    assert passes["forward with scoring"] == 2 * passes["microbatches"], (
        "the count would not notice a second forward"
    )


def test_a_loss_that_is_not_finite_stops_the_training_before_the_update(
    two: list[dict[str, Any]],
) -> None:
    for ranks in two:
        found = ranks["not finite"]
        assert found["same weights"]
        assert found["step"] == 0
        assert found["loss"].startswith(
            "step 1: loss is nan, on rank 1; the weights were not updated"
        )
        assert "the last good checkpoint is the initial model" in found["loss"]
        assert found["gradient"].startswith("step 1: gradient norm is nan, on rank 0, 1")


def test_unequal_numbers_of_microbatches_are_refused_instead_of_waiting(
    two: list[dict[str, Any]],
) -> None:
    assert "data ranks have between 1 and 2 microbatches, and rank 1 has 2" in two[1]["unequal"]


# ---- the schedule ----


def rates(num_steps: int, **section: Any) -> list[float]:
    return [
        learning_rate(OptimizerSection(lr=1.0, **section), step, num_steps)
        for step in range(num_steps)
    ]


def test_warmup_rises_to_the_peak_and_never_wastes_a_step() -> None:
    assert rates(10, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    assert rates(4, warmup=0.1) == [1.0] * 4


def test_linear_and_cosine_fall_towards_the_least_rate() -> None:
    assert rates(4, schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates(4, schedule="cosine") == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert learning_rate(
        OptimizerSection(lr=1.0, schedule="cosine", min_lr=0.1), 7, 4
    ) == pytest.approx(0.1)


def test_it_leaves_the_device_and_comes_back_to_the_bit(two: list[dict[str, Any]]) -> None:
    """Two ranks with split experts, bfloat16, the distributed optimizer; more cases and the
    controls in test_offload.py.
    """
    for rank in two:
        result = rank["leaves"]
        assert result["left"] == result["stayed"]
        before, without_optimizer, nothing, after = result["memory"][:4]
        assert before["weights"] >= result["resident"] > 0
        assert min(before.values()) > 0
        assert without_optimizer == {"gradients": 0, "optimizer": 0, "weights": before["weights"]}
        assert nothing == {"gradients": 0, "optimizer": 0, "weights": 0}
        assert after == before
