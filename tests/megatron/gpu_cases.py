"""Bodies that the tests on a GPU share with those on a CPU: nothing here knows where it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from lopd.batching import build_microbatch
from lopd.config import TrainSection
from lopd.megatron.ranks import parallel
from lopd.megatron.training.trainer import Trainer
from lopd.megatron.weights.architecture import Architecture
from lopd.objective import Lightning
from lopd.records import Microbatch, Sample
from tests.megatron.parity_cases import LENGTHS, Case, forward_of, load_model

# Qwen3-30B-A3B: one of its 48 layers has 640 million weights.
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "vocab_size": 151_936,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
BYTES_PER_WEIGHT = 18  # bfloat16 weight, float32 gradient, copy and two moments
RESERVE = 30e9  # activations, blocks of logits, the allocator


def parity(folder: str, dtype: str) -> dict[str, float]:
    """|d logprob| of every label between this model and transformers in float32 on a CPU: mean,
    largest; and of labels moved by one, as a control.
    """
    case = Case(Path(folder))
    model = load_model(case, {"ranks": 1}, dtype=dtype)
    device = parallel.device()
    for name in ("tokens", "labels", "bounds"):
        setattr(case, name, getattr(case, name).to(device))
    with torch.no_grad():
        logprobs, entropy = forward_of(model, case, labels=case.labels, entropy=True)
    inner = torch.ones(sum(LENGTHS), dtype=torch.bool)
    difference = (logprobs.cpu() - case.logprobs).abs()[inner]
    shifted = (logprobs.cpu().roll(1) - case.logprobs).abs()
    return {
        "device": float(device.type == "cuda"),
        "mean": difference.mean().item(),
        "largest": difference.max().item(),
        "entropy": (entropy.cpu() - case.entropy).abs().max().item(),
        "control": shifted.mean().item(),
    }


def write_stage(folder: Path, num_layers: int, **shape: int) -> Path:
    """config.json of a Qwen3-30B-A3B with so many layers; weights are random, so there are none.

    shape: fields of it that shall be others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**QWEN3_30B_A3B, "num_hidden_layers": num_layers, **shape}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of_layer(arch: Architecture) -> float:
    heads = 2 * arch.num_heads + 2 * arch.num_kv_heads
    projections = arch.hidden_size * arch.head_dim * heads
    experts = arch.num_experts * 3 * arch.hidden_size * arch.moe_ffn_hidden_size
    return float(projections + experts + arch.hidden_size * arch.num_experts)


def layers_that_fit(arch: Architecture, free_bytes: float, recompute: str) -> int:
    """How many of arch's layers can be trained in so much memory of a GPU, embeddings included.

    At most as many as arch has.
    """
    room = free_bytes - RESERVE * (1 if recompute == "full" else 2)
    room -= 2 * arch.vocab_size * arch.hidden_size * BYTES_PER_WEIGHT
    return min(int(room / (weights_of_layer(arch) * BYTES_PER_WEIGHT)), arch.num_layers)


def packed(vocab_size: int, num_tokens: int, sequence_len: int, seed: int) -> Microbatch:
    """num_tokens random tokens in sequences of sequence_len, an eighth of each a prompt."""
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(num_tokens // sequence_len):
        tokens = generator.integers(0, vocab_size, sequence_len).astype(np.int32)
        teacher = -3 * generator.random(sequence_len, dtype=np.float32)
        samples.append(
            Sample(tokens, np.arange(sequence_len) >= sequence_len // 8, teacher, teacher)
        )
    return build_microbatch(samples)


def settings_of_stage(*, num_tokens: int, dtype: str, recompute: str) -> TrainSection:
    return TrainSection.model_validate(
        {
            "num_steps": 100,
            "dtype": dtype,
            "recompute": recompute,
            "max_tokens_per_microbatch": num_tokens,
            "optimizer": {"lr": 1e-6},
        }
    )


def stage(
    folder: str, num_tokens: int, sequence_len: int, dtype: str, recompute: str, num_steps: int
) -> list[dict[str, float]]:
    """Figures of each of num_steps training steps of one microbatch, on one rank, from random
    weights.
    """
    settings = settings_of_stage(num_tokens=num_tokens, dtype=dtype, recompute=recompute)
    parallel.initialize(settings.parallel, seed=1, timeout_s=600)
    trainer = Trainer(
        settings,
        model_dir=Path(folder),
        init="random",
        init_std=0.02,
        seed=1,
        objective=Lightning(),
        checkpoint_dir=None,
    )
    vocab_size = trainer.architecture.vocab_size
    return [
        trainer.train_step([packed(vocab_size, num_tokens, sequence_len, seed)]).as_dict()
        for seed in range(num_steps)
    ]


def planned_bytes(
    arch: Architecture,
    settings: TrainSection,
    *,
    engine: bool | None = None,
) -> float:
    """What lopd plan says of the fullest GPU, without what no allocator counts: the context.

    engine: Transformer Engine's layers, or the local ones; absent: what is there decides.
    """
    from lopd.planning.assumptions import Assumptions
    from lopd.planning.memory import trainer_memory
    from lopd.planning.parameters import parameters_by_formula
    from megatron_patches.layer_spec import has_transformer_engine

    engine = has_transformer_engine() if engine is None else engine
    parameters = parameters_by_formula(arch, settings.parallel)
    memory = trainer_memory(arch, settings, parameters, Assumptions(), engine=engine)
    return sum(
        size for term, size in memory.gpu.items() if term not in ("context, NCCL", "fragmentation")
    )
