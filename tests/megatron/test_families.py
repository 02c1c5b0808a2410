"""Families beside Qwen3, and vocabularies that do not divide: the logits of transformers, the same
five steps on two ranks, and a bit-exact way back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.limits import apart, close, within
from tests.megatron.launch import run_ranks
from tests.megatron.parity_cases import LIMIT, Case, difference, load_model
from tests.models import write_qwen3_moe

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "rope_theta": 1e4,
}
ODD_VOCAB = 509  # a prime: padded to 512, the second of two ranks holds the three zero rows
LAYOUTS = {
    "DP2": {"ranks": 2},
    "TP2": {"ranks": 2, "tensor": 2},
    "PP2": {"ranks": 2, "pipeline": 2},
}


def _write(folder: Path, model: Any) -> None:
    """Every number random: biases, which transformers starts at zero, and norms too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 1 + 0.1 * noise)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    _write(
        root / "qwen2",
        Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=512, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **SIZES
            )
        ),
    )
    # Of 8 frequencies, 4 are too fast for the scaling, one is between, and 3 are divided by 32.
    rope = {**LLAMA3, "rope_theta": 5e5}
    _write(
        root / "llama",
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=512,
                tie_word_embeddings=True,
                rms_norm_eps=1e-5,
                rope_parameters=rope,
                **SIZES,
            )
        ),
    )
    write_qwen3_moe(root / "yarn", rope_parameters=YARN)
    write_qwen3_moe(root / "odd_vocabulary", vocab_size=ODD_VOCAB)
    write_qwen3_moe(root / "odd_vocabulary_tied", vocab_size=ODD_VOCAB, tie_word_embeddings=True)
    return {path.name: path for path in root.iterdir()}


def _exported(model: Any, case: Case) -> list[str]:
    """Names of tensors that came back otherwise than they are in the file; on rank 0."""
    from lopd.megatron.weights.transfer import export_hf

    tensors = {
        name: tensor
        for bucket in export_hf(model, case.arch, bucket_bytes=1 << 20)
        for name, tensor in bucket
    }
    if not tensors:
        return []
    expected = load_file(case.folder / "model.safetensors")
    names = tensors.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in tensors
        or name not in expected
        or not torch.equal(tensors[name], expected[name])
    )


def _body(folders: dict[str, str]) -> dict[str, Any]:
    from lopd.megatron.ranks import parallel

    result: dict[str, Any] = {
        "difference": {},
        "changed": {},
        "control": {},
        "steps": _train(folders["odd_vocabulary"], [{}, {"tensor": 2, "expert": 2}]),
    }
    for name, folder in folders.items():
        case = Case(Path(folder))
        for layout, sizes in LAYOUTS.items():
            model = load_model(case, sizes)
            if layout != "PP2":  # whose first rank has no logits
                result["difference"][f"{name} {layout}"] = max(difference(model, case).values())
            result["changed"][f"{name} {layout}"] = _exported(model, case)
    two = LAYOUTS["TP2"]
    qwen2, llama, odd = (Case(Path(folders[name])) for name in ("qwen2", "llama", "odd_vocabulary"))
    model = load_model(qwen2, two)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("linear_qkv.bias"):
                parameter.mul_(1.01)
    result["control"]["biases"] = max(difference(model, qwen2).values())
    model = load_model(llama, two, dataclasses.replace(llama.arch, rope_factor=1.0))
    result["control"]["rope scaling"] = max(difference(model, llama).values())
    yarn = Case(Path(folders["yarn"]))
    model = load_model(yarn, two, dataclasses.replace(yarn.arch, yarn=None))
    result["control"]["yarn"] = max(difference(model, yarn).values())
    model = load_model(
        yarn,
        two,
        dataclasses.replace(yarn.arch, yarn=dataclasses.replace(yarn.arch.yarn, beta_fast=1.5)),
    )
    result["control"]["yarn's bounds"] = max(difference(model, yarn).values())
    model = load_model(odd, two)
    model.eval()
    padded = (
        model.output_layer.weight[ODD_VOCAB - 256 :]
        if parallel.tensor_rank() == 1
        else model.output_layer.weight[:0]
    )
    result["padded rows"] = [int(padded.shape[0]), float(padded.abs().sum())]
    with torch.no_grad():
        padded.fill_(100.0)
    result["padding is ignored"] = {
        key: value for key, value in difference(model, odd).items() if key != "logits"
    }
    model._num_tokens_known = odd.arch.padded_vocab_size
    result["control"]["padding counted"] = difference(model, odd)["logprobs"]
    parallel.shutdown()
    return result


def _train(folder: str, layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Five steps in each layout, and what becomes of the padded rows."""
    from tests.megatron.trainer_cases import settings_of, train, trainer_of

    results = []
    for layout in layouts:
        trainer = trainer_of(
            folder, settings_of(layout, optimizer={"lr": 1e-2, "weight_decay": 0.1})
        )
        entry: dict[str, Any] = train(trainer, vocab_size=ODD_VOCAB)
        exported = {
            name: list(tensor.shape) for bucket in trainer.export() for name, tensor in bucket
        }
        results.append({**entry, "shape": exported.get("lm_head.weight")})
    return results


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path]) -> list[dict[str, Any]]:
    return run_ranks(_body, 2, folders={name: str(path) for name, path in folders.items()})


NAMES = ["qwen2", "llama", "yarn", "odd_vocabulary", "odd_vocabulary_tied"]


@pytest.mark.parametrize("layout", ["DP2", "TP2"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(
    measured: list[dict[str, Any]], name: str, layout: str
) -> None:
    within(max(rank["difference"][f"{name} {layout}"] for rank in measured), LIMIT, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_is_bit_exact(measured: list[dict[str, Any]], name: str, layout: str) -> None:
    assert measured[0]["changed"][f"{name} {layout}"] == []


@pytest.mark.parametrize(
    "control", ["biases", "rope scaling", "yarn", "yarn's bounds", "padding counted"]
)
def test_what_is_wrong_is_noticed(measured: list[dict[str, Any]], control: str) -> None:
    apart(max(rank["control"][control] for rank in measured), 100 * LIMIT, control)


def test_padded_rows_start_at_zero_and_have_no_probability(measured: list[dict[str, Any]]) -> None:
    assert measured[1]["padded rows"] == [3, 0.0]
    for rank in measured:
        within(max(rank["padding is ignored"].values()), LIMIT)


def test_five_steps_with_a_padded_vocabulary_do_not_depend_on_the_layout(
    measured: list[dict[str, Any]],
) -> None:
    data, tensor = measured[0]["steps"]
    for key in ("loss", "grad_norm"):
        close(data[key], tensor[key], rel=1e-5)
    assert data["shape"] == tensor["shape"] == [ODD_VOCAB, 64]
