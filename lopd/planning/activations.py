"""Bytes of activations that a layer keeps for its backward pass.

All numbers are per token of a microbatch and per rank. They are counted on the modules that run
here, tensor by tensor. tests/planning/test_measured.py compares the count of the local layers with
what autograd really saves. With sequence parallelism everything but the rotary tables is divided
among the tensor ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from lopd.megatron.weights.architecture import Architecture

# The layer whose backward pass runs needs this share more than what it keeps, for the gradients of
# its activations.
BACKWARD_SHARE = 0.5
# Bytes per token and expert: the logit, the probability, and the mark whether the expert is chosen,
# with their copies on the way.
ROUTER_BYTES = 11
# Bytes per token and expert: two numbers of 32 bits. Transformer Engine's fused permutation notes
# with them where it puts the token.
PERMUTATION_BYTES = 8


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes per token and rank.

    Attributes:
        attention: Norms and attention.
        feed_forward: The MLP, or the router of a layer with experts.
        experts: The part that grows with the number of tokens that an expert rank receives.
        boundary: The input of the layer alone.
    """

    attention: float
    feed_forward: float
    experts: float
    boundary: float

    def kept(self, imbalance: float) -> float:
        """Return what is kept without recompute.

        Args:
            imbalance: Tokens of the busiest expert rank over the mean.
        """
        return self.attention + self.recomputed(imbalance)

    def recomputed(self, imbalance: float) -> float:
        """Return what selective recompute does not keep with Transformer Engine's layers.

        lopd.megatron.model.transformer_config.selective_modules names these modules.
        """
        return self.feed_forward + self.experts * imbalance


def layer_activations(
    arch: Architecture, *, tensor: int, size: int, engine: bool
) -> LayerActivations:
    """Return the bytes that one layer keeps.

    Args:
        arch: The shape of the model.
        tensor: Number of tensor ranks.
        size: Bytes of a number: 2 for bfloat16, 4 for float32.
        engine: Whether Transformer Engine's norms and fused kernels run. Without it torch's norms
            keep float32 copies of bfloat16 inputs, and ours in float32 keep one tensor fewer.
    """
    # Terms are summed over all tensor ranks first, and divided by their number at the end.
    attention = _attention_bytes(arch, size=size, engine=engine)
    # The tables of sines and cosines are the same on every tensor rank.
    rotary = size * 4 * arch.head_dim
    feed_forward = 0.0
    experts = 0.0
    # `parts` counts tensors of the MLP's width. The local layers keep both halves of the first
    # product, the SiLU, and its product with the other half. Experts keep one more, the product
    # with the probability. The fused kernel keeps both halves and the product.
    if arch.num_experts:
        parts = 3 if engine else 6
        permuted_input = arch.hidden_size
        experts = (
            size * arch.experts_per_token * (permuted_input + parts * arch.moe_ffn_hidden_size)
        )
        # The router looks at all experts, not at the chosen ones only.
        per_expert = ROUTER_BYTES + (PERMUTATION_BYTES if engine else 0)
        feed_forward = float(per_expert * arch.num_experts)
    else:
        parts = 3 if engine else 5
        feed_forward = float(size * parts * arch.ffn_hidden_size)
    return LayerActivations(
        attention / tensor + rotary,
        feed_forward / tensor,
        experts / tensor,
        boundary=size * arch.hidden_size / tensor,
    )


def _attention_bytes(arch: Architecture, *, size: int, engine: bool) -> float:
    """Return what norms and attention keep of a token, over all tensor ranks together."""
    hidden = arch.hidden_size
    queries = arch.num_heads * arch.head_dim
    # Grouped-query attention: keys and values have fewer heads than queries.
    keys = arch.num_kv_heads * arch.head_dim
    # Each of the two norms keeps its input and its output; in float32 on a CPU it keeps the
    # normalised input in place of the input (megatron_patches/norm.py). torch's norm of bfloat16
    # keeps both of these, in float32.
    norm = 2 * size if engine or size == 4 else 2 * 4 + size
    kept: float = 2 * hidden * norm
    # The output of the first projection: queries, keys and values.
    kept += size * (queries + 2 * keys)
    if arch.qk_norm:
        # The norms of queries and keys, with the float32 copies of torch's norm.
        kept += size * queries if engine or size == 4 else 4 * (queries + keys)
        kept += 0 if engine or size == 4 else 4 * (queries + keys)
    rotated = queries + keys
    attended = queries
    return kept + size * (rotated + attended)
