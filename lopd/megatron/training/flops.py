"""How many floating-point operations a model needs, and how many a GPU can do.

The two together give the model FLOPs utilisation. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable

from lopd.megatron.weights.architecture import Architecture

# Dense bfloat16 peaks in FLOP/s, without sparsity, from NVIDIA's data sheets. The first name that
# the device's name contains counts, so a longer name stands before a shorter one.
_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 835e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362.1e12,
    "L40": 181.1e12,
    "RTX 4090": 165.2e12,
    "A6000": 154.8e12,
    "A10": 125e12,
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a GPU.

    Args:
        device_name: The name that torch.cuda.get_device_name gives.
        dtype: The dtype of the weights, as a knob names it.

    Returns:
        None for a GPU that is not in the table, and for float32.
    """
    # float32 products may or may not use TF32, so they have no single peak.
    if dtype != "bfloat16":
        return None
    # Names contain more than the model, for example "NVIDIA H100 80GB HBM3".
    name = device_name.lower()
    return next((peak for known, peak in _PEAKS.items() if known.lower() in name), None)


def training_flops(arch: Architecture, lengths: Iterable[int], *, frozen: bool = False) -> float:
    """Return the operations of one forward and one backward pass over sequences.

    The source is Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (arXiv
    2204.02311), appendix B: 6 operations per token and weight of a matrix product (2 forward, 4
    backward), and 12 per layer, head dimension and pair of tokens for the two products of
    attention. A multiply-add counts as two.

    Two things differ here. Attention is causal and within one sequence, so half of the pairs count.
    Of the experts only the chosen ones count.

    The LM head counts. The embedding is a lookup and counts nothing. Activations that recompute
    makes a second time do not count: the result is a utilisation of the model, not of the hardware.

    Args:
        arch: The model.
        lengths: The number of tokens of each sequence.
        frozen: Whether the weights take no gradient (LoRA), so that one of the two products of the
            backward pass falls away. The adapters' own thin products do not count.
    """
    # Tokens and pairs are added up apart: products with weights grow with the tokens, and attention
    # with the pairs.
    num_tokens = 0
    num_pairs = 0
    for length in lengths:
        num_tokens += length
        num_pairs += length * length
    # Half of the pairs of a sequence: a token attends to those before it.
    attention = 12 * arch.num_layers * arch.num_heads * arch.head_dim * num_pairs / 2
    per_weight = 4.0 if frozen else 6.0
    return per_weight * active_matrix_weights(arch) * num_tokens + attention


def active_matrix_weights(arch: Architecture) -> int:
    """Return the number of weights that multiply each token.

    They are those of projections, the chosen experts or the MLP, routers, and the LM head.
    """
    hidden = arch.hidden_size
    # Query and output have all heads, key and value only the key-value heads.
    num_heads = 2 * arch.num_heads + 2 * arch.num_kv_heads
    projections = hidden * arch.head_dim * num_heads
    # An MLP has three matrices: gate, up and down.
    if arch.num_experts:
        experts = 3 * hidden * arch.moe_ffn_hidden_size * arch.experts_per_token
        router = hidden * arch.num_experts
        feed_forward = experts + router
    else:
        feed_forward = 3 * hidden * arch.ffn_hidden_size
    lm_head = hidden * arch.vocab_size
    return arch.num_layers * (projections + feed_forward) + lm_head
