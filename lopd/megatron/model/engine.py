"""Whether a model is made of Transformer Engine's layers, and what only those layers can do."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.gpt import gpt_layer_specs

from lopd.config import ParallelSection
from lopd.errors import ConfigError
from megatron_patches.layer_spec import has_transformer_engine


def uses_engine(dtype: str) -> bool:
    """Whether a model of this dtype is made of Transformer Engine's layers: where Megatron-Core has
    found it, a GPU is there, and weights are bfloat16.

    Its attention over packed sequences has kernels of 16 bits and less only; float32, which is for
    tests, takes the local layers.
    """
    return has_transformer_engine() and dtype == "bfloat16"


def context_problems(
    parallel: ParallelSection, dtype: str, *, where: str = "parallel"
) -> Iterator[ConfigError]:
    """Context ranks where the layers would not be Transformer Engine's, whose attention alone goes
    across ranks.
    """
    if parallel.context == 1 or uses_engine(dtype):
        return
    if not gpt_layer_specs.HAVE_TE:
        lack = "which does not import here"
    elif not has_transformer_engine():
        lack = "which needs a GPU, and there is none here"
    else:
        lack = f"whose attention has no kernels for {dtype}"
    remedy = "set context to 1; tensor divides the activations of long sequences too"
    yield ConfigError(
        f"context = {parallel.context} needs Transformer Engine, {lack}",
        where=where,
        limit="context = 1 without it",
        remedy=remedy,
    )
