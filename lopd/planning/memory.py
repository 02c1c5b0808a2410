"""Memory of a GPU and of the machine, term by term: a trainer's rank, and a server. Bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lopd.config import ForwardSection, ParallelSection, SGLangSection, TrainSection
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.activations import WORK_SHARE, layer_activations
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.parameters import StageParameters, parameters_by_formula

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_BLOCK = 256 * 2**20  # lopd.megatron.model.logprobs.BLOCK_BYTES on CUDA
BLOCKS_AT_ONCE = (
    2  # a block of float32 logits and its rounded gradient, and what torch makes between
)
MEMORY_TOKENS = (
    2**23
)  # lopd.stages.training_data.MEMORY_TOKENS: response tokens that a rank holds as samples; a larger artifact is read from disk by index
KEPT_TOKENS = 2**20  # lopd.cache.reader.CacheReader's kept_tokens: what a rank then keeps decoded
DECODED_BYTES = 30  # per kept token, measured there
# per response of an artifact on disk: the check that none comes twice, and the order of an epoch
# with its sorting
INDEX_BYTES = 40
SAMPLE_BYTES = 650  # of a sample besides what its tokens take: the objects
AWAY = "trainer, while a server works"  # term of host memory
# context parallelism: keys and values that travel round the ranks while others are computed, and
# their gradients on the way back
RING_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """gpu: terms of the fullest GPU; host: of a machine. figures: what follows from them (a
    server's concurrency).

    turns: where several take turns with a GPU, the bytes of each turn; gpu is then the fullest one.
    """

    gpu: Mapping[str, float]
    host: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    turns: Mapping[str, float] = field(default_factory=dict)

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


@dataclass(frozen=True, slots=True)
class Data:
    """An artifact of responses: how many, and their mean lengths in tokens."""

    responses: float
    prompt_len: float
    response_len: float


# ---- the trainer ----------------------------------------------------------------------------------------------------------------------------------


def trainer_memory(
    arch: Architecture,
    settings: TrainSection,
    stages: list[StageParameters],
    assumed: Assumptions,
    *,
    data: Data | None = None,
    engine: bool = True,
) -> MemoryUse:
    """Of the fullest rank. stages: parameters of a rank by pipeline stage. data: what it learns
    from.

    engine: Transformer Engine's layers (on a GPU); without, the local ones.
    """
    uses = [
        _stage_memory(arch, settings, stages, index, assumed, engine)
        for index in range(len(stages))
    ]
    gpu, _ = max(uses, key=lambda use: sum(use[0].values()))
    here = settings.parallel.ranks // settings.parallel.nodes
    host = {
        "optimizer": sum(offloaded for _, offloaded in uses) / settings.parallel.pipeline * here,
        "samples": (sample_bytes(data, settings, assumed) if data is not None else 0.0) * here,
        "processes": here * assumed.rank_host_bytes,
    }
    return MemoryUse(gpu, host)


def sample_bytes(data: Data, settings: TrainSection, assumed: Assumptions) -> float:
    """Host memory of one rank for what it learns from: all of it where that is little; else the row
    groups read last, one step's responses, and an index.
    """
    each = (data.prompt_len + data.response_len) * assumed.sample_bytes_per_token + SAMPLE_BYTES
    if data.responses * data.response_len <= MEMORY_TOKENS:
        return data.responses * each
    return KEPT_TOKENS * DECODED_BYTES + settings.batch_size * each + data.responses * INDEX_BYTES


def in_turns(
    trainer: MemoryUse,
    servers: Mapping[str, MemoryUse],
    settings: TrainSection,
    bucket_bytes: int,
    assumed: Assumptions,
) -> MemoryUse:
    """Trainer and servers on the same GPUs, of which one at a time has its memory there
    (sync.colocate): the fullest of their turns, and of the syncs, where the weights of both are
    there. servers: "student", and "teacher" where a refresh starts it. What is away stays a process
    with its context.

    The trainer's weights and optimizer state lie in host memory meanwhile; gradients are forgotten.
    """
    asleep = assumed.context_bytes + (assumed.nccl_bytes if settings.parallel.ranks > 1 else 0)
    sleeping = {"student's server: context": asleep}
    kept = {term: trainer.gpu[term] for term in ("context, NCCL",)}
    student = {f"student's server: {term}": size for term, size in servers["student"].gpu.items()}
    held = {term: trainer.gpu[term] for term in ("weights", "context, NCCL")}
    turns = {
        "the trainer": {**trainer.gpu, **sleeping},
        "a sync": {
            **held,
            **sleeping,
            "student's server: weights": student["student's server: weights"],
            "buckets": 2.0 * bucket_bytes,
        },
        "the student's servers": {**kept, **student},
    }
    for role in servers:
        if role != "student":
            turns[f"the {role}'s server"] = {
                **kept,
                **sleeping,
                **{f"{role}'s server: {term}": size for term, size in servers[role].gpu.items()},
            }
    here = settings.parallel.ranks // settings.parallel.nodes
    away = {AWAY: (trainer.gpu["weights"] + trainer.gpu["optimizer"]) * here}
    host = {
        **trainer.host,
        **away,
        **{f"{role}'s server": server.host_total for role, server in servers.items()},
    }
    totals = {name: sum(turn.values()) for name, turn in turns.items()}
    fullest = max(totals, key=lambda name: totals[name])
    return MemoryUse(turns[fullest], host, servers["student"].figures, totals)


def _stage_memory(
    arch: Architecture,
    settings: TrainSection,
    stages: list[StageParameters],
    index: int,
    assumed: Assumptions,
    engine: bool,
) -> tuple[dict[str, float], float]:
    """Terms on a GPU of this pipeline stage, and what its optimizer has in host memory."""
    held, parallel, size = stages[index], settings.parallel, SIZES[settings.dtype]
    trained = held.total - (held.routers if settings.optimizer.freeze_router else 0)
    on_gpu, on_host = optimizer_bytes(settings, held)
    gpu = {
        "weights": float(held.total * size),
        "gradients": float(
            trained * (4 if settings.megatron.get("grad_reduce_in_fp32", True) else size)
        ),
        "optimizer": on_gpu,
        "activations": activation_bytes(arch, settings, index, assumed, engine),
    }
    if index == len(stages) - 1:
        gpu["log-probabilities"] = logprob_bytes(arch, settings)
    gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
    gpu["context, NCCL"] = runtime_bytes(parallel, assumed)
    return gpu, on_host


def runtime_bytes(parallel: ParallelSection, assumed: Assumptions) -> float:
    """What a rank's process has on its GPU besides tensors; context ranks have communicators of
    their own.
    """
    return (
        assumed.context_bytes
        + (assumed.nccl_bytes if parallel.ranks > 1 else 0)
        + (assumed.context_nccl_bytes if parallel.context > 1 else 0)
    )


def optimizer_bytes(settings: TrainSection, held: StageParameters) -> tuple[float, float]:
    """On the GPU and in host memory, of one rank.

    AdamW's two moments, and of bfloat16 weights a float32 copy; with the distributed optimizer the
    share of one data rank. A precision-aware optimizer keeps of that copy only the 16 bits that the
    weight itself lacks (store_param_remainders), so the float32 copy is whole all the same. What is
    offloaded
    (Megatron-Core's HybridDeviceOptimizer) has copy, moments and gradient in host memory, in
    float32; a float32 copy stays on the GPU all the same, unless the
    optimizer is precision-aware.
    """
    parallel, table = settings.parallel, settings.megatron
    dense, experts = (
        held.dense - (held.routers if settings.optimizer.freeze_router else 0),
        held.experts,
    )
    if parallel.distributed_optimizer:
        dense //= parallel.data * parallel.context
        experts //= max(
            1, parallel.ranks // (parallel.pipeline * parallel.expert * parallel.expert_tensor)
        )
    numbers = dense + experts
    precise = bool(table.get("use_precision_aware_optimizer"))
    copy = 4 if settings.dtype == "bfloat16" else 0
    share = (
        float(table.get("optimizer_offload_fraction", 0.0))
        if table.get("optimizer_cpu_offload")
        else 0.0
    )
    moments = (
        sum(
            SIZES.get(str(table.get(name, "float32")), 1)
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
        )
        if precise and share == 0
        else 8
    )
    left_behind = 0 if precise else copy
    if precise and share == 0 and copy and table.get("store_param_remainders", True):
        copy = 2
    return numbers * ((1 - share) * (copy + moments) + share * left_behind), numbers * share * 16


def activation_bytes(
    arch: Architecture, settings: TrainSection, stage: int, assumed: Assumptions, engine: bool
) -> float:
    """What is kept for the backward pass of the microbatches in flight (1F1B: the first stage has
    as many as there are stages), and one layer's work.

    A microbatch's tokens are shared by the context ranks; in the layer whose attention runs, keys
    and values of the others pass through.
    """
    parallel, size = settings.parallel, SIZES[settings.dtype]
    tokens = settings.max_tokens_per_microbatch / parallel.context
    layer = layer_activations(arch, tensor=parallel.tensor, size=size, engine=engine)
    spread = assumed.expert_imbalance if parallel.expert > 1 else 1.0
    layers, in_flight = arch.num_layers // parallel.pipeline, parallel.pipeline - stage
    ring = ring_bytes(arch, parallel, size) if parallel.context > 1 else 0.0
    if settings.recompute == "full":
        return tokens * (
            layers * in_flight * layer.boundary + (1 + WORK_SHARE) * layer.kept(spread) + ring
        )
    if settings.recompute == "selective" and engine:
        again = layer.recomputed(spread)
        return tokens * (
            (layers * in_flight + WORK_SHARE) * layer.attention + (1 + WORK_SHARE) * again + ring
        )
    return tokens * ((layers * in_flight + WORK_SHARE) * layer.kept(spread) + ring)


def ring_bytes(arch: Architecture, parallel: ParallelSection, size: int) -> float:
    """Per token of a context rank."""
    return RING_BUFFERS * 2 * size * arch.num_kv_heads * arch.head_dim / parallel.tensor


def logprob_bytes(arch: Architecture, settings: TrainSection | ForwardSection) -> float:
    """Output layer: all tokens' hidden states with their gradient in float32, blocks of logits, and
    the weight's gradient before it is added up.
    """
    size, tensor, tokens = (
        SIZES[settings.dtype],
        settings.parallel.tensor,
        settings.max_tokens_per_microbatch / settings.parallel.context,
    )
    whole = tokens * arch.padded_vocab_size / tensor * 4
    hidden = tokens * arch.hidden_size * (size + 4 + size)
    weight_gradient = arch.padded_vocab_size / tensor * arch.hidden_size * size
    return hidden + BLOCKS_AT_ONCE * min(whole, LOGIT_BLOCK) + weight_gradient


def forward_memory(arch: Architecture, settings: ForwardSection, assumed: Assumptions) -> MemoryUse:
    """Of the fullest rank that only scores: no gradients, no optimizer, one layer's activations at
    a time.
    """
    uses = []
    for index, held in enumerate(stages := parameters_by_formula(arch, settings.parallel)):
        size, parallel = SIZES[settings.dtype], settings.parallel
        layer = layer_activations(arch, tensor=parallel.tensor, size=size, engine=True)
        ring = ring_bytes(arch, parallel, size) if parallel.context > 1 else 0.0
        tokens = settings.max_tokens_per_microbatch / parallel.context
        gpu = {
            "weights": float(held.total * size),
            "activations": tokens * (layer.kept(assumed.expert_imbalance) + ring),
        }
        if index == len(stages) - 1:
            gpu["log-probabilities"] = logprob_bytes(arch, settings)
        gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
        gpu["context, NCCL"] = runtime_bytes(parallel, assumed)
        uses.append(gpu)
    host = {"processes": settings.parallel.ranks * assumed.rank_host_bytes}
    return MemoryUse(
        max(uses, key=lambda gpu: sum(gpu.values())), host, {"gpus": settings.parallel.ranks}
    )


# ---- a server -------------------------------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(arch: Architecture, settings: SGLangSection) -> float:
    """Of one tensor rank. Where there are more ranks than key-value heads, heads are copied."""
    heads = max(1.0, arch.num_kv_heads / settings.tensor)
    return 2 * arch.num_layers * heads * arch.head_dim * SIZES[settings.dtype]


def server_memory(
    arch: Architecture,
    parameters: int,
    settings: SGLangSection,
    node: Node,
    assumed: Assumptions,
    *,
    mean_len: float,
    scoring: bool = False,
) -> MemoryUse:
    """Of a GPU that serves a model. parameters: of the whole model. mean_len: of prompt and
    response. scoring: prompts' log-probabilities are asked for.

    SGLang takes mem_fraction of the GPU for weights and KV cache; everything else lives in the
    rest.
    """
    weights = parameters * SIZES[settings.dtype] / settings.tensor
    cache = settings.mem_fraction * node.gpu.memory - weights
    per_token = kv_bytes_per_token(arch, settings)
    if settings.max_total_tokens is not None:
        cache = min(cache, settings.max_total_tokens * per_token)
    tokens = max(0.0, cache / per_token)
    copies = settings.data * settings.replicas
    gpu = {
        "weights": weights,
        "KV cache": max(0.0, cache),
        "context, graphs": assumed.served_runtime_bytes,
    }
    if scoring:
        # float32 logits of so many tokens over the whole vocabulary, and their log-softmax; a
        # smaller chunk of the prompt is a smaller part
        asked = settings.context_length * float(settings.max_running_requests)
        prefill = float(settings.extra_args.get("chunked_prefill_size", assumed.logits_chunk))
        chunk = min(
            assumed.logits_chunk, asked, *([prefill] if prefill > 0 else [])
        )  # -1: prompts are not cut
        gpu["logits of a chunk"] = chunk * arch.padded_vocab_size * 4 * 2
    figures = {
        "kv_tokens": tokens,
        "concurrency": min(settings.max_running_requests, tokens / mean_len),  # of one copy
        "copies": copies,
        "gpus": settings.tensor * copies,
    }
    return MemoryUse(
        gpu, {"servers": assumed.served_host_bytes * settings.tensor * copies}, figures
    )
