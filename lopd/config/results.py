"""Knobs of the last two stages, evaluate and export."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lopd.config.base import SPEED_ONLY, FilePath, Section
from lopd.config.sampling import Sampling

# The paper's evaluations: avg@32 of mathematics and avg@4 of code, with the same sampling.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper_math": {
        "temperature": 0.6,
        "top_p": 0.95,
        "samples_per_prompt": 32,
        "max_new_tokens": 32768,
    },
    "paper_code": {
        "temperature": 0.6,
        "top_p": 0.95,
        "samples_per_prompt": 4,
        "max_new_tokens": 40960,
    },
}


class EvaluateSection(Sampling):
    """The table [evaluate]: answers of every model to the held-out prompts."""

    # SPEED_ONLY: whether the stage runs changes no figure of it.
    enabled: bool = Field(
        default=True,
        description=(
            "Evaluate: the stage, and the held-out prompts at a weight sync. "
            "If false, neither is done, and prompts.eval may be left out."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # To compare with the paper, all four values must be those of the paper.
    preset: Literal["none", "paper_math", "paper_code"] = Field(
        default="none",
        description=(
            "The paper's sampling, for those of its keys that are not set: temperature 0.6, "
            "top_p 0.95, 32 x 32768 tokens for mathematics or 4 x 40960 for code."
        ),
    )

    # Lower than in rollouts: an evaluation asks for the best answer, not for variety.
    temperature: float = Field(
        default=0.6,
        gt=0,
        le=10,
        description="The sampling temperature (0.6 in the paper).",
    )

    top_p: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description=(
            "Sample from the most likely tokens that together have this probability "
            "(0.95 in the paper)."
        ),
    )

    # Off, because it takes about as long as distill. For a comparison of methods it is needed:
    # without it, a gain could come from the additional training alone.
    equal_compute_baseline: bool = Field(
        default=False,
        description=(
            "Also train the SFT student further on demonstrations, for as many tokens as distill "
            "used, and evaluate the result. It shows what the same compute gives without OPD."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        # This runs before the types are checked, so the values may be anything.
        name = values.get("preset", "") if isinstance(values, dict) else ""
        preset = _PRESETS.get(name) if isinstance(name, str) else None
        # What the user has set stands above the preset.
        return {**preset, **values} if preset else values


class ExportSection(Section):
    """The table [export]: the distilled student as a Hugging Face checkpoint."""

    dir: FilePath | None = Field(
        default=None,
        description=(
            "The folder of the Hugging Face checkpoint. "
            "If absent, it is export/model in the run directory."
        ),
    )

    # The usual size of files on the Hugging Face hub is up to 5 GB.
    shard_bytes: int = Field(
        default=4 * 2**30,
        ge=2**20,
        description="The largest safetensors file, in bytes.",
        json_schema_extra=SPEED_ONLY,
    )
