"""Which of Megatron-Core's fused kernels a model of Transformer Engine's layers gets.

The local layers run anywhere and get none. What follows was read in megatron-core 0.16.1 and 0.18.2
and in Transformer Engine 2.16.1. Nothing of it has run on a GPU.

bias_activation_fusion: SiLU, the product of the two halves, and the experts' probabilities. It
    needs torch.compile. It also keeps half of the bytes for the backward pass.
apply_rope_fusion: the rotation of queries and keys, for packed sequences. It needs Transformer
    Engine 1.4. It is not used with YaRN, because the kernel drops YaRN's factor.
moe_permute_fusion: sorting tokens by expert, and back. It needs Transformer Engine 2.1.
moe_router_fusion: softmax, the choice of experts, and the balancing loss. It needs Transformer
    Engine 2.7.
gradient_accumulation_fusion: a weight's gradient is added to the float32 buffer at once. See
    fuse_weight_gradients.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils

from lopd.megatron.weights.architecture import Architecture

# Names that Megatron-Core imports from Transformer Engine, and sets to None where they are missing.
_PERMUTATIONS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)
_ROUTING = (
    "fused_topk_with_score_function",
    "fused_compute_score_for_moe_aux_loss",
    "fused_moe_aux_loss",
)


def engine_fusions(arch: Architecture) -> dict[str, bool]:
    """Return the fusions that the installed version has, as fields of TransformerConfig."""
    # Megatron-Core refuses a field whose kernel is missing. So an older Transformer Engine fuses
    # less, and the training still runs.
    # The name is missing, or None, where Transformer Engine is too old.
    rotation = getattr(rope_utils, "fused_apply_rotary_pos_emb_thd", None)
    fusions = {
        "bias_activation_fusion": True,
        "apply_rope_fusion": rotation is not None and arch.yarn is None,
    }
    if arch.num_experts:
        fusions["moe_permute_fusion"] = _has_all(_PERMUTATIONS)
        fusions["moe_router_fusion"] = _has_all(_ROUTING)
    return fusions


def _has_all(names: tuple[str, ...]) -> bool:
    return all(getattr(moe_utils, name, None) is not None for name in names)


def fuse_weight_gradients(model: Any) -> int:
    """Let Transformer Engine's linear layers add a weight's gradient to its main_grad themselves.

    The product of the backward pass then adds to the float32 buffer, without a tensor in between.

    Returns:
        The number of layers that do so.
    """
    # Megatron-Core's field gradient_accumulation_fusion would tell them the same. It is not set,
    # because Megatron's own ColumnParallelLinear then asks for apex. The output layer is one here
    # too, although nobody calls it: LogprobModel multiplies by its weight itself. Transformer
    # Engine needs no apex.
    # Megatron's DistributedDataParallel sees the mark grad_added_to_main_grad on the parameters, so
    # it does not add a gradient twice.
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)
