"""Memory of a trainer's rank and of its machine, term by term. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lopd.config import DistillSection, ForwardSection, ParallelSection, TrainSection
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.activations import BACKWARD_SHARE, layer_activations
from lopd.planning.assumptions import Assumptions
from lopd.planning.parameters import (
    StageParameters,
    parameters_by_formula,
    trained_parameters,
)

# Bytes of one number.
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# lopd.megatron.model.logprobs.BLOCK_BYTES on CUDA: the largest block of logits.
LOGIT_BLOCK = 256 * 2**20
# Blocks of logits that are there at once: the float32 logits, and their rounded gradient together
# with what torch makes between the two.
BLOCKS_AT_ONCE = 2
# lopd.stages.training_data.MEMORY_TOKENS: response tokens that a rank holds as samples. Of a larger
# artifact it reads by index from disk.
MEMORY_TOKENS = 2**23
# The same file: the bytes of a token by which it counts, and those of an expert that is replayed.
TOKEN_BYTES = 25
EXPERT_BYTES = 2
# The kept_tokens of lopd.cache.reader.CacheReader: tokens that a rank then keeps decoded.
KEPT_TOKENS = 2**20
# Bytes per decoded token, measured on that reader.
DECODED_BYTES = 30
# Bytes per response of an artifact on disk: the check that no response comes twice, and the order
# of an epoch with what its sorting needs.
INDEX_BYTES = 40
# Bytes of a sample besides those of its tokens: the Python and numpy objects.
SAMPLE_BYTES = 650
# Buffers that context ranks pass on in a ring while others are computed. Each has keys and values,
# or their gradients on the way back. Only the layer whose attention runs has them.
RING_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes by what takes them.

    Attributes:
        gpu: Terms of the fullest GPU.
        host: Terms of a machine's memory.
        figures: What follows from the terms, such as the number of requests of a server.
        turns: If several programs take turns with a GPU, the bytes of each turn. gpu then has the
            terms of the fullest turn.
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
    """What a training reads.

    Attributes:
        responses: Number of responses.
        prompt_len: Mean tokens of a prompt.
        response_len: Mean tokens of a response.
    """

    responses: float
    prompt_len: float
    response_len: float


def trainer_memory(
    arch: Architecture,
    settings: TrainSection,
    stages: list[StageParameters],
    assumed: Assumptions,
    *,
    data: Data | None = None,
    engine: bool = True,
) -> MemoryUse:
    """Return the memory of the trainer's fullest rank, and of a machine with its ranks.

    Args:
        arch: The shape of the student.
        settings: The settings of the training.
        stages: Parameters of a rank, by pipeline stage.
        assumed: Sizes that cannot be known.
        data: What the training reads. None counts no samples.
        engine: Whether the layers are Transformer Engine's, as on a GPU.
    """
    uses = [
        _stage_memory(arch, settings, stages, index, assumed, engine)
        for index in range(len(stages))
    ]
    # All ranks must fit, so the fullest one decides.
    gpu, _ = max(uses, key=lambda use: sum(use[0].values()))
    ranks_here = settings.parallel.ranks // settings.parallel.nodes
    # A machine has ranks of several pipeline stages, so the mean over stages counts.
    offloaded = sum(on_host for _, on_host in uses) / settings.parallel.pipeline
    # Every rank reads the data by itself, so they are on a machine as often as it has ranks.
    experts = replayed_bytes(arch, settings)
    samples = 0.0 if data is None else sample_bytes(data, settings, assumed, experts)
    host = {
        "optimizer": offloaded * ranks_here,
        "samples": samples * ranks_here,
        "processes": assumed.rank_host_bytes * ranks_here,
    }
    return MemoryUse(gpu, host)


def replayed_bytes(arch: Architecture, settings: TrainSection) -> int:
    """Return the bytes per token of the experts that a training replays; 0 without a replay."""
    replays = isinstance(settings, DistillSection) and settings.routing_replay
    return EXPERT_BYTES * arch.num_layers * arch.experts_per_token if replays else 0


def sample_bytes(
    data: Data, settings: TrainSection, assumed: Assumptions, expert_bytes: int = 0
) -> float:
    """Return the host memory of one rank for what it learns from.

    If that is little, a rank holds all of it. Otherwise it holds the row groups that it read last,
    the responses of one step, and an index.

    Args:
        data: What the training reads.
        settings: The settings of the training.
        assumed: Bytes per token of a sample.
        expert_bytes: Bytes per token of replayed experts.
    """
    tokens = data.prompt_len + data.response_len
    sample = tokens * (assumed.sample_bytes_per_token + expert_bytes) + SAMPLE_BYTES
    # The same comparison as the trainer's, by response tokens without prompts.
    held = MEMORY_TOKENS * TOKEN_BYTES // (TOKEN_BYTES + expert_bytes)
    if data.responses * data.response_len <= held:
        return data.responses * sample
    decoded = KEPT_TOKENS * DECODED_BYTES
    index = data.responses * INDEX_BYTES
    return decoded + settings.batch_size * sample + index


def _stage_memory(
    arch: Architecture,
    settings: TrainSection,
    stages: list[StageParameters],
    index: int,
    assumed: Assumptions,
    engine: bool,
) -> tuple[dict[str, float], float]:
    """Return the terms on a GPU of one pipeline stage, and what its optimizer has on the host."""
    held = stages[index]
    size = SIZES[settings.dtype]
    # A frozen weight has no gradient and no optimizer state. Adapters come on top of the weights.
    trained = trained_parameters(arch, settings, held)
    weights = held.total + (trained.total if settings.lora.is_on else 0)
    # Megatron-Core adds up gradients in float32 unless it is told otherwise.
    gradient_size = 4 if settings.megatron.get("grad_reduce_in_fp32", True) else size
    on_gpu, on_host = optimizer_bytes(settings, trained)
    gpu = {
        "weights": float(weights * size),
        "gradients": float(trained.total * gradient_size),
        "optimizer": on_gpu,
        "activations": activation_bytes(arch, settings, index, assumed, engine),
    }
    # The output layer is on the last pipeline stage.
    if index == len(stages) - 1:
        gpu["log-probabilities"] = logprob_bytes(arch, settings, frozen=settings.lora.is_on)
    # Only torch's allocator leaves gaps. What comes after this line it does not allocate.
    gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
    gpu["context, NCCL"] = runtime_bytes(settings.parallel, assumed)
    return gpu, on_host


def runtime_bytes(parallel: ParallelSection, assumed: Assumptions) -> float:
    """Return what a rank's process has on its GPU besides tensors."""
    size = assumed.context_bytes
    # A single rank exchanges nothing, and has no communicator.
    if parallel.ranks > 1:
        size += assumed.nccl_bytes
    # Context ranks have communicators of their own.
    if parallel.context > 1:
        size += assumed.context_nccl_bytes
    return size


def optimizer_bytes(settings: TrainSection, trained: StageParameters) -> tuple[float, float]:
    """Return the bytes of one rank's optimizer on its GPU and in host memory.

    AdamW has two moments, and master weights in float32 if the weights are bfloat16. With the
    distributed optimizer a rank has the share of one data rank.

    Args:
        settings: The settings of the training.
        trained: The parameters of the rank that are trained.
    """
    table = settings.megatron
    numbers = _optimized_numbers(settings, trained)
    # These are fields of Megatron-Core's OptimizerConfig, and their defaults are its defaults.
    is_precise = bool(table.get("use_precision_aware_optimizer"))
    # Float32 weights are their own master weights.
    master = 4 if settings.dtype == "bfloat16" else 0
    offloaded = 0.0
    if table.get("optimizer_cpu_offload"):
        offloaded = float(table.get("optimizer_offload_fraction", 0.0))
    # Bytes of two moments in float32.
    moments = 8
    if is_precise and offloaded == 0:
        # A precision-aware optimizer may keep moments in other dtypes. Those with 8 bits are 1.
        moments = sum(
            SIZES.get(str(table.get(name, "float32")), 1)
            for name in ("exp_avg_dtype", "exp_avg_sq_dtype")
        )
    # Megatron-Core's HybridDeviceOptimizer leaves float32 master weights on the GPU, although the
    # host has them too. A precision-aware optimizer does not.
    left_behind = 0 if is_precise else master
    # A precision-aware optimizer keeps of the master weight only the 16 bits that the bfloat16
    # weight itself lacks. The two together are the whole float32 number.
    if is_precise and offloaded == 0 and master and table.get("store_param_remainders", True):
        master = 2
    # Of each parameter one part is on the GPU with all its state, and the other part is offloaded.
    on_gpu = numbers * ((1 - offloaded) * (master + moments) + offloaded * left_behind)
    # On the host: master weight, gradient and two moments, 4 bytes each.
    return on_gpu, numbers * offloaded * 16


def _optimized_numbers(settings: TrainSection, trained: StageParameters) -> int:
    """Return the number of parameters whose optimizer state one rank holds."""
    parallel = settings.parallel
    dense = trained.dense
    experts = trained.experts
    if parallel.distributed_optimizer:
        # Data ranks and context ranks hold the same dense weights, so they share the state.
        dense //= parallel.data * parallel.context
        # Experts have fewer equal copies, because expert ranks hold different ones.
        expert_ranks = parallel.pipeline * parallel.expert * parallel.expert_tensor
        experts //= max(1, parallel.ranks // expert_ranks)
    return dense + experts


def activation_bytes(
    arch: Architecture, settings: TrainSection, stage: int, assumed: Assumptions, engine: bool
) -> float:
    """Return the activations that are kept, and what the layer needs whose backward pass runs.

    Args:
        arch: The shape of the student.
        settings: The settings of the training.
        stage: Index of the pipeline stage.
        assumed: The imbalance of experts.
        engine: Whether the layers are Transformer Engine's.
    """
    parallel = settings.parallel
    size = SIZES[settings.dtype]
    # Context ranks share the tokens of a microbatch.
    tokens = settings.max_tokens_per_microbatch / parallel.context
    layer = layer_activations(arch, tensor=parallel.tensor, size=size, engine=engine)
    # On one expert rank all tokens stay, whatever the router chooses.
    imbalance = assumed.expert_imbalance if parallel.expert > 1 else 1.0
    # In the 1F1B schedule the first stage has as many microbatches in flight as there are stages,
    # and each later stage has one fewer.
    in_flight = parallel.pipeline - stage
    kept_layers = arch.num_layers // parallel.pipeline * in_flight
    ring = ring_bytes(arch, parallel, size) if parallel.context > 1 else 0.0
    if settings.recompute == "full":
        # All layers keep their input. The one that runs backward is computed again as a whole.
        running = (1 + BACKWARD_SHARE) * layer.kept(imbalance)
        return tokens * (kept_layers * layer.boundary + running + ring)
    if settings.recompute == "selective" and engine:
        # All layers keep attention. Of the layer that runs backward, the rest is computed again.
        attention = (kept_layers + BACKWARD_SHARE) * layer.attention
        recomputed = (1 + BACKWARD_SHARE) * layer.recomputed(imbalance)
        return tokens * (attention + recomputed + ring)
    # Selective recompute of the local layers saves only attention scores, which are not counted.
    return tokens * ((kept_layers + BACKWARD_SHARE) * layer.kept(imbalance) + ring)


def ring_bytes(arch: Architecture, parallel: ParallelSection, size: int) -> float:
    """Return the bytes per token of the buffers that one context rank passes on."""
    # Tensor ranks share the heads, so each passes on its own.
    keys_and_values = 2 * arch.num_kv_heads * arch.head_dim
    return RING_BUFFERS * size * keys_and_values / parallel.tensor


def logprob_bytes(
    arch: Architecture, settings: TrainSection | ForwardSection, *, frozen: bool = False
) -> float:
    """Return the bytes of the output layer, where hidden states become log-probabilities.

    Args:
        arch: The shape of the model.
        settings: The settings of the training or of the scoring.
        frozen: Whether the layer's weight takes no gradient.
    """
    size = SIZES[settings.dtype]
    tokens = settings.max_tokens_per_microbatch / settings.parallel.context
    vocabulary = arch.padded_vocab_size / settings.parallel.tensor
    # The hidden states of all tokens, their gradient in float32, and that gradient rounded.
    hidden = tokens * arch.hidden_size * (size + 4 + size)
    # Logits never exist as a whole, unless all of them fit into one block.
    all_logits = tokens * vocabulary * 4
    blocks = BLOCKS_AT_ONCE * min(all_logits, LOGIT_BLOCK)
    # The weight's gradient of this microbatch, before it is added to that of the step.
    weight_gradient = 0.0 if frozen else vocabulary * arch.hidden_size * size
    return hidden + blocks + weight_gradient


def forward_memory(arch: Architecture, settings: ForwardSection, assumed: Assumptions) -> MemoryUse:
    """Return the memory of the fullest rank that only scores.

    Such a rank has no gradients and no optimizer, and the activations of one layer at a time.

    Args:
        arch: The shape of the teacher.
        settings: The settings of score.forward.
        assumed: Sizes that cannot be known.
    """
    parallel = settings.parallel
    size = SIZES[settings.dtype]
    # Scoring keeps nothing for a backward pass. One layer's activations are an upper bound of what
    # it has at once.
    layer = layer_activations(arch, tensor=parallel.tensor, size=size, engine=True)
    ring = ring_bytes(arch, parallel, size) if parallel.context > 1 else 0.0
    tokens = settings.max_tokens_per_microbatch / parallel.context
    stages = parameters_by_formula(arch, parallel)
    uses = []
    for index, held in enumerate(stages):
        gpu = {
            "weights": float(held.total * size),
            "activations": tokens * (layer.kept(assumed.expert_imbalance) + ring),
        }
        if index == len(stages) - 1:
            gpu["log-probabilities"] = logprob_bytes(arch, settings)
        gpu["fragmentation"] = assumed.fragmentation * sum(gpu.values())
        gpu["context, NCCL"] = runtime_bytes(parallel, assumed)
        uses.append(gpu)
    # The fullest rank decides: all GPUs of a node are alike, and none may run out.
    fullest = max(uses, key=lambda gpu: sum(gpu.values()))
    host = {"processes": parallel.ranks * assumed.rank_host_bytes}
    return MemoryUse(fullest, host, {"gpus": parallel.ranks})
