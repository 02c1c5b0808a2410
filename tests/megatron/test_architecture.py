"""config.json becomes an architecture or a refusal by name; a layout that does not divide is
refused with its numbers and a remedy.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lopd.config import ParallelSection, ScoreSection
from lopd.errors import ConfigError, LopdError
from lopd.megatron.weights.architecture import (
    Architecture,
    layout_problems,
    read_architecture,
    scorer_problems,
    validate_layout,
)
from lopd.megatron.weights.families.fields import Yarn

# As published: https://huggingface.co/Qwen/Qwen3-30B-A3B-Base, Qwen3-4B-Base (shortened to what is
# read); written before transformers 5
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

# Qwen/Qwen2.5-7B, meta-llama/Llama-3.2-1B
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_ROPE: dict[str, Any] = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}


def _read(folder: Path, table: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(table))
    return read_architecture(folder)


def test_qwen3_moe(tmp_path: Path) -> None:
    arch = _read(tmp_path, QWEN3_MOE)
    assert (arch.num_layers, arch.num_heads, arch.num_kv_heads, arch.head_dim) == (48, 32, 4, 128)
    assert (
        arch.num_experts,
        arch.experts_per_token,
        arch.moe_ffn_hidden_size,
        arch.norm_topk_prob,
    ) == (128, 8, 768, True)
    assert (arch.rope_theta, arch.tied_embeddings, arch.qk_norm) == (1e6, False, True)


def test_qwen3_dense(tmp_path: Path) -> None:
    arch = _read(tmp_path, QWEN3)
    assert (arch.num_experts, arch.ffn_hidden_size, arch.tied_embeddings, arch.rope_theta) == (
        0,
        9728,
        True,
        1e6,
    )


def test_qwen2(tmp_path: Path) -> None:
    arch = _read(tmp_path, QWEN2)
    assert (arch.qkv_bias, arch.qk_norm, arch.head_dim, arch.tied_embeddings, arch.rope_factor) == (
        True,
        False,
        128,
        False,
        1.0,
    )


def test_llama(tmp_path: Path) -> None:
    arch = _read(tmp_path, LLAMA)
    assert (arch.qkv_bias, arch.qk_norm, arch.head_dim, arch.tied_embeddings) == (
        False,
        False,
        64,
        True,
    )
    assert (arch.rope_theta, arch.rope_factor) == (5e5, 32.0)
    newer = {
        key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")
    }
    assert (
        _read(tmp_path, newer | {"rope_parameters": {**LLAMA_ROPE, "rope_theta": 500000.0}}) == arch
    )


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (QWEN2, {"attention_bias": False}, "attention_bias"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window"),
        (
            QWEN2,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention'",
        ),
        (QWEN2, {"rope_scaling": YARN | {"factor": 0.5}}, "factor = 0.5 of the rope scaling"),
        (
            QWEN2,
            {"rope_scaling": YARN | {"attention_factor": 1.0}},
            "attention_factor = 1.0 of the rope scaling",
        ),
        (
            QWEN2,
            {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            "mscale = 1.0 is not supported",
        ),
        (QWEN2, {"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast, beta_slow"),
        (LLAMA, {"attention_bias": True}, "attention_bias"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": LLAMA_ROPE | {"low_freq_factor": 2.0}}, "low_freq_factor"),
        (
            LLAMA,
            {"rope_scaling": LLAMA_ROPE | {"original_max_position_embeddings": 4096}},
            "original_max_position_embeddings",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA_ROPE | {"factor": None}},
            "factor = None of the rope scaling is not supported",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope scaling of type 'dynamic'",
        ),
    ],
)
def test_what_qwen2_and_llama_cannot_have_here_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(LopdError) as caught:
        _read(tmp_path, base | change)
    assert named in str(caught.value)


def test_names_of_transformers_5(tmp_path: Path) -> None:
    newer = {
        key: value
        for key, value in QWEN3_MOE.items()
        if key not in ("num_experts", "rope_theta", "rope_scaling")
    }
    newer |= {
        "num_local_experts": 128,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    }
    assert _read(tmp_path, newer) == _read(tmp_path, QWEN3_MOE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings is missing",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}},
            "rope scaling of type 'linear'",
        ),
        ({"rope_theta": None}, "rope_theta"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"hidden_size": "2048"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(LopdError) as caught:
        _read(tmp_path, QWEN3_MOE | change)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": ["qwen3"]}'])
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(LopdError, match=r"config\.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        {"ranks": 8, "tensor": 4, "expert": 8},  # the paper's
        {"ranks": 8, "tensor": 2, "pipeline": 2, "expert": 4},
        {"ranks": 8, "expert": 4, "expert_tensor": 2},
        {"ranks": 1},
    ],
    ids=str,
)
def test_layouts_that_divide(tmp_path: Path, layout: dict[str, int]) -> None:
    validate_layout(_read(tmp_path, QWEN3_MOE), ParallelSection(**layout))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ranks": 8, "tensor": 8}, "key-value heads (4) does not divide by tensor (8)"),
        (
            {"ranks": 6, "tensor": 4},
            "ranks = 6 is not a multiple of tensor * pipeline * context = 4",
        ),
        (
            {"ranks": 2, "expert": 4},
            "ranks = 2 is not a multiple of expert * expert_tensor * pipeline = 4",
        ),
        ({"ranks": 3, "expert": 3}, "number of experts (128) does not divide by expert (3)"),
        ({"ranks": 5, "pipeline": 5}, "number of layers (48) does not divide by pipeline (5)"),
        (
            {"ranks": 5, "expert_tensor": 5},
            "hidden size of an expert (768) does not divide by expert_tensor (5)",
        ),
        (
            {"ranks": 6, "context": 4},
            "ranks = 6 is not a multiple of tensor * pipeline * context = 4",
        ),
    ],
    ids=str,
)
def test_layouts_that_do_not_divide_are_refused(
    tmp_path: Path, layout: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_layout(
            _read(tmp_path, QWEN3_MOE), ParallelSection(**layout), where="distill.parallel"
        )
    assert message in str(caught.value)
    assert str(caught.value).startswith("distill.parallel")
    assert caught.value.remedy or caught.value.limit


@pytest.mark.parametrize(("size", "padded"), [(151936, 151936), (151937, 151944), (32, 32), (1, 8)])
def test_vocabulary_is_padded_for_up_to_eight_tensor_ranks(
    tmp_path: Path, size: int, padded: int
) -> None:
    arch = _read(tmp_path, QWEN3_MOE | {"vocab_size": size})
    assert arch.padded_vocab_size == padded
    validate_layout(arch, ParallelSection(ranks=4, tensor=4))


def test_a_vocabulary_that_does_not_divide_though_padded_is_refused(tmp_path: Path) -> None:
    arch = _read(tmp_path, QWEN3_MOE | {"num_key_value_heads": 32})
    problems = [
        str(problem) for problem in layout_problems(arch, ParallelSection(ranks=32, tensor=32))
    ]
    assert problems == []
    problems = [
        str(problem)
        for problem in layout_problems(
            replace(arch, vocab_size=151937), ParallelSection(ranks=32, tensor=32)
        )
    ]
    assert len(problems) == 1
    assert "vocabulary size, padded (151944) does not divide by tensor (32)" in problems[0]


@pytest.mark.parametrize(
    "layout", [{"ranks": 2, "expert": 2}, {"ranks": 2, "expert_tensor": 2}], ids=str
)
def test_a_dense_model_has_no_experts_to_spread(tmp_path: Path, layout: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="no experts"):
        validate_layout(_read(tmp_path, QWEN3), ParallelSection(**layout))


def test_nothing_heavy_is_imported() -> None:
    """`lopd check` validates layouts before torch or megatron are imported."""
    code = (
        "import sys, lopd.megatron.weights.architecture; "
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_yarn_is_read_as_qwen_publishes_it(tmp_path: Path) -> None:
    """Older files say type, newer ones rope_type; the attention factor may be spelled out."""
    arch = _read(tmp_path, QWEN2 | {"rope_scaling": YARN})
    assert arch.yarn == Yarn(
        factor=4.0, original_len=32768, beta_fast=32.0, beta_slow=1.0, truncate=True
    )
    assert arch.rope_factor == 1.0
    newer = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 0.1 * math.log(4) + 1,
    }
    assert _read(tmp_path, QWEN2 | {"rope_scaling": newer}) == arch
    assert _read(tmp_path, QWEN2).yarn is None


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, ""),
        ({"entropy": True}, "score.entropy is set, but SGLang returns no entropies"),
        ({"engine": "megatron", "entropy": True}, ""),
        (
            {"engine": "megatron", "top_k": 8},
            "score.top_k = 8, but this scorer returns no top-K scores",
        ),
        (
            {"engine": "megatron", "forward": {"parallel": {"ranks": 2, "nodes": 2}}},
            "nodes = 2 is too large",
        ),
        (
            {"engine": "megatron", "forward": {"parallel": {"ranks": 8, "tensor": 8}}},
            "number of key-value heads (4) does not divide by tensor (8)",
        ),
        ({"engine": "sglang", "forward": {"parallel": {"ranks": 8, "tensor": 8}}}, ""),
    ],
)
def test_what_a_scoring_engine_cannot_give_is_refused_by_name(
    tmp_path: Path, knobs: dict[str, Any], expected: str
) -> None:
    found = [
        str(problem)
        for problem in scorer_problems(
            ScoreSection.model_validate(knobs), _read(tmp_path, QWEN3_MOE)
        )
    ]
    assert len(found) == bool(expected), found
    assert all(expected in problem for problem in found)
