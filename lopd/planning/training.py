"""How long a training step takes, by what it is made of.

Operations run at a share of the GPU's peak. With experts the exchanges between GPUs are counted
apart from them, so that a published rate of one layout says something about another: tensor ranks
gather and scatter activations, expert ranks send every token to its experts and back. For dense
models they are in the utilisation, which is that of a published run with the same layout.

Not counted: padding, uneven pipelines, and the network of several nodes, over which expert ranks
would be much slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopd.config import TrainSection
from lopd.megatron.training.flops import training_flops
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node

UPDATE_BYTES = (
    28  # AdamW in float32 reads weight, gradient and two moments, and writes all but the gradient
)
GRADIENT_BYTES, WEIGHT_BYTES = 4, 2  # of an offloaded optimizer: down to the host, and up again
FORWARD, BACKWARD, AGAIN = (
    2,
    3,
    2,
)  # exchanges of activations between tensor ranks around attention, or a dense MLP


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step. flops: done, repeated ones included. model_flops: of the model alone
    (lopd.megatron.training.flops).
    """

    products: float
    exchanges: float
    optimizer: float
    flops: float
    model_flops: float

    @property
    def seconds(self) -> float:
        return self.products + self.exchanges + self.optimizer


def step_time(
    arch: Architecture,
    settings: TrainSection,
    node: Node,
    assumed: Assumptions,
    *,
    sequence_len: float,
    parameters: int,
) -> StepTime:
    """parameters: of the whole model."""
    tokens, ranks = settings.batch_size * sequence_len, settings.parallel.ranks
    model = settings.batch_size * training_flops(arch, [round(sequence_len)])
    flops = (
        model
        + model / 3 * assumed.extra_forward_passes
        + tokens * repeated_flops(arch, settings, sequence_len)
    )
    optimizer = optimizer_seconds(settings, node, assumed, parameters)
    if not arch.num_experts:
        return StepTime(
            flops / (ranks * node.gpu.flops * assumed.dense_utilisation),
            0.0,
            optimizer,
            flops,
            model,
        )
    passes = 3 + assumed.extra_forward_passes + (settings.recompute in ("full", "selective"))
    waiting = (assumed.expert_slowdown - 1) * passes / 3 * tokens * expert_flops(arch)
    products = (flops + waiting) / (ranks * node.gpu.flops * assumed.moe_utilisation)
    exchanged = tokens / ranks * exchanged_bytes(arch, settings, assumed)
    return StepTime(
        products, exchanged / (node.gpu.link * assumed.link_efficiency), optimizer, flops, model
    )


def expert_flops(arch: Architecture) -> float:
    """Of a token's chosen experts, in one forward and one backward pass."""
    return (
        6.0
        * arch.num_layers
        * 3
        * arch.hidden_size
        * arch.moe_ffn_hidden_size
        * arch.experts_per_token
    )


def repeated_flops(arch: Architecture, settings: TrainSection, sequence_len: float) -> float:
    """Operations of a token that a step does a second time. The logits always:
    lopd.megatron.model.logprobs keeps none of them. (Of a dense model they are in the utilisation,
    which
    is that of a whole published stage.)

    With full recompute every layer's forward pass besides; with selective recompute that of the
    experts or the MLP.
    """
    head = 2.0 * arch.hidden_size * arch.vocab_size if arch.num_experts else 0.0
    if settings.recompute == "full":
        return training_flops(arch, [round(sequence_len)]) / 3 / sequence_len
    if settings.recompute == "selective":
        width = (
            arch.moe_ffn_hidden_size * arch.experts_per_token
            if arch.num_experts
            else arch.ffn_hidden_size
        )
        return head + 2.0 * arch.num_layers * (
            3 * arch.hidden_size * width + arch.hidden_size * arch.num_experts
        )
    return head


def exchanged_bytes(arch: Architecture, settings: TrainSection, assumed: Assumptions) -> float:
    """Bytes that come into a GPU for each token of its own, in all layers of a model with experts.

    Tensor ranks with sequence parallelism: attention gathers its input and scatters its output;
    backward the same, and its input once more for the weight's gradient. Experts: Megatron-Core's
    alltoall dispatcher sends a copy for each chosen expert, there and back, forward and backward.
    What is recomputed is exchanged again.
    """
    parallel, number = settings.parallel, arch.hidden_size * 2
    full, selective = settings.recompute == "full", settings.recompute == "selective"
    tensor = (FORWARD + BACKWARD + AGAIN * (full + assumed.extra_forward_passes)) * (
        parallel.tensor - 1
    )
    away = arch.experts_per_token * (1 - 1 / parallel.expert)
    experts = (
        (4 + 2 * (full or selective) + 2 * assumed.extra_forward_passes)
        * away
        * assumed.expert_slowdown
    )
    return arch.num_layers * number * (tensor + experts)


def optimizer_seconds(
    settings: TrainSection, node: Node, assumed: Assumptions, parameters: int
) -> float:
    """Of an optimizer that is offloaded to the CPU; on a GPU it takes next to nothing. Threads
    update as fast as they can or as memory lets them.
    """
    table = settings.megatron
    if not table.get("optimizer_cpu_offload"):
        return 0.0
    here = settings.parallel.ranks / settings.parallel.nodes
    number = (
        parameters * float(table.get("optimizer_offload_fraction", 0.0)) / settings.parallel.nodes
    )  # of a node
    threads = (
        here * settings.threads_per_rank
        if settings.threads_per_rank is not None
        else max(here, assumed.node_cores)
    )
    update = number / min(threads * assumed.cpu_adam_rate, assumed.host_bandwidth / UPDATE_BYTES)
    copies = number / here * (GRADIENT_BYTES + WEIGHT_BYTES) / assumed.host_link
    overlaps = table.get("overlap_cpu_optimizer_d2h_h2d", True)
    return max(update, copies) if overlaps else update + copies
