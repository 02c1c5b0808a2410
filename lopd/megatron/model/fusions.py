"""Which of Megatron-Core's fused kernels a model of Transformer Engine's layers gets. The local
layers, which run anywhere, get none.

Read in megatron-core 0.16.1 and 0.18.2 and Transformer Engine 2.16.1; no GPU was at hand, so
nothing of it has been run on one.

| field | what it fuses | what it needs |
|---|---|---|
| bias_activation_fusion | SiLU, the product of the halves, and the experts' probabilities | torch.compile; it also keeps half of the bytes |
| apply_rope_fusion | the rotation of queries and keys, for packed sequences | Transformer Engine 1.4; no YaRN: the kernel drops its factor |
| moe_permute_fusion | sorting tokens by expert, and back | Transformer Engine 2.1 |
| moe_router_fusion | softmax, the choice of experts, the balancing loss | Transformer Engine 2.7 |
| gradient_accumulation_fusion | a weight's gradient goes into the float32 buffer at once | see fuse_weight_gradients |
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils

from lopd.megatron.weights.architecture import Architecture

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
    """Fields of TransformerConfig for Transformer Engine's layers: what the installed version has
    kernels for.

    An older version without one of them does not fuse it; Megatron-Core would refuse the field.
    """
    rotation = getattr(rope_utils, "fused_apply_rotary_pos_emb_thd", None)
    fusions = {
        "bias_activation_fusion": True,
        "apply_rope_fusion": rotation is not None and arch.yarn is None,
    }
    if arch.num_experts:
        fusions["moe_permute_fusion"] = all(
            getattr(moe_utils, name, None) is not None for name in _PERMUTATIONS
        )
        fusions["moe_router_fusion"] = all(
            getattr(moe_utils, name, None) is not None for name in _ROUTING
        )
    return fusions


def fuse_weight_gradients(model: Any) -> int:
    """Has Transformer Engine's linear layers add a weight's gradient to its main_grad in the
    product itself; gives their number.

    Megatron-Core's field gradient_accumulation_fusion says the same to them, but is not set: its
    own ColumnParallelLinear, which is the output layer here too, then asks for apex, although
    nobody calls it (LogprobModel multiplies by its weight itself). Transformer Engine needs no
    apex. Megatron's DistributedDataParallel sees the mark grad_added_to_main_grad and adds nothing
    twice.
    """
    layers = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for layer in layers:
        layer.fuse_wgrad_accumulation = True
    return len(layers)
