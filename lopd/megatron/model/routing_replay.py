"""Routing replay (R3, arXiv 2510.11370): routers choose the experts that the sampler chose.

A router's choice is discrete. Where two experts are close to a tie, the sampler and the trainer
choose differently, because they round differently, and the log-probabilities of the same weights
and tokens then differ by far more than rounding. With replay the choice is the recorded one. The
weight of each chosen expert is computed from the present router, so the gradient flows through it.

Megatron-Core has the mechanism (moe_enable_routing_replay, the same in 0.16.1 and 0.18.2). Here is
which choice belongs to which router of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import get_model_config

from lopd.batching.context import ContextPart
from lopd.batching.microbatch import any_experts
from lopd.megatron.ranks import parallel
from lopd.records import Int16s, Microbatch


def forget_routers() -> None:
    """Let go of the routers that Megatron-Core keeps in a list of the process, of all models."""
    # We find the routers of a model in the model itself. The list would keep a model alive after
    # its end, and would mix two models of one process.
    RouterReplay.clear_global_router_replay_instances()


def set_routing(model: Any, microbatch: Microbatch, part: ContextPart) -> None:
    """Let the routers of this rank replay a microbatch, or choose themselves if it has no record.

    It holds until the next call: also for the routers that the backward pass runs again.

    Args:
        model: This rank's part of the model. Without moe_enable_routing_replay nothing happens.
        microbatch: What comes next.
        part: The part of it that this rank computes.
    """
    if not get_model_config(model).moe_enable_routing_replay:
        return
    routed = microbatch.routed_experts
    rows = None if routed is None else _own_rows(routed, part)
    for router in _routers(model):
        replay = router.router_replay
        # Megatron-Core also keeps every choice in a list for its own way of recomputing. Nothing
        # takes them out here, and the list would grow with each microbatch.
        replay.clear_indices()
        if rows is None:
            replay.clear_router_replay_action()
            continue
        # Numbers of layers begin at 1 and count over all pipeline stages.
        replay.set_target_indices(rows[:, router.layer_number - 1])
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def _routers(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, TopKRouter) and module.router_replay is not None:
            yield module


def _own_rows(routed: Int16s, part: ContextPart) -> torch.Tensor:
    """Return the experts of the positions that this rank routes, int64 [P, layers, k]."""
    # take() gives zeros where there is padding, and a router must choose distinct experts.
    rows = part.take(routed)
    padding = part.index == len(routed)
    rows[padding] = any_experts(int(padding.sum()), *routed.shape[1:])
    # With sequence parallelism the routers of a tensor rank see a part of the positions.
    own = np.split(rows, parallel.tensor_size())[parallel.tensor_rank()]
    return torch.as_tensor(own.astype(np.int64), device=parallel.device())
