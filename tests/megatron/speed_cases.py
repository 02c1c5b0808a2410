"""Ranks of the tests of what only makes a training faster: each way of running a step must come to
the same figures.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lopd.config import ParallelSection
from lopd.megatron.model.fusions import fuse_weight_gradients
from lopd.megatron.ranks import parallel
from lopd.megatron.training.wrapping import ddp_config
from tests.megatron.trainer_cases import settings_of, train, trainer_of

LAYOUT = {"tensor": 2, "expert": 4, "expert_tensor": 1}  # two data ranks for all but the experts
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 20_000}
SELECTIVE = {"recompute_modules": ["moe"]}


def four_ranks(model: str) -> dict[str, Any]:
    """The plain steps; gradients exchanged while the backward pass goes on; experts computed again;
    both; and a control.
    """
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "overlap": {"megatron": OVERLAP},
        "selective": {"recompute": "selective", "megatron": SELECTIVE},
        "both": {"recompute": "selective", "megatron": {**OVERLAP, **SELECTIVE}},
    }
    result: dict[str, Any] = {
        name: train(trainer_of(model, settings_of(LAYOUT, **way))) for name, way in ways.items()
    }
    result["control"] = train(
        _without_the_exchange(trainer_of(model, settings_of(LAYOUT, megatron=OVERLAP)))
    )
    return result


def _without_the_exchange(trainer: Any) -> Any:
    """Gradients of dense weights that are started on their way and never summed over the data
    ranks.
    """
    for group in trainer.model.bucket_groups:
        group.start_grad_sync = lambda *arguments, **named: None
        group.finish_grad_sync = lambda *arguments, **named: None
    return trainer


class _Product(torch.autograd.Function):
    """As Transformer Engine's linear layers do it where fuse_wgrad_accumulation is set: the
    weight's gradient goes into main_grad in the product itself, and what autograd is given instead
    is worth nothing.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.layer = layer
        return inputs @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        inputs, weight = ctx.saved_tensors
        own = gradients[0].t() @ inputs
        layer = ctx.layer
        if layer.fuse_wgrad_accumulation:
            layer.weight.main_grad.add_(own)
            layer.weight.grad_added_to_main_grad = layer.says_so
            own = torch.full_like(own, 7.0)
        return gradients[0] @ weight, own, None


class _Linear(torch.nn.Linear):
    fuse_wgrad_accumulation = False
    says_so = True

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs, self.weight, self)
        return product


def fused_gradients() -> dict[str, list[float]]:
    """A weight's gradient over three microbatches in Megatron's DistributedDataParallel: by
    autograd, fused, and fused by a layer that does not say so.
    """
    parallel.initialize(ParallelSection(), seed=1, timeout_s=500)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    found = {}
    for name in ("plain", "fused", "silent"):
        torch.manual_seed(3)
        layer = _Linear(8, 8, bias=False)
        layer.says_so = name != "silent"
        if name != "plain":
            assert fuse_weight_gradients(torch.nn.Sequential(layer)) == 1
        model = DistributedDataParallel(config, ddp_config(True, {}), torch.nn.Sequential(layer))
        model.zero_grad_buffer()
        for _ in range(3):
            model(torch.randn(4, 8)).square().sum().backward()
        model.finish_grad_sync()
        weight: Any = layer.weight
        found[name] = weight.main_grad.flatten().tolist()
    parallel.shutdown()
    return found
