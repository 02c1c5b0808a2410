"""How many floating-point operations a model needs for given sequences, and how many a GPU could
do: together the model FLOPs utilisation. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable

from lopd.megatron.weights.architecture import Architecture

# Dense bfloat16 peaks in FLOP/s, without sparsity, from NVIDIA's data sheets. The first name that
# the device's name contains counts, so longer ones come first.
_PEAKS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200 NVL": 835e12, "H200": 989.4e12, "GH200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12,
    "H800": 989.4e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362.1e12, "L40": 181.1e12, "RTX 4090": 165.2e12, "A6000": 154.8e12, "A10": 125e12,
}  # fmt: skip


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a GPU (as torch.cuda.get_device_name calls it) in this dtype; None for one
    that is not in the table, and for float32.
    """
    if dtype != "bfloat16":
        return None
    return next(
        (peak for name, peak in _PEAKS.items() if name.lower() in device_name.lower()), None
    )


def training_flops(arch: Architecture, lengths: Iterable[int]) -> float:
    """Operations of one forward and one backward pass over sequences of these lengths, a
    multiply-add counted as two.

    The count of Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways" (arXiv
    2204.02311), appendix B: 6 per token and weight of a matrix product (2 forward, 4 backward) and
    12 per layer, head dimension and pair of tokens for attention's two products. Two things differ
    here: attention is causal, so half of the pairs count, those of one sequence only; and of the
    experts only the chosen ones count. The embedding is a lookup and counts nothing, the LM head
    counts, and activations computed a second time (recompute) do not: a utilisation of the model,
    not of the hardware.
    """
    num_tokens, num_pairs = 0, 0
    for length in lengths:
        num_tokens += length
        num_pairs += length * length
    attention = 12 * arch.num_layers * arch.num_heads * arch.head_dim * num_pairs / 2
    return 6.0 * active_matrix_weights(arch) * num_tokens + attention


def active_matrix_weights(arch: Architecture) -> int:
    """Weights that multiply each token: projections, the chosen experts or the MLP, routers, LM
    head.
    """
    hidden = arch.hidden_size
    projections = (
        hidden * arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads)
    )  # query and output, key and value
    if arch.num_experts:
        feed_forward = (
            3 * hidden * arch.moe_ffn_hidden_size * arch.experts_per_token
            + hidden * arch.num_experts
        )
    else:
        feed_forward = 3 * hidden * arch.ffn_hidden_size
    return arch.num_layers * (projections + feed_forward) + hidden * arch.vocab_size
