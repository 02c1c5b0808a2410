"""The ``[sft.megatron]`` and ``[distill.megatron]`` tables: any field of Megatron-Core's
TransformerConfig, OptimizerConfig or DistributedDataParallelConfig that no knob of ours sets,
checked by name, type and, by building the three, by what Megatron-Core itself demands.

TOML has no torch.dtype, so dtypes are written by name ("float32", "bfloat16"). A name that several
of the three have goes to all of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.util
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pydantic
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from lopd.errors import ConfigError

Built = TypeVar("Built")
_KINDS = {
    "transformer": TransformerConfig,
    "optimizer": OptimizerConfig,
    "distributed": DistributedDataParallelConfig,
}
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8")}

_KNOBS = {  # field -> knob of the same section that sets it
    "tensor_model_parallel_size": "parallel.tensor", "sequence_parallel": "parallel.tensor", "pipeline_model_parallel_size": "parallel.pipeline",
    "context_parallel_size": "parallel.context", "expert_model_parallel_size": "parallel.expert", "expert_tensor_parallel_size": "parallel.expert_tensor",
    "use_distributed_optimizer": "parallel.distributed_optimizer", "lr": "optimizer.lr", "min_lr": "optimizer.min_lr", "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2", "adam_eps": "optimizer.eps", "weight_decay": "optimizer.weight_decay", "clip_grad": "optimizer.clip_grad",
    "decoupled_lr": "optimizer.lr", "decoupled_min_lr": "optimizer.min_lr", "params_dtype": "dtype", "pipeline_dtype": "dtype", "bf16": "dtype",
    "fp16": "dtype", "autocast_dtype": "dtype", "enable_autocast": "dtype", "recompute_granularity": "recompute", "moe_aux_loss_coeff": "moe_aux_loss",
    "moe_router_load_balancing_type": "moe_aux_loss", "init_method_std": "init_std", "embedding_init_method_std": "init_std",
}  # fmt: skip
_SHAPE = frozenset({  # what the model's config.json says
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size", "normalization", "layernorm_epsilon",
    "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func", "activation_func_clamp_value", "glu_linear_offset", "add_bias_linear",
    "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "rotary_interleaved", "window_size", "window_attn_skip_freq", "softmax_scale", "softmax_type",
    "multi_latent_attention", "experimental_attention_variant", "attention_output_gate", "no_rope_freq", "mrope_section", "mtp_num_layers",
    "apply_residual_connection_post_layernorm", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq", "moe_latent_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_pre_softmax", "moe_router_score_function", "moe_router_num_groups",
    "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "is_hybrid_model", "heterogeneous_block_specs",
})  # fmt: skip
_TRAINER = {  # field -> why the trainer does not let go of it
    "calculate_per_token_loss": "losses are sums, divided once by the global count",
    "average_in_collective": "losses are sums, divided once by the global count",
    "variable_seq_lengths": "packed microbatches differ in length",
    "perform_initialization": "initialising marks the parameters that tensor ranks share",
    "use_cpu_initialization": "it follows the device",
    "optimizer": "checkpoints hold the state of AdamW",
    "decoupled_weight_decay": "checkpoints hold the state of AdamW",
    "overlap_param_gather": "weights are read between steps, for checkpoints and weight syncs",
    "overlap_param_gather_with_optimizer_step": "weights are read between steps, for checkpoints and weight syncs",
    "virtual_pipeline_model_parallel_size": "a rank holds one piece of the model",
    "microbatch_group_size_per_vp_stage": "a rank holds one piece of the model",
    "use_megatron_fsdp": "weights are loaded and exported by Megatron's own layouts",
    "use_custom_fsdp": "weights are loaded and exported by Megatron's own layouts",
    "init_model_with_meta_device": "weights are loaded into the model as it stands",
    "num_distributed_optimizer_instances": "the process groups are made for one",
    "hybrid_context_parallel": "every sequence is cut over all context ranks",
    "max_seqlen_per_dp_cp_rank": "every sequence is cut over all context ranks",
    "hierarchical_context_parallel_sizes": "the process groups are made for one level of context ranks",
    "defer_embedding_wgrad_compute": "the output layer is part of the log-probabilities, which never hold its logits",
    "cross_entropy_loss_fusion": "log-probabilities are computed without logits, in float32",
    "cross_entropy_fusion_impl": "log-probabilities are computed without logits, in float32",
    "moe_token_dispatcher_type": "the alltoall dispatcher is the one that is tested in every layout",
}

_ENGINE = (
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "tp_comm_overlap",
    "fp8",
    "fp4",
)  # of Transformer Engine; elsewhere without effect


@dataclass(frozen=True, slots=True)
class Overrides:
    """Checked fields, by the configuration they belong to."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    distributed: Mapping[str, Any] = field(default_factory=dict)


def read_overrides(table: Mapping[str, Any], *, where: str = "megatron") -> Overrides:
    """A table's fields with their values as Megatron-Core takes them. where: its name, for
    messages.

    ConfigError: an unknown field (with the nearest), one that a knob sets (with the knob), a value
    of another type, or a feature this machine lacks.
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    for name, value in table.items():
        _refuse_taken(name, where)
        owners = [kind for kind, types_of in _field_types().items() if name in types_of]
        if not owners:
            known = sorted({name for types_of in _field_types().values() for name in types_of})
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown field {name}",
                where=where,
                limit="a field of " + _names(_KINDS.values()),
                remedy=f"the nearest is {nearest}",
            )
        for kind in owners:
            found[kind][name] = _value(name, value, _field_types()[kind][name], where)
    _refuse_missing_hardware(table, where)
    if table.get("cp_comm_type", "p2p") not in ("p2p", "a2a"):
        limit = "p2p or a2a for all layers: all_gather takes no packed sequences (Transformer Engine 2.16), a2a+p2p needs process groups of two levels"
        raise ConfigError(f"cp_comm_type = {table['cp_comm_type']!r}", where=where, limit=limit)
    return Overrides(**found)


def build(kind: type[Built], fields: Mapping[str, Any], *, where: str = "megatron") -> Built:
    """One of Megatron-Core's configurations. ConfigError, in Megatron-Core's words, where it
    refuses the fields.
    """
    try:
        return kind(**fields)
    except (AssertionError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        what = f"Megatron-Core's {kind.__name__} refuses these settings: {words}"
        raise ConfigError(what, where=where, remedy=f"change the fields of {where}") from error


def _names(kinds: Any) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


def _field_types() -> dict[str, dict[str, Any]]:
    """Every field of each configuration with its resolved type."""
    return {
        kind: {
            each.name: hints[each.name]
            for each in dataclasses.fields(cls)
            if each.init and not each.name.startswith("_")
        }
        for kind, cls in _KINDS.items()
        for hints in [typing.get_type_hints(cls)]
    }


def _refuse_taken(name: str, where: str) -> None:
    section = where.removesuffix("megatron")
    if name in _KNOBS:
        owner = f"sft.{_KNOBS[name]}" if _KNOBS[name] == "init_std" else section + _KNOBS[name]
        raise ConfigError(
            f"{name} is set by the knob {owner}", where=where, remedy=f"set {owner} instead"
        )
    if name in _SHAPE:
        raise ConfigError(
            f"{name} is set by the model's config.json", where=where, remedy="leave it out"
        )
    if name in _TRAINER:
        raise ConfigError(
            f"{name} is set by the trainer ({_TRAINER[name]})", where=where, remedy="leave it out"
        )


def _value(name: str, value: Any, hint: Any, where: str) -> Any:
    """The value checked against the type of its field; no type conversion but dtypes and
    enumerations by name, and lists for tuples.
    """
    options = [option for option in _members(hint) if option is not type(None)]
    if torch.dtype in options:
        if value not in _DTYPES:
            raise ConfigError(
                f"{name} = {value!r}", where=where, limit=f"one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[value]
    enums = [
        option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)
    ]
    for option in enums:
        if isinstance(value, str) and value in option.__members__:
            return option[value]
    written = [option for option in options if _can_be_written(option)]
    if not written and not enums:
        raise ConfigError(
            f"{name} takes {_spelled(hint)}, which TOML cannot write",
            where=where,
            remedy="leave it out",
        )
    misfit = ConfigError(f"{name} = {value!r} does not fit", where=where, limit=_spelled(hint))
    if not written:
        raise misfit
    allowed: Any = typing.Union[tuple(written)]  # noqa: UP007
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(
        allowed, config=pydantic.ConfigDict(strict=True)
    )
    try:
        return adapter.validate_json(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError):
        raise misfit from None


def _members(hint: Any) -> tuple[Any, ...]:
    """Of a union its members, else the type itself."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def _can_be_written(option: Any) -> bool:
    if option in (bool, int, float, str, list):
        return True
    origin = typing.get_origin(option)
    return origin is typing.Literal or (
        origin in (list, tuple) and all(_can_be_written(part) for part in typing.get_args(option))
    )


def _spelled(hint: Any) -> str:
    """A type as a reader of the manual would write it."""
    names = []
    for option in _members(hint):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            names.append("one of " + ", ".join(option.__members__))
        elif typing.get_origin(option) is typing.Literal:
            names.append("one of " + ", ".join(map(repr, typing.get_args(option))))
        elif option is not type(None):
            names.append(
                option.__name__
                if isinstance(option, type) and not typing.get_args(option)
                else str(option).replace("typing.", "")
            )
    return " or ".join(names)


def _refuse_missing_hardware(table: Mapping[str, Any], where: str) -> None:
    """Settings that Megatron-Core would accept here and then fail on, or refuse without saying what
    is missing.
    """
    if table.get("optimizer_cpu_offload") and not torch.cuda.is_available():
        raise ConfigError(
            "optimizer_cpu_offload needs CUDA: there is nothing to move away from",
            where=where,
            remedy="leave it out on a CPU",
        )
    engine = importlib.util.find_spec("transformer_engine") is not None
    if table.get("use_precision_aware_optimizer") and not (engine and torch.cuda.is_available()):
        missing = "CUDA" if engine else "Transformer Engine (its FusedAdam)"
        raise ConfigError(
            f"use_precision_aware_optimizer needs {missing}, which is not here",
            where=where,
            remedy="leave it out on this machine",
        )
    for name in _ENGINE:
        if table.get(name) and not (engine and torch.cuda.is_available()):
            raise ConfigError(
                f"{name} needs Transformer Engine and a GPU, which are not here",
                where=where,
                remedy="leave it out on this machine",
            )
    precise = [
        name
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        if table.get(name, "float32") != "float32"
    ]
    if precise and not table.get("use_precision_aware_optimizer"):
        what = f"{precise[0]} = {table[precise[0]]!r} without use_precision_aware_optimizer"
        raise ConfigError(
            what,
            where=where,
            remedy="set use_precision_aware_optimizer = true (needs Transformer Engine)",
        )
