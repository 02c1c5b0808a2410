"""Which parameters the adapters of LoRA have, how ranks divide them, and what PEFT calls them.

An adapter belongs to one weight of a linear layer, W [out, in]. It has two thin matrices, A
[rank, in] and B [out, rank], and the layer then multiplies by W + alpha / rank * B A. A rank that
holds rows of W holds the same rows of B and all of A. A rank that holds columns of W holds the same
columns of A and all of B. So the product of a rank's parts has the shape and the place of its part
of W.

Megatron-Core computes query, key and value in one product, and so gate and up. Such a weight has
one adapter, in which they share A. PEFT has an adapter for each of them: A is repeated, and the
rows of B are divided, as the rows of W are (lopd.megatron.weights.hf_mapping).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lopd.config import LoraSection
from lopd.megatron.weights.architecture import Architecture
from lopd.megatron.weights.hf_mapping import Weight, weights

# PEFT puts the name of its own model before every name of the model inside of it.
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of one parameter.

    Attributes:
        base: The parameter that it is added to.
        a: The matrix A, [rank, in].
        b: The matrix B, [out, rank], with the rows of base.
    """

    base: Weight
    a: Weight
    b: Weight

    @property
    def peft_a(self) -> tuple[str, ...]:
        """PEFT's names of A, one for each Hugging Face tensor of base."""
        return tuple(_peft_name(name, "lora_A") for name in self.base.hf)


def adapters(arch: Architecture, lora: LoraSection) -> Iterator[Adapter]:
    """Yield all adapters of a model, in the order of the Hugging Face checkpoint.

    Args:
        arch: The architecture of the whole model.
        lora: The settings. Without a rank there are none.
    """
    if lora.rank is None:
        return
    for base in weights(arch):
        stem, _, kind = base.megatron.rpartition(".")
        # A bias has no adapter. Names of embedding, norms and routers are never among the targets.
        if kind == "weight" and stem.rpartition(".")[2] in lora.targets:
            yield _adapter(base, stem, lora.rank)


def adapter_weights(arch: Architecture, lora: LoraSection) -> list[Weight]:
    """Return the parameters of all adapters, by their names over all ranks."""
    return [weight for adapter in adapters(arch, lora) for weight in (adapter.a, adapter.b)]


def _adapter(base: Weight, stem: str, rank: int) -> Adapter:
    # Ranks divide the columns of W, and with them those of A, or the rows of W, and those of B.
    by_columns = base.layout == "columns"
    a = Weight(
        f"{stem}.lora_A",
        # A is one matrix. The copies get their names when they are written (peft_a).
        (_peft_name(base.hf[0], "lora_A"),),
        ((rank, base.shapes[0][1]),),
        "columns" if by_columns else "whole",
        expert=base.expert,
    )
    b = Weight(
        f"{stem}.lora_B",
        tuple(_peft_name(name, "lora_B") for name in base.hf),
        tuple((shape[0], rank) for shape in base.shapes),
        "whole" if by_columns else base.layout,
        kv_heads=base.kv_heads,
        expert=base.expert,
    )
    return Adapter(base, a, b)


def _peft_name(name: str, matrix: str) -> str:
    return f"{_PEFT_PREFIX}{name.removesuffix('.weight')}.{matrix}.weight"
