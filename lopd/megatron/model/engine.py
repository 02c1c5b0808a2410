"""Whether a model has Transformer Engine's layers, and what only those layers can do."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.gpt import gpt_layer_specs

from lopd.config import ParallelSection
from lopd.errors import ConfigError
from megatron_patches.layer_spec import has_transformer_engine


def uses_engine(dtype: str) -> bool:
    """Return whether a model of this dtype has Transformer Engine's layers.

    It has them if Megatron-Core has found Transformer Engine, a GPU is there, and the weights are
    bfloat16.
    """
    # The attention over packed sequences has kernels for 16 bits and less only. float32, which is
    # for tests, takes the local layers.
    return has_transformer_engine() and dtype == "bfloat16"


def context_problems(
    parallel: ParallelSection, dtype: str, *, where: str = "parallel"
) -> Iterator[ConfigError]:
    """Yield an error if there are context ranks and the layers cannot be Transformer Engine's.

    Args:
        parallel: The layout of the ranks.
        dtype: The type of the weights, "float32" or "bfloat16".
        where: The name of the section, for the message.
    """
    # Of the layers that exist here, only Transformer Engine's attention goes across ranks.
    if parallel.context == 1 or uses_engine(dtype):
        return
    # The message names what is missing, from the general to the special.
    if not gpt_layer_specs.HAVE_TE:
        lack = "which does not import here"
    elif not has_transformer_engine():
        lack = "which needs a GPU, and there is none here"
    else:
        lack = f"whose attention has no kernels for {dtype}"
    yield ConfigError(
        f"context = {parallel.context} needs Transformer Engine, {lack}",
        where=where,
        limit="exactly 1 without Transformer Engine",
        remedy="set context to 1; for long sequences use tensor parallelism, which also divides "
        "the activations",
    )
