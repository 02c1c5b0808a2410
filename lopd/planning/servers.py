"""Memory of SGLang's servers, alone and together with a trainer. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping

from lopd.config import SGLangSection, TrainSection
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node
from lopd.planning.memory import SIZES, MemoryUse

# The term of host memory for what a trainer moves there while a server works.
PAUSED_TRAINER = "trainer, while a server works"


def kv_bytes_per_token(arch: Architecture, settings: SGLangSection) -> float:
    """Return the bytes of keys and values of one token on one tensor rank of a server."""
    # If there are more ranks than key-value heads, SGLang copies heads, so a rank has at least one.
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
    """Return the memory of a GPU that serves a model, and of a machine with its servers.

    Args:
        arch: The shape of the model.
        parameters: Parameters of the whole model.
        settings: The settings of the servers.
        node: The machine.
        assumed: Sizes that cannot be known.
        mean_len: Mean tokens of a prompt and its response.
        scoring: Whether log-probabilities of prompts are asked for.
    """
    weights = parameters * SIZES[settings.dtype] / settings.tensor
    # SGLang takes mem_fraction of the GPU for weights and KV cache. Everything else lives in the
    # rest.
    cache = settings.mem_fraction * node.gpu.memory - weights
    per_token = kv_bytes_per_token(arch, settings)
    # A limit in tokens can only make the cache smaller.
    if settings.max_total_tokens is not None:
        cache = min(cache, settings.max_total_tokens * per_token)
    # Weights that fill the share leave no cache at all. The verdict says so, by its tokens.
    cache = max(0.0, cache)
    tokens = cache / per_token
    # Data ranks and replicas both hold the whole model and serve different requests.
    copies = settings.data * settings.replicas
    gpu = {
        "weights": weights,
        "KV cache": cache,
        "context, graphs": assumed.served_runtime_bytes,
    }
    if scoring:
        gpu["logits of a chunk"] = _scoring_bytes(arch, settings, assumed)
    figures = {
        "kv_tokens": tokens,
        # Requests of one copy of the model.
        "concurrency": min(settings.max_running_requests, tokens / mean_len),
        "copies": copies,
        "gpus": settings.tensor * copies,
    }
    # SGLang has one process for each GPU.
    host = {"servers": assumed.served_host_bytes * settings.tensor * copies}
    return MemoryUse(gpu, host, figures)


def _scoring_bytes(arch: Architecture, settings: SGLangSection, assumed: Assumptions) -> float:
    """Return the bytes of logits that a server holds at once while it scores."""
    # Never more tokens than all running requests have together.
    tokens = min(
        assumed.logits_chunk, settings.context_length * float(settings.max_running_requests)
    )
    # A smaller chunk of the prompt has fewer logits. -1 means that prompts are not cut.
    prefill = float(settings.extra_args.get("chunked_prefill_size", assumed.logits_chunk))
    if prefill > 0:
        tokens = min(tokens, prefill)
    # Float32 logits over the whole vocabulary, and their log-softmax.
    return tokens * arch.padded_vocab_size * 4 * 2


def memory_beside(trainer: MemoryUse, server: MemoryUse, role: str) -> MemoryUse:
    """Return the memory of a server and a trainer on the same GPUs at the same time.

    Args:
        trainer: The memory of the trainer.
        server: The memory of the server.
        role: The role of the model that is served.
    """
    # Terms of the trainer and the server have different names, so none hides another.
    gpu = {**trainer.gpu, **_named(role, server)}
    host = {**trainer.host, f"{role}'s server": server.host_total}
    return MemoryUse(gpu, host, {**trainer.figures, **server.figures})


def colocated_memory(
    trainer: MemoryUse,
    servers: Mapping[str, MemoryUse],
    settings: TrainSection,
    bucket_bytes: int,
    assumed: Assumptions,
) -> MemoryUse:
    """Return the memory of a trainer and servers that take turns with the GPUs (sync.colocate).

    One of them at a time has its memory on the GPUs. The others stay as processes with their CUDA
    context. In a weight sync the weights of trainer and student's server are both there.

    Args:
        trainer: The memory of the trainer.
        servers: The memory of the servers by role: "student", and "teacher" if a refresh starts it.
        settings: The settings of distill.
        bucket_bytes: Bytes of a bucket of weights in a sync.
        assumed: Sizes that cannot be known.

    Returns:
        The fullest turn. Host memory has the trainer's weights and optimizer state meanwhile.
    """
    context = assumed.context_bytes
    if settings.parallel.ranks > 1:
        context += assumed.nccl_bytes
    paused_server = {"student's server: context": context}
    paused_trainer = {"context, NCCL": trainer.gpu["context, NCCL"]}
    turns = {
        "the trainer": {**trainer.gpu, **paused_server},
        "a sync": {
            "weights": trainer.gpu["weights"],
            **paused_trainer,
            **paused_server,
            "student's server: weights": servers["student"].gpu["weights"],
            # One bucket is filled while the other is read.
            "buckets": 2.0 * bucket_bytes,
        },
        "the student's servers": {**paused_trainer, **_named("student", servers["student"])},
    }
    for role, server in servers.items():
        if role != "student":
            # The student's server lives, paused, while the teacher scores a refresh.
            turns[f"the {role}'s server"] = {
                **paused_trainer,
                **paused_server,
                **_named(role, server),
            }
    ranks_here = settings.parallel.ranks // settings.parallel.nodes
    host = {
        **trainer.host,
        # Gradients are forgotten: the next step makes new ones.
        PAUSED_TRAINER: (trainer.gpu["weights"] + trainer.gpu["optimizer"]) * ranks_here,
        **{f"{role}'s server": server.host_total for role, server in servers.items()},
    }
    totals = {name: sum(turn.values()) for name, turn in turns.items()}
    # Turns follow each other, so their sizes are not added up.
    fullest = max(totals, key=lambda name: totals[name])
    return MemoryUse(turns[fullest], host, servers["student"].figures, totals)


def _named(role: str, server: MemoryUse) -> dict[str, float]:
    """Return the terms of a server's GPU with the role of its model before them."""
    return {f"{role}'s server: {term}": size for term, size in server.gpu.items()}
