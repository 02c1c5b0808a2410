"""Configurations for plans: public models by name alone; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lopd.config import Config, load_config
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.families import FAMILIES
from lopd.planning import Assumptions, Plan, make_plan, node_of
from lopd.planning.known_models import KNOWN_MODELS
from lopd.planning.models import planned_models

ROOT = Path(__file__).resolve().parents[2]
PAPER_8B = """
[run]
dir = "run"
[models]
teacher = "Qwen3-32B"
student = "Qwen3-8B-Base"
[task]
name = "register_arithmetic"
[prompts]
sft = { num_prompts = 300_000 }
opd = { num_prompts = 17_398 }
eval = { num_prompts = 60 }
[sglang]
tensor = 2
replicas = 4
deterministic = false
[sft]
max_tokens_per_microbatch = 16384
parallel = { ranks = 8, tensor = 4 }
[distill]
max_tokens_per_microbatch = 16384
parallel = { ranks = 8, tensor = 4 }
sync_every = 0
"""
REFERENCE_30B = """
[run]
dir = "run"
[models]
teacher = "Qwen3-30B-A3B-Thinking-2507"
student = "Qwen3-30B-A3B-Base"
[task]
name = "register_arithmetic"
[prompts]
sft = { num_prompts = 300_000 }
opd = { num_prompts = 17_398 }
eval = { num_prompts = 60 }
[sglang]
tensor = 2
replicas = 4
deterministic = false
[sft]
max_tokens_per_microbatch = 12288
recompute = "full"
parallel = { ranks = 8, tensor = 4, expert = 8 }
megatron.optimizer_cpu_offload = true
megatron.optimizer_offload_fraction = 1.0
megatron.use_precision_aware_optimizer = true
checkpoint_every = 3000
[distill]
max_tokens_per_microbatch = 12288
recompute = "full"
parallel = { ranks = 8, tensor = 4, expert = 8 }
megatron.optimizer_cpu_offload = true
megatron.optimizer_offload_fraction = 1.0
megatron.use_precision_aware_optimizer = true
checkpoint_every = 150
sync_every = 0
"""


def architecture(name: str) -> Architecture:
    table = KNOWN_MODELS[name]
    return Architecture(**FAMILIES[table["model_type"]](table, name))


def config_of(text: str, folder: Path, overrides: Sequence[str] = ()) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    return load_config(path, overrides)


def plan_of(
    text: str,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str = "h100-80gb",
    gpus: int = 8,
    cohost: bool = False,
    **assumed: float,
) -> Plan:
    """By formula: quick."""
    config = config_of(text, folder, overrides)
    given: Mapping[str, Path] = {}
    return make_plan(
        config,
        planned_models(config, given),
        node_of(gpu, gpus),
        Assumptions(**assumed),
        build=False,
        cohost=cohost,
    )
