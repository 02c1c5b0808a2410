"""Memory of a GPU and of the machine, term by term: a trainer's rank, and a server. Bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lopd.config import ForwardSection, SGLangSection, TrainSection
from lopd.megatron.architecture import Architecture
from lopd.planning.activations import WORK_SHARE, layer_activations
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.parameters import StageParameters, parameters_by_formula

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_BLOCK = 256 * 2**20  # lopd.megatron.logprobs.BLOCK_BYTES on CUDA
BLOCKS_AT_ONCE = 2  # a block of float32 logits and its rounded gradient, and what torch makes between


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """gpu: terms of the fullest GPU; host: of a machine. figures: what follows from them (a server's concurrency)."""

    gpu: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


# ---- the trainer ----------------------------------------------------------------------------------------------------------------------------------


def trainer_memory(
    arch: Architecture, settings: TrainSection, stages: list[StageParameters], assumed: Assumptions, *, samples_tokens: float = 0, engine: bool = True
) -> MemoryUse:
    """Of the fullest rank. stages: parameters of a rank by pipeline stage. samples_tokens: of the responses that each rank holds in host memory.

    engine: Transformer Engine's layers (on a GPU); without, the local ones.
    """
    uses = [_stage_memory(arch, settings, stages, index, assumed, engine) for index in range(len(stages))]
    gpu, _ = max(uses, key=lambda use: sum(use[0].values()))
    here = settings.parallel.ranks // settings.parallel.nodes
    host = {
        "optimizer": sum(offloaded for _, offloaded in uses) / settings.parallel.pipeline * here,
        "samples": samples_tokens * assumed.sample_bytes_per_token * here,
        "processes": here * assumed.rank_host_bytes,
    }
    return MemoryUse(gpu, host)


def _stage_memory(
    arch: Architecture, settings: TrainSection, stages: list[StageParameters], index: int, assumed: Assumptions, engine: bool
) -> tuple[dict[str, float], float]:
    """Terms on a GPU of this pipeline stage, and what its optimizer has in host memory."""
    held, parallel, size = stages[index], settings.parallel, SIZES[settings.dtype]
    trained = held.total - (held.routers if settings.optimizer.freeze_router else 0)
    on_gpu, on_host = optimizer_bytes(settings, held)
    gpu = {
        "weights": float(held.total * size),
        "gradients": float(trained * (4 if settings.megatron.get("grad_reduce_in_fp32", True) else size)),
        "optimizer": on_gpu,
        "activations": activation_bytes(arch, settings, index, assumed, engine),
    }
    if index == len(stages) - 1:
        gpu["log-probabilities"] = logprob_bytes(arch, settings)
    gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
    gpu["context, NCCL"] = assumed.context_bytes + (assumed.nccl_bytes if parallel.ranks > 1 else 0)
    return gpu, on_host


def optimizer_bytes(settings: TrainSection, held: StageParameters) -> tuple[float, float]:
    """On the GPU and in host memory, of one rank.

    AdamW's two moments, and of bfloat16 weights a float32 copy; with the distributed optimizer the share of one data rank. What is offloaded
    (Megatron-Core's HybridDeviceOptimizer) has copy, moments and gradient in host memory, in float32; a float32 copy stays on the GPU all the same, unless the
    optimizer is precision-aware.
    """
    parallel, table = settings.parallel, settings.megatron
    dense, experts = held.dense - (held.routers if settings.optimizer.freeze_router else 0), held.experts
    if parallel.distributed_optimizer:
        dense //= parallel.data * parallel.context
        experts //= max(1, parallel.ranks // (parallel.pipeline * parallel.expert * parallel.expert_tensor))
    numbers = dense + experts
    precise = bool(table.get("use_precision_aware_optimizer"))
    copy = 4 if settings.dtype == "bfloat16" else 0
    share = float(table.get("optimizer_offload_fraction", 0.0)) if table.get("optimizer_cpu_offload") else 0.0
    moments = sum(SIZES.get(str(table.get(name, "float32")), 1) for name in ("exp_avg_dtype", "exp_avg_sq_dtype")) if precise and share == 0 else 8
    left_behind = 0 if precise else copy
    return numbers * ((1 - share) * (copy + moments) + share * left_behind), numbers * share * 16


def activation_bytes(arch: Architecture, settings: TrainSection, stage: int, assumed: Assumptions, engine: bool) -> float:
    """What is kept for the backward pass of the microbatches in flight (1F1B: the first stage has as many as there are stages), and one layer's work."""
    parallel, tokens = settings.parallel, settings.max_tokens_per_microbatch
    layer = layer_activations(arch, tensor=parallel.tensor, size=SIZES[settings.dtype], engine=engine)
    spread = assumed.expert_imbalance if parallel.expert > 1 else 1.0
    layers, in_flight = arch.num_layers // parallel.pipeline, parallel.pipeline - stage
    if settings.recompute == "full":
        return tokens * (layers * in_flight * layer.boundary + (1 + WORK_SHARE) * layer.kept(spread))
    return tokens * (layers * in_flight + WORK_SHARE) * layer.kept(spread)


def logprob_bytes(arch: Architecture, settings: TrainSection | ForwardSection) -> float:
    """Output layer: all tokens' hidden states with their gradient in float32, blocks of logits, and the weight's gradient before it is added up."""
    size, tensor, tokens = SIZES[settings.dtype], settings.parallel.tensor, settings.max_tokens_per_microbatch
    whole = tokens * arch.padded_vocab_size / tensor * 4
    hidden = tokens * arch.hidden_size * (size + 4 + size)
    weight_gradient = arch.padded_vocab_size / tensor * arch.hidden_size * size
    return hidden + BLOCKS_AT_ONCE * min(whole, LOGIT_BLOCK) + weight_gradient


def forward_memory(arch: Architecture, settings: ForwardSection, assumed: Assumptions) -> MemoryUse:
    """Of the fullest rank that only scores: no gradients, no optimizer, one layer's activations at a time."""
    uses = []
    for index, held in enumerate(stages := parameters_by_formula(arch, settings.parallel)):
        size, parallel = SIZES[settings.dtype], settings.parallel
        layer = layer_activations(arch, tensor=parallel.tensor, size=size, engine=True)
        gpu = {"weights": float(held.total * size), "activations": settings.max_tokens_per_microbatch * layer.kept(assumed.expert_imbalance)}
        if index == len(stages) - 1:
            gpu["log-probabilities"] = logprob_bytes(arch, settings)
        gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
        gpu["context, NCCL"] = assumed.context_bytes + (assumed.nccl_bytes if parallel.ranks > 1 else 0)
        uses.append(gpu)
    host = {"processes": settings.parallel.ranks * assumed.rank_host_bytes}
    return MemoryUse(max(uses, key=lambda gpu: sum(gpu.values())), host, {"gpus": settings.parallel.ranks})


# ---- a server -------------------------------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(arch: Architecture, settings: SGLangSection) -> float:
    """Of one tensor rank. Where there are more ranks than key-value heads, heads are copied."""
    heads = max(1.0, arch.num_kv_heads / settings.tensor)
    return 2 * arch.num_layers * heads * arch.head_dim * SIZES[settings.dtype]


def server_memory(
    arch: Architecture, parameters: int, settings: SGLangSection, node: Node, assumed: Assumptions, *, mean_len: float, scoring: bool = False
) -> MemoryUse:
    """Of a GPU that serves a model. parameters: of the whole model. mean_len: of prompt and response. scoring: prompts' log-probabilities are asked for.

    SGLang takes mem_fraction of the GPU for weights and KV cache; everything else lives in the rest.
    """
    weights = parameters * SIZES[settings.dtype] / settings.tensor
    cache = settings.mem_fraction * node.gpu.memory - weights
    per_token = kv_bytes_per_token(arch, settings)
    if settings.max_total_tokens is not None:
        cache = min(cache, settings.max_total_tokens * per_token)
    tokens = max(0.0, cache / per_token)
    copies = settings.data * settings.replicas
    gpu = {"weights": weights, "KV cache": max(0.0, cache), "context, graphs": assumed.served_runtime_bytes}
    if scoring:
        # float32 logits of a chunk of the prompt over the whole vocabulary, and their log-softmax
        chunk = min(
            float(settings.extra_args.get("chunked_prefill_size", assumed.prefill_chunk)), settings.context_length * float(settings.max_running_requests)
        )
        gpu["logits of a chunk"] = max(0.0, chunk) * arch.padded_vocab_size * 4 * 2
    figures = {
        "kv_tokens": tokens,
        "concurrency": min(settings.max_running_requests, tokens / mean_len),  # of one copy
        "copies": copies,
        "gpus": settings.tensor * copies,
    }
    return MemoryUse(gpu, {"servers": assumed.served_host_bytes * settings.tensor * copies}, figures)
