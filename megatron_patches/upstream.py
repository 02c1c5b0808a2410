"""Faults of Megatron-Core itself, on every device."""

from __future__ import annotations

from typing import Any

from megatron_patches.registry import patch, replace, require

_CHECKED = "megatron-core 0.16.1 and 0.18.2"


@patch(
    upstream="megatron/core/transformer/moe/moe_utils.py:RouterGatingLinearFunction.forward",
    checked=f"{_CHECKED} (the fault is in 0.14.0 and 0.15.3 too)",
    until="te_general_gemm is defined where Transformer Engine is absent",
    without_cuda=False,
)
def name_of_te_gemm() -> None:
    """The router's product tests `te_general_gemm is not None`, but that name is only defined by a
    successful import of Transformer Engine. Without it the router raises NameError. The name
    becomes None, as the test expects.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils

    require(moe_utils, "router_gating_linear", parameters=("inp", "weight", "bias", "router_dtype"))
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@patch(
    upstream="megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.load_state_dict",
    checked=_CHECKED,
    until="upstream gives every parameter its own step tensor (as its branch for HybridDeviceOptimizer does)",
    without_cuda=False,
)
def own_step_tensors() -> None:
    """torch's AdamW (used without Apex and Transformer Engine) counts steps in one tensor per
    parameter. Loading puts the SAME tensor into every parameter's state, so one optimizer step
    counts as many as there are parameters: training goes on, silently wrong. Each gets its own
    copy.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = require(
        DistributedOptimizer,
        "load_state_dict",
        parameters=("self", "state_dict"),
        source='s["step"] = step',
    )

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            if hasattr(state.get("step"), "clone"):
                state["step"] = state["step"].clone()

    replace(DistributedOptimizer, "load_state_dict", load_state_dict)


@patch(
    upstream="megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer._set_main_param_and_optimizer_states",
    checked=_CHECKED,
    until="the copy skips 'step' like the writers do",
    without_cuda=False,
)
def step_is_not_in_shards() -> None:
    """Writers leave AdamW's step out of the sharded state (it is kept once, per parameter group),
    the reader copies every key of the state and raises KeyError: 'step'. The reader is given the
    step it already has.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = require(
        DistributedOptimizer,
        "_set_main_param_and_optimizer_states",
        parameters=("self", "model_param", "tensors"),
        source="dst_tensors[key].copy_(tensors[key])",
    )

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[
            self.optimizer.param_groups[group_index]["params"][group_order]
        ]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)
