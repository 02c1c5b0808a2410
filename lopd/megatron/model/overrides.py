"""The ``[sft.megatron]`` and ``[distill.megatron]`` tables of the configuration.

They may hold any field of Megatron-Core's TransformerConfig, OptimizerConfig or
DistributedDataParallelConfig that no knob of ours sets. A field is checked by its name and its
type. Then the three configurations are built, which checks what Megatron-Core itself demands.

TOML has no torch.dtype, so dtypes are written by name ("float32", "bfloat16"). A field that several
of the three configurations have goes to all of them.
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
from lopd.megatron.model.reserved_fields import KNOBS, MODEL_SHAPE, TRAINER

Built = TypeVar("Built")
# The three records of Megatron-Core that a [*.megatron] table can reach.
_CONFIGS = {
    "transformer": TransformerConfig,
    "optimizer": OptimizerConfig,
    "distributed": DistributedDataParallelConfig,
}
_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "uint8")}
# Fields that only Transformer Engine's layers read. Elsewhere they would have no effect.
_ENGINE = (
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "tp_comm_overlap",
    "fp8",
    "fp4",
)
# Fields that only a precision-aware optimizer reads.
_STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


@dataclass(frozen=True, slots=True)
class Overrides:
    """The checked fields, by the configuration that they belong to."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    distributed: Mapping[str, Any] = field(default_factory=dict)


def read_overrides(table: Mapping[str, Any], *, where: str = "megatron") -> Overrides:
    """Return the fields of a table, with values in the form that Megatron-Core takes.

    Args:
        table: The table as TOML gives it.
        where: The name of the table, for the messages.

    Raises:
        ConfigError: A field is unknown (the message has the nearest one), is set by a knob (the
            message has the knob), has a value of another type, or needs what this machine lacks.
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in _CONFIGS}
    field_types = _field_types()
    for name, value in table.items():
        # First, so that the message names the knob and not a type.
        _refuse_reserved(name, where)
        owners = [kind for kind, types_of in field_types.items() if name in types_of]
        if not owners:
            known = sorted({known for types_of in field_types.values() for known in types_of})
            # A cutoff of 0 always finds one.
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown field {name}",
                where=where,
                limit="a field of " + " or ".join(config.__name__ for config in _CONFIGS.values()),
                remedy=f"the nearest known field is {nearest}",
            )
        # A name that several have must have one value in all of them.
        for kind in owners:
            found[kind][name] = _value(name, value, field_types[kind][name], where)
    _refuse_missing_hardware(table, where)
    # Megatron-Core takes more ways of exchange than packed sequences do.
    if table.get("cp_comm_type", "p2p") not in ("p2p", "a2a"):
        raise ConfigError(
            f"cp_comm_type = {table['cp_comm_type']!r} is not supported: all_gather "
            "accepts no packed sequences (Transformer Engine 2.16), and a2a+p2p needs "
            "process groups of two levels",
            where=where,
            limit="exactly p2p or a2a for all layers",
            remedy="set cp_comm_type to p2p or a2a",
        )
    return Overrides(**found)


def build(kind: type[Built], fields: Mapping[str, Any], *, where: str = "megatron") -> Built:
    """Return one of Megatron-Core's configurations with these fields.

    Raises:
        ConfigError: Megatron-Core refuses the fields. The message has its words.
    """
    try:
        return kind(**fields)
    # Megatron-Core has no error of its own for this. These are the types that its checks raise.
    except (AssertionError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        what = f"Megatron-Core's {kind.__name__} refuses these settings: {words}"
        raise ConfigError(what, where=where, remedy=f"change the fields of {where}") from error


def _field_types() -> dict[str, dict[str, Any]]:
    """Return every field of each configuration with its type."""
    found: dict[str, dict[str, Any]] = {}
    for kind, config in _CONFIGS.items():
        # The annotations are text in the source. This resolves them.
        hints = typing.get_type_hints(config)
        found[kind] = {
            each.name: hints[each.name]
            for each in dataclasses.fields(config)
            # Fields that Megatron-Core computes itself cannot be given.
            if each.init and not each.name.startswith("_")
        }
    return found


def _refuse_reserved(name: str, where: str) -> None:
    """Refuse a field that something else sets, and say what."""
    if name in KNOBS:
        # The table sft.megatron speaks of knobs of the section sft. Only SFT has init_std.
        section = where.removesuffix("megatron")
        knob = f"sft.{KNOBS[name]}" if KNOBS[name] == "init_std" else section + KNOBS[name]
        raise ConfigError(
            f"{name} is set by the knob {knob}",
            where=where,
            remedy=f"set {knob} instead",
        )
    # A field that decides the model's shape or the update has one owner. With two, one of them
    # would lose in silence.
    setter = None
    if name in MODEL_SHAPE:
        setter = "the model's config.json"
    elif name in TRAINER:
        setter = f"the trainer ({TRAINER[name]})"
    if setter is not None:
        raise ConfigError(f"{name} is set by {setter}", where=where, remedy="remove this field")


def _value(name: str, value: Any, hint: Any, where: str) -> Any:
    """Return a value in the form that Megatron-Core takes, checked against the type of its field.

    Dtypes and enumerations are read by name, and lists are read as tuples. Nothing else is
    converted.
    """
    options = [option for option in _members(hint) if option is not type(None)]
    # A dtype cannot be written in TOML, so a field that takes one is written by name.
    if torch.dtype in options:
        if value not in _DTYPES:
            limit = f"one of {', '.join(_DTYPES)}"
            raise ConfigError(
                f"{name} = {value!r} is not a dtype",
                where=where,
                limit=limit,
                remedy="write one of these names",
            )
        return _DTYPES[value]
    enums = [
        option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)
    ]
    # An enumeration is written by the name of a member.
    for option in enums:
        if isinstance(value, str) and value in option.__members__:
            return option[value]
    # What is left are types that TOML has. A field of functions, for example, has none.
    written = [option for option in options if _can_be_written(option)]
    if not written and not enums:
        raise ConfigError(
            f"{name} needs {_type_text(hint)}, which TOML cannot write",
            where=where,
            remedy="remove this field",
        )
    misfit = ConfigError(
        f"{name} = {value!r} has a wrong type",
        where=where,
        limit=_type_text(hint),
        remedy="write a value of this type, or remove the field",
    )
    if not written:
        raise misfit
    # Strict: pydantic would otherwise read "1" as a number and 1 as true. JSON, because only there
    # a list counts as a tuple in strict mode.
    allowed: Any = typing.Union[tuple(written)]  # noqa: UP007
    strict = pydantic.ConfigDict(strict=True)
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(allowed, config=strict)
    try:
        return adapter.validate_json(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError):
        # pydantic's message would speak of its own types.
        raise misfit from None


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, else the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _can_be_written(option: Any) -> bool:
    """Return whether TOML can write a value of this type."""
    if option in (bool, int, float, str, list):
        return True
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        return True
    return origin in (list, tuple) and all(map(_can_be_written, typing.get_args(option)))


def _type_text(hint: Any) -> str:
    """Return a type in the form that a manual would have it."""
    return " or ".join(
        _option_text(option) for option in _members(hint) if option is not type(None)
    )


def _option_text(option: Any) -> str:
    if isinstance(option, type) and issubclass(option, enum.Enum):
        return "one of " + ", ".join(option.__members__)
    if typing.get_origin(option) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(option)))
    # str(int) would be "<class 'int'>", and the name of list[int] would be "list".
    if isinstance(option, type) and not typing.get_args(option):
        return option.__name__
    return str(option).replace("typing.", "")


def _refuse_missing_hardware(table: Mapping[str, Any], where: str) -> None:
    """Refuse fields that need what this machine lacks."""
    # Megatron-Core would accept some of these and fail in the first step. It would refuse others
    # without a word about what is missing.
    cuda = torch.cuda.is_available()
    if table.get("optimizer_cpu_offload") and not cuda:
        raise ConfigError(
            "optimizer_cpu_offload needs CUDA: without a GPU there is no memory to move to the CPU",
            where=where,
            remedy="remove this field on a CPU",
        )
    # Looked up and not imported, because an import takes seconds.
    engine = importlib.util.find_spec("transformer_engine") is not None
    if table.get("use_precision_aware_optimizer") and not (engine and cuda):
        missing = "CUDA" if engine else "Transformer Engine (its FusedAdam)"
        raise ConfigError(
            f"use_precision_aware_optimizer needs {missing}, which this machine does not have",
            where=where,
            remedy="remove this field on this machine",
        )
    for name in _ENGINE:
        if table.get(name) and not (engine and cuda):
            raise ConfigError(
                f"{name} needs Transformer Engine and a GPU, which this machine does not have",
                where=where,
                remedy="remove this field on this machine",
            )
    # Without the precision-aware optimizer these would be ignored, and the memory that the user
    # wanted to save would be used.
    lower = [name for name in _STATE_DTYPES if table.get(name, "float32") != "float32"]
    if lower and not table.get("use_precision_aware_optimizer"):
        raise ConfigError(
            f"{lower[0]} = {table[lower[0]]!r} needs use_precision_aware_optimizer",
            where=where,
            remedy="set use_precision_aware_optimizer = true (this needs Transformer Engine), or "
            "remove this field",
        )
