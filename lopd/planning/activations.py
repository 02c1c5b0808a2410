"""Bytes of activations that a layer keeps for its backward pass, per token of a microbatch and per
rank.

Counted on the modules that run here, tensor by tensor (tests/planning/test_measured.py holds the
count of the local layers to what autograd really saves). With sequence parallelism everything but
the rotary tables is split over the tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopd.megatron.weights.architecture import Architecture

# gradients of a layer's activations, over what it keeps: the layer whose backward pass runs needs
# so much more
WORK_SHARE = 0.5
ROUTER_BYTES = 11  # per token and expert: logits, probabilities, chosen or not
# per token and expert: where Transformer Engine's fused permutation puts it (two numbers of 32
# bits)
PERMUTATION_BYTES = 8


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes per token and rank. attention: norms and attention. feed_forward: the MLP or the
    router. experts: the part that grows with the tokens an expert rank is given. boundary: the
    layer's input alone.
    """

    attention: float
    feed_forward: float
    experts: float
    boundary: float

    def kept(self, imbalance: float) -> float:
        """Without recompute. imbalance: tokens of the busiest expert rank over the mean."""
        return self.attention + self.recomputed(imbalance)

    def recomputed(self, imbalance: float) -> float:
        """What selective recompute of Transformer Engine's layers does not keep
        (lopd.megatron.model.transformer_config.selective_modules).
        """
        return self.feed_forward + self.experts * imbalance


def layer_activations(
    arch: Architecture, *, tensor: int, size: int, engine: bool
) -> LayerActivations:
    """size: bytes of a number (2 or 4). engine: Transformer Engine's norms (torch's keep float32
    copies of bfloat16 inputs) and fused kernels.
    """
    hidden, queries, keys = (
        arch.hidden_size,
        arch.num_heads * arch.head_dim,
        arch.num_kv_heads * arch.head_dim,
    )
    # two norms: input, (normalised input,) output. Of bfloat16 torch's norm keeps the first two in
    # float32.
    copies = 2 * size if engine else (3 * size if size == 4 else 2 * 4 + size)
    attention: float = 2 * hidden * copies
    attention += size * (queries + 2 * keys)  # what the first projection gives
    if arch.qk_norm:
        attention += (size * queries if engine or size == 4 else 4 * (queries + keys)) + (
            0 if engine else 4 * (queries + keys)
        )
    attention += (
        size * (queries + keys) + size * queries
    )  # rotated queries and keys; what attention gives
    rotary = size * 4 * arch.head_dim
    feed_forward, experts = 0.0, 0.0
    # Of an MLP: both halves, SiLU, its product with the other half (of experts once more with the
    # probability); fused, both halves and the product.
    if arch.num_experts:
        parts = 3 if engine else 6
        experts = (
            size * arch.experts_per_token * (hidden + parts * arch.moe_ffn_hidden_size)
        )  # the permuted input, and those
        feed_forward = float(
            (ROUTER_BYTES + (PERMUTATION_BYTES if engine else 0)) * arch.num_experts
        )
    else:
        feed_forward = size * (3.0 if engine else 5.0) * arch.ffn_hidden_size
    return LayerActivations(
        attention / tensor + rotary,
        feed_forward / tensor,
        experts / tensor,
        boundary=size * hidden / tensor,
    )
