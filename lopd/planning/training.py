"""How long a training step takes, by what it is made of.

Operations run at a share of the GPU's peak. For models with experts the exchanges between GPUs are
counted apart from the operations, so that a published rate of one layout says something about
another. Tensor ranks gather and scatter activations, and expert ranks send every token to its
experts and back. For dense models the exchanges are part of the utilisation, which is that of a
published run with the same layout.

Padding and uneven pipelines are not counted. Neither is the network between several nodes, over
which expert ranks would be much slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopd.config import TrainSection
from lopd.megatron.training.flops import training_flops
from lopd.megatron.weights.architecture import Architecture
from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node

# Bytes per weight that AdamW in float32 moves: it reads weight, gradient and two moments (16), and
# writes weight and moments (12).
# The memory of the host is the limit of such an update, more often than its cores.
UPDATE_BYTES = 28
# Bytes per weight that an offloaded optimizer copies: a float32 gradient down to the host, and a
# bfloat16 weight up again.
GRADIENT_BYTES = 4
WEIGHT_BYTES = 2
# Bytes of an activation that GPUs exchange: it is bfloat16.
ACTIVATION_BYTES = 2
# Exchanges of activations between tensor ranks around attention or a dense MLP. Forward: a gather
# and a scatter. Backward: the same, and a gather of the input for the weight's gradient. A
# repeated forward pass exchanges as the first one.
FORWARD = 2
BACKWARD = 3
AGAIN = 2
# Exchanges of each token with its experts, there and back: two forward and two backward. A
# repeated forward pass has two more.
EXPERT_EXCHANGES = 4
EXPERT_AGAIN = 2


@dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of the time of one step, in seconds, and its operations.

    Attributes:
        products: The seconds of matrix products and of all other computation.
        exchanges: The seconds of communication between GPUs that the utilisation of the products
            does not include.
        optimizer: The seconds of the update, if the optimizer is offloaded.
        flops: The number of operations in a step, including repeated ones.
        model_flops: The number of operations of the model alone (lopd.megatron.training.flops).
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
    """Return the time of one training step.

    Args:
        arch: The shape of the student.
        settings: The settings of the training.
        node: The machine.
        assumed: Rates and utilisations.
        sequence_len: Mean tokens of a sequence, prompt and response.
        parameters: The trained parameters of the whole model.
    """
    # Tokens of one step over all ranks.
    tokens = settings.batch_size * sequence_len
    ranks = settings.parallel.ranks
    frozen = settings.lora.is_on
    length = round(sequence_len)
    model_flops = settings.batch_size * training_flops(arch, [length], frozen=frozen)
    # A forward pass is a third of a step of all weights: the backward pass has twice its products.
    forward_flops = settings.batch_size * training_flops(arch, [length]) / 3
    flops = (
        model_flops
        + forward_flops * assumed.extra_forward_passes
        + tokens * repeated_flops(arch, settings, sequence_len)
    )
    optimizer = optimizer_seconds(settings, node, assumed, parameters)
    if not arch.num_experts:
        products = flops / (ranks * node.gpu.flops * assumed.dense_utilisation)
        return StepTime(products, 0.0, optimizer, flops, model_flops)
    # While the busiest expert rank computes, the others wait. Their lost time is counted as
    # operations that they would have done meanwhile.
    recomputes_experts = settings.recompute in ("full", "selective")
    # One forward pass and a backward pass that counts twice, then what is repeated. Frozen experts
    # have one product fewer in the backward pass.
    passes = (2 if frozen else 3) + assumed.extra_forward_passes + recomputes_experts
    waiting = (assumed.expert_slowdown - 1) * passes / 3 * tokens * expert_flops(arch)
    products = (flops + waiting) / (ranks * node.gpu.flops * assumed.moe_utilisation)
    # Each rank exchanges for its own tokens, at the same time as the others.
    exchanged = tokens / ranks * exchanged_bytes(arch, settings, assumed)
    exchanges = exchanged / (node.gpu.link * assumed.link_efficiency)
    return StepTime(products, exchanges, optimizer, flops, model_flops)


def expert_flops(arch: Architecture) -> float:
    """Return the operations of a token's chosen experts in one forward and one backward pass."""
    # Gate, up and down projection of each chosen expert in each layer.
    weights = (
        arch.num_layers * 3 * arch.hidden_size * arch.moe_ffn_hidden_size * arch.experts_per_token
    )
    # 2 per weight and token forward, 4 backward.
    return 6.0 * weights


def repeated_flops(arch: Architecture, settings: TrainSection, sequence_len: float) -> float:
    """Return the operations of one token that a step does a second time.

    The logits are always computed twice, because lopd.megatron.model.logprobs keeps none of them.
    (For a dense model they are in the utilisation, which is that of a whole published stage.) Full
    recompute repeats the forward pass of every layer, and selective recompute that of the experts
    or the MLP.
    """
    if settings.recompute == "full":
        return training_flops(arch, [round(sequence_len)]) / 3 / sequence_len
    head = 2.0 * arch.hidden_size * arch.vocab_size if arch.num_experts else 0.0
    if settings.recompute != "selective":
        return head
    if arch.num_experts:
        width = arch.moe_ffn_hidden_size * arch.experts_per_token
    else:
        width = arch.ffn_hidden_size
    # The router is repeated with the experts. A dense model has none, and the term is 0.
    weights = 3 * arch.hidden_size * width + arch.hidden_size * arch.num_experts
    return head + 2.0 * arch.num_layers * weights


def exchanged_bytes(arch: Architecture, settings: TrainSection, assumed: Assumptions) -> float:
    """Return the bytes that come into a GPU for each token of its own, for a model with experts.

    With sequence parallelism, tensor ranks gather the input of attention and scatter its output.
    The backward pass does the same, and gathers the input once more for the weight's gradient.
    Megatron-Core's alltoall dispatcher sends one copy of a token for each chosen expert. What is
    recomputed is exchanged again.
    """
    parallel = settings.parallel
    is_full = settings.recompute == "full"
    recomputes_experts = settings.recompute in ("full", "selective")
    # A gather over n ranks brings n - 1 times the rank's own tokens.
    tensor = (FORWARD + BACKWARD + AGAIN * (is_full + assumed.extra_forward_passes)) * (
        parallel.tensor - 1
    )
    # One of so many chosen experts is on the token's own rank, if routing is even.
    sent_away = arch.experts_per_token * (1 - 1 / parallel.expert)
    rounds = EXPERT_EXCHANGES + EXPERT_AGAIN * (recomputes_experts + assumed.extra_forward_passes)
    experts = rounds * sent_away * assumed.expert_slowdown
    return arch.num_layers * arch.hidden_size * ACTIVATION_BYTES * (tensor + experts)


def optimizer_seconds(
    settings: TrainSection, node: Node, assumed: Assumptions, parameters: int
) -> float:
    """Return the seconds of an optimizer that is offloaded to the CPU.

    On a GPU the update takes next to nothing, so it counts as 0.

    Args:
        settings: The settings of the training.
        node: The machine.
        assumed: Rates of the CPU and of the link to the GPU.
        parameters: The trained parameters of the whole model.
    """
    table = settings.megatron
    if not table.get("optimizer_cpu_offload"):
        return 0.0
    # Every machine updates the weights of its own ranks, at the same time as the others.
    ranks_here = settings.parallel.ranks / settings.parallel.nodes
    fraction = float(table.get("optimizer_offload_fraction", 0.0))
    # Weights whose optimizer state is on this machine.
    weights_here = parameters * fraction / settings.parallel.nodes
    if settings.threads_per_rank is not None:
        threads = ranks_here * settings.threads_per_rank
    else:
        # Without the knob the ranks of a machine share its cores.
        threads = max(ranks_here, assumed.node_cores)
    # More threads help until they ask for more than the memory carries.
    rate = min(threads * assumed.cpu_adam_rate, assumed.host_bandwidth / UPDATE_BYTES)
    update = weights_here / rate
    # Every GPU has a link of its own.
    copies = weights_here / ranks_here * (GRADIENT_BYTES + WEIGHT_BYTES) / assumed.host_link
    # A field of Megatron-Core: copies run while other weights are updated. lopd turns it on.
    overlaps = table.get("overlap_cpu_optimizer_d2h_h2d", True)
    return max(update, copies) if overlaps else update + copies
