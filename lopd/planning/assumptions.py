"""What a plan assumes because it cannot know it. Each can be set: ``lopd plan CONFIG --assume
dense_utilisation=0.3``. docs/plan.md has the sources.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field

from lopd.errors import ConfigError

_GIB = 2**30


def _say(default: float, meaning: str, source: str = "assumed") -> float:
    """source: fitted to the paper's published hours, published by others, measured, read in
    sources, of a data sheet, or assumed.
    """
    value: float = field(default=default, metadata={"meaning": meaning, "source": source})
    return value


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Rates per GPU, shares and bytes; docs/plan.md says of each whether it is measured, published,
    or assumed.
    """

    # how fast
    dense_utilisation: float = _say(
        0.22,
        "training of a dense model: operations done, repeated ones included, over the GPU's bfloat16 peak",
        "fitted",
    )
    moe_utilisation: float = _say(
        0.32,
        "the same with experts, without the GPUs' exchanges: NVIDIA's 277 TFLOP/s per H100 for Qwen3-30B-A3B, less its exchange",
        "published",
    )
    link_efficiency: float = _say(
        0.7, "exchanges between the GPUs of a node: bytes over what the link could carry"
    )
    expert_slowdown: float = _say(
        1.15, "experts' products and exchanges wait for the busiest rank: its tokens over the mean"
    )
    prefill_utilisation: float = _say(
        0.35, "scoring by a dense teacher: operations of the forward pass over the peak", "fitted"
    )
    moe_prefill_utilisation: float = _say(0.15, "the same with experts")
    decode_efficiency: float = _say(
        0.31,
        "sampling: tokens over those of the memory roofline (weights and KV cache read once a step), tails included",
        "fitted",
    )
    extra_forward_passes: float = _say(
        0,
        "forward passes of a training step besides the one that is differentiated (the paper's code: 2)",
        "read",
    )
    deterministic_slowdown: float = _say(
        2.0,
        "sampling with sglang.deterministic on a GPU takes so many times longer (1.5 to 2.5 by what it switches off)",
    )
    cpu_adam_rate: float = _say(
        2.7e8,
        "weights per second that one CPU thread updates, where the optimizer is offloaded",
        "measured",
    )
    node_cores: float = _say(
        96,
        "CPU cores of a node, shared by the ranks where threads_per_rank is absent (two sockets of 48)",
    )
    host_bandwidth: float = _say(
        4e11, "bytes per second of a node's memory: an update reads and writes 28 a weight"
    )
    host_link: float = _say(
        5e10,
        "bytes per second between a GPU and the host's memory (PCIe 5 with 16 lanes: 63e9)",
        "data sheet",
    )
    sync_rate: float = _say(2e9, "bytes of weights per second that a sync moves and verifies")
    startup_s: float = _say(
        180, "seconds before a stage computes: servers, process groups, loading"
    )
    # how much text
    prompt_len: float = _say(200, "mean tokens of a prompt, chat template included")
    demonstration_share: float = _say(
        0.6, "mean length of a demonstration over demonstrate.max_new_tokens"
    )
    rollout_share: float = _say(
        0.9, "mean length of a rollout over rollout.max_new_tokens: most are cut at 4096 tokens"
    )
    evaluation_share: float = _say(0.45, "mean length of an answer over evaluate.max_new_tokens")
    file_prompts: float = _say(
        20_000, "prompts of a file that is not there, of unknown format, and without num_prompts"
    )
    # memory of a GPU
    context_bytes: float = _say(1.0 * _GIB, "CUDA context, cuBLAS workspaces, loaded kernels")
    nccl_bytes: float = _say(
        1.5 * _GIB,
        "NCCL's buffers of a trainer with more than one rank (about 0.25 GiB a communicator)",
    )
    context_nccl_bytes: float = _say(
        0.5 * _GIB,
        "NCCL's buffers of context ranks, which exchange keys and values besides: two communicators more",
    )
    fragmentation: float = _say(0.06, "share of the allocated memory that the allocator cannot use")
    expert_imbalance: float = _say(
        1.5,
        "tokens of the busiest expert rank over the mean: its activations are as many times larger",
    )
    served_runtime_bytes: float = _say(
        4.0 * _GIB, "a server's CUDA context, CUDA graphs, communicators and activations"
    )
    logits_chunk: float = _say(
        2048,
        "tokens whose logits a server holds at once while it scores (SGLang 0.5.17's own limit)",
        "read",
    )
    # memory of the machine, disk
    served_host_bytes: float = _say(8.0 * _GIB, "host memory of a server process")
    rank_host_bytes: float = _say(
        6.0 * _GIB,
        "host memory of a trainer's rank besides the offloaded optimizer and the samples",
    )
    bytes_per_token: float = _say(
        6.64, "cache on disk per response token, measured on a cache of this project", "measured"
    )
    sample_bytes_per_token: float = _say(
        13,
        "host memory per token of the samples that a trainer's rank holds: ids, mask, two log-probabilities",
        "measured",
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            above_zero = each.name not in (
                "extra_forward_passes",
                "startup_s",
                "fragmentation",
                "context_bytes",
                "nccl_bytes",
                "context_nccl_bytes",
            )
            is_share = (
                each.name.endswith(("_utilisation", "_share", "_efficiency"))
                or each.name == "fragmentation"
            )
            if not (value > 0 or (value == 0 and not above_zero)) or (is_share and value > 1):
                limit = ("above 0" if above_zero else "0 or more") + (
                    ", at most 1" if is_share else ""
                )
                raise ConfigError(
                    f"{each.name} = {value:g}",
                    where="--assume",
                    limit=limit,
                    remedy=f"it is: {each.metadata['meaning']}",
                )


def read_assumptions(settings: Sequence[str]) -> Assumptions:
    """From ``name=value`` words. ConfigError: an unknown name, with the nearest; no number; out of
    bounds.
    """
    known = [each.name for each in dataclasses.fields(Assumptions)]
    found: dict[str, float] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if name not in known or not equals:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown assumption {setting!r:.80}",
                where="--assume",
                limit="name=value",
                remedy=f"the nearest is {nearest}; all: docs/plan.md",
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} = {text!r:.60}", where="--assume", limit="a number")
        found[name] = float(value)
    return Assumptions(**found)


def meanings() -> dict[str, str]:
    """Name -> one sentence."""
    return {each.name: each.metadata["meaning"] for each in dataclasses.fields(Assumptions)}


def sources() -> dict[str, str]:
    """Name -> where its value comes from, in a word or two; docs/plan.md says more."""
    return {each.name: each.metadata["source"] for each in dataclasses.fields(Assumptions)}
