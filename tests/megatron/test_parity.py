"""The Megatron student gives the logits, log-probabilities and gradients of Hugging Face
transformers, for every layout, on packed sequences.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.limits import apart, close, within
from tests.megatron.launch import run_ranks
from tests.megatron.parity_cases import LIMIT, Case, difference, forward_of, load_model
from tests.models import write_qwen3_moe

LAYOUTS = [
    {"ranks": 2, "tensor": tensor, "expert": expert}
    for tensor, expert in ((1, 1), (2, 1), (1, 2), (2, 2))
]


def _gradients(model: Any, case: Case) -> dict[str, Tensor]:
    """Gradient of the weighted sum of log-probabilities on one rank, by Megatron name."""
    from lopd.megatron.weights.transfer import local_parameters

    (forward_of(model, case, labels=case.labels)[0] * case.weight).sum().backward()
    return {
        name: parameter.grad
        for name, parameter in local_parameters(model, case.arch).items()
        if parameter.grad is not None
    }


def _gradient_difference(gradients: dict[str, Tensor], case: Case) -> float:
    """Worst |difference| over all tensors, relative to the largest entry of the tensor;
    transformers keeps experts fused.
    """
    from lopd.megatron.weights.hf_mapping import weights

    ours: dict[str, Tensor] = {}
    for weight in weights(case.arch):
        if weight.megatron in gradients:
            ours.update(zip(weight.hf, weight.split(gradients[weight.megatron]), strict=True))
    worst = 0.0
    for name, gradient in case.gradients.items():
        stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        if name.endswith("experts.gate_up_proj"):
            mine = torch.stack(
                [
                    torch.cat(
                        [ours[f"{stem}{e}.gate_proj.weight"], ours[f"{stem}{e}.up_proj.weight"]]
                    )
                    for e in range(case.arch.num_experts)
                ]
            )
        elif name.endswith("experts.down_proj"):
            mine = torch.stack(
                [ours[f"{stem}{e}.down_proj.weight"] for e in range(case.arch.num_experts)]
            )
        else:
            mine = ours[name]
        worst = max(worst, ((mine - gradient).abs().max() / gradient.abs().max()).item())
    return worst


def _body(moe: str, unnormalised: str, dense: str) -> dict[str, Any]:
    """All measurements on two ranks; the tests below read them."""
    from lopd.megatron.ranks import parallel

    case = Case(Path(moe))
    result: dict[str, Any] = {
        "layouts": [difference(load_model(case, layout), case) for layout in LAYOUTS]
    }
    result["expert_tensor"] = difference(load_model(case, {"ranks": 2, "expert_tensor": 2}), case)
    both = LAYOUTS[3]
    result["controls"] = {
        "rope_theta": difference(
            load_model(case, both, dataclasses.replace(case.arch, rope_theta=20000.0)), case
        ),
        "norm_topk_prob": difference(
            load_model(case, both, dataclasses.replace(case.arch, norm_topk_prob=False)), case
        ),
        "norm_eps": difference(
            load_model(case, both, dataclasses.replace(case.arch, norm_eps=1e-2)), case
        ),
        "one_sequence": difference(load_model(case, both), case, bounds=case.bounds[[0, -1]]),
    }
    result["others"] = {
        "norm_topk_prob_false": difference(
            load_model(other := Case(Path(unnormalised)), both), other
        ),
        "dense_tied": difference(
            load_model(other := Case(Path(dense)), {"ranks": 2, "tensor": 2}), other
        ),
    }
    alone = LAYOUTS[0]
    plain = _gradients(load_model(case, alone), case)
    result["gradient"] = _gradient_difference(plain, case)
    result["recompute"] = {}
    for recompute in ("selective", "full"):
        again = _gradients(load_model(case, alone, recompute=recompute), case)
        result["recompute"][recompute] = max(
            (again[name] - plain[name]).abs().max().item() for name in plain
        )
    router = "decoder.layers.0.mlp.router.weight"
    weak, strong = (
        _gradients(load_model(case, alone, moe_aux_loss=coefficient), case)[router] - plain[router]
        for coefficient in (0.01, 0.02)
    )
    result["aux_loss"] = {
        "size": weak.abs().max().item(),
        "ratio": (strong.norm() / weak.norm()).item(),
    }
    result["bfloat16"] = {
        "dtype": str((output := forward_of(load_model(case, both, dtype="bfloat16"), case)).dtype),
        "finite": bool(output.isfinite().all()),
    }
    parallel.shutdown()
    return result


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("parity")
    write_qwen3_moe(root / "moe")
    write_qwen3_moe(root / "unnormalised", norm_topk_prob=False)
    torch.manual_seed(0)
    dense = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(dense).save_pretrained(root / "dense")
    return run_ranks(
        _body,
        2,
        moe=str(root / "moe"),
        unnormalised=str(root / "unnormalised"),
        dense=str(root / "dense"),
    )


def _worst(difference: dict[str, float]) -> float:
    return max(difference.values())


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=["TP1EP1", "TP2EP1", "TP1EP2", "TP2EP2"])
def test_layout_gives_the_logits_of_transformers(
    measured: list[dict[str, Any]], index: int
) -> None:
    within(max(_worst(rank["layouts"][index]) for rank in measured), LIMIT)


def test_tensor_parallel_experts_give_the_logits_of_transformers(
    measured: list[dict[str, Any]],
) -> None:
    """Uneven token counts are gathered over gloo here, which one of the patches makes possible."""
    within(max(_worst(rank["expert_tensor"]) for rank in measured), LIMIT)


@pytest.mark.parametrize("control", ["rope_theta", "norm_topk_prob", "norm_eps", "one_sequence"])
def test_a_wrong_model_is_noticed(measured: list[dict[str, Any]], control: str) -> None:
    apart(max(_worst(rank["controls"][control]) for rank in measured), 100 * LIMIT, control)


@pytest.mark.parametrize("other", ["norm_topk_prob_false", "dense_tied"])
def test_other_architectures_give_the_logits_of_transformers(
    measured: list[dict[str, Any]], other: str
) -> None:
    within(max(_worst(rank["others"][other]) for rank in measured), LIMIT, other)


def test_gradients_are_those_of_transformers(measured: list[dict[str, Any]]) -> None:
    within(measured[0]["gradient"], 1e-5)  # relative; 1.4e-6 seen


def test_recomputed_activations_give_the_same_gradients(measured: list[dict[str, Any]]) -> None:
    within(max(measured[0]["recompute"].values()), 1e-6)


def test_load_balancing_loss_reaches_the_router_in_proportion_to_its_coefficient(
    measured: list[dict[str, Any]],
) -> None:
    apart(measured[0]["aux_loss"]["size"], 1e-6)
    close(measured[0]["aux_loss"]["ratio"], 2.0, rel=1e-2)


def test_bfloat16_gives_finite_float32_logits(measured: list[dict[str, Any]]) -> None:
    assert measured[0]["bfloat16"] == {"dtype": "torch.float32", "finite": True}
