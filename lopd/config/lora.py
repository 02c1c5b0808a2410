"""Knobs of LoRA: adapters that are trained in place of a model's weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lopd.config.base import Contradiction, Section

# Megatron-Core's names of the layers that can have adapters. It computes query, key and value in
# one product, and so gate and up; each product has one adapter.
Target = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
_TARGETS: list[Target] = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class LoraSection(Section):
    """Adapters (LoRA, arXiv 2106.09685): W x + alpha / rank * B A x, of which B and A are trained.

    If no rank is set, there are no adapters, and all weights are trained.
    """

    rank: int | None = Field(
        default=None,
        ge=1,
        description="The rank of the adapters. If absent, there are none: all weights are trained.",
    )

    # Twice a usual rank of 16.
    alpha: float = Field(
        default=32.0,
        gt=0,
        description="The adapters' product counts alpha / rank times.",
    )

    # Routers, norms, embedding and output layer never have adapters.
    targets: list[Target] = Field(
        default_factory=lambda: list(_TARGETS),
        min_length=1,
        description=(
            "The layers with adapters. Of attention: linear_qkv (query, key, value), linear_proj "
            "(output). Of the MLP or of every expert: linear_fc1 (gate, up), linear_fc2 (down)."
        ),
    )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained, and the model's weights are not."""
        return self.rank is not None

    @property
    def scale(self) -> float:
        """The factor of the product of B and A. Only with a rank."""
        assert self.rank is not None
        return self.alpha / self.rank

    def describe(self) -> str:
        """Return the settings in words, the same for the same adapters."""
        if not self.is_on:
            return "none"
        return f"rank {self.rank}, alpha {self.alpha:g}, {' '.join(sorted(set(self.targets)))}"

    @model_validator(mode="after")
    def _has_rank(self) -> LoraSection:
        if self.is_on:
            return self
        # A user who sets another key wants adapters, and would get a training of all weights. The
        # values are compared, because a rank reads the configuration with all keys set.
        for name, field in type(self).model_fields.items():
            if getattr(self, name) != field.get_default(call_default_factory=True):
                raise Contradiction(
                    f"{name} has no effect without rank",
                    limit="with a rank of at least 1",
                    remedy="set rank too, or remove this key",
                )
        return self
