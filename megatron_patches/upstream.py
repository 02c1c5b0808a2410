"""Faults of Megatron-Core itself, on every device."""

from __future__ import annotations

from typing import Any

from megatron_patches.registry import patch, replace, require

# The versions with which the tests of these patches have run.
_CHECKED = "megatron-core 0.16.1 and 0.18.2"
_OPTIMIZER = "megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer"


@patch(
    upstream="megatron/core/transformer/moe/moe_utils.py:RouterGatingLinearFunction.forward",
    checked=f"{_CHECKED} (the fault is in 0.14.0 and 0.15.3 too)",
    until="te_general_gemm is defined where Transformer Engine is absent",
    without_cuda=False,
)
def name_of_te_gemm() -> None:
    """The product of the router tests `te_general_gemm is not None`, but only a successful import
    of Transformer Engine defines that name. Without it the router raises NameError. The name is
    now None, as the test expects.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils

    # The function that uses the name. If it has changed, the fault may be gone.
    require(moe_utils, "router_gating_linear", parameters=("inp", "weight", "bias", "router_dtype"))
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@patch(
    upstream=f"{_OPTIMIZER}.load_state_dict",
    checked=_CHECKED,
    until="upstream gives every parameter its own step tensor"
    " (as its branch for HybridDeviceOptimizer does)",
    without_cuda=False,
)
def own_step_tensors() -> None:
    """Without Apex and Transformer Engine the optimizer is torch's AdamW, which counts steps in one
    tensor for each parameter. Loading puts the SAME tensor into the state of every parameter. Then
    one optimizer step counts as many steps as there are parameters. The training continues, and it
    is wrong without a message. Each parameter now gets its own copy.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # `source` is the line that shares the tensor. If it is gone, the fault may be gone too.
    original = require(
        DistributedOptimizer,
        "load_state_dict",
        parameters=("self", "state_dict"),
        source='s["step"] = step',
    )

    def load_state_dict(self: Any, state_dict: Any) -> None:
        # First upstream loads, then the shared tensor is replaced.
        original(self, state_dict)
        for state in self.optimizer.state.values():
            # Other optimizers count steps in a number, or in no place of the state.
            if hasattr(state.get("step"), "clone"):
                state["step"] = state["step"].clone()

    replace(DistributedOptimizer, "load_state_dict", load_state_dict)


@patch(
    upstream=f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
    checked=_CHECKED,
    until="the copy skips 'step' like the writers do",
    without_cuda=False,
)
def step_is_not_in_shards() -> None:
    """The writers leave AdamW's step out of the sharded state, because it is kept once for each
    parameter group. The reader copies every key of the state and raises KeyError: 'step'. The
    reader is now given the step that it already has, so it copies that onto itself.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = require(
        DistributedOptimizer,
        "_set_main_param_and_optimizer_states",
        parameters=("self", "model_param", "tensors"),
        source="dst_tensors[key].copy_(tensors[key])",
    )

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # The optimizer's parameter is the part of model_param that this rank holds.
        group_index, group_order = self.model_param_group_index_map[model_param]
        own_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[own_param]
        # Nothing changes if a later version does store the step.
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        original(self, model_param, tensors)

    replace(DistributedOptimizer, "_set_main_param_and_optimizer_states", set_states)
