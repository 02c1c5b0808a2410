"""Knobs of where the metrics of a run go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lopd.config.base import SPEED_ONLY, Section

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class ReportSection(Section):
    """The table [report]: the trackers that get the metrics of metrics.jsonl too."""

    # TensorBoard alone comes with lopd. The others are packages of the user's.
    trackers: list[Tracker] = Field(
        default=["tensorboard"],
        description=(
            "The trackers that get every metric of metrics.jsonl: tensorboard, wandb, mlflow. "
            "An empty list means none."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    project: str = Field(
        default="lopd",
        min_length=1,
        description="The project of W&B and the experiment of MLflow.",
        json_schema_extra=SPEED_ONLY,
    )
