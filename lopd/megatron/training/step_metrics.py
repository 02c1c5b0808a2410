"""The metrics of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one optimizer step. They are the same on every rank."""

    # The number of updates made, this one included.
    step: int
    loss: float
    # The global L2 norm of the gradients before clipping.
    grad_norm: float
    lr: float
    # The number of tokens that carry loss.
    num_tokens: int
    # Wall-clock time of the step.
    seconds: float
    # Tokens of all sequences, prompts included, over all ranks.
    tokens_per_s: float
    # What the objective reports (lopd.objective.reduce_metrics), and the metrics of StepHealth.
    metrics: Mapping[str, float]

    def as_dict(self) -> dict[str, float]:
        """Return all metrics without nesting, for a line of JSON."""
        own = asdict(self)
        return {**own.pop("metrics"), **own}
