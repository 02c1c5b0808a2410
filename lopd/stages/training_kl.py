"""The reverse KL of a training between two weight syncs, and the warning where it rises.

No teacher runs beside the training, so responses that the student samples at a sync have no teacher
log-probabilities. What can be computed is the reverse KL on the frozen rollouts of the training
prompts, weighted by importance, as each step reports it. It is not a held-out figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

# The name of the figure in an evaluation's line of the metrics.
TRAINING_REVERSE_KL = "training_reverse_kl"
# One rise in two means nothing where the steps learn from other responses each time. Three rises in
# a row that add up to a quarter are seldom chance.
RISES = 3
LEAST_RISE = 1.25


def mean_between(train: Sequence[Mapping[str, Any]], before: int, step: int) -> float | None:
    """Return the mean reverse KL of the steps after ``before`` up to ``step``.

    Args:
        train: The metrics of the training's steps.
        before: The step of the sync before.
        step: The step of this sync.

    Returns:
        Nats per token; None where no step has the figure, as before the first step.
    """
    values = [
        row["reverse_kl"]
        for row in train
        if before < row["step"] <= step and row.get("reverse_kl") is not None
    ]
    return sum(values) / len(values) if values else None


def rise_of(evals: Sequence[Mapping[str, Any]]) -> str:
    """Return what to say where the newest syncs show a rise, or "".

    Args:
        evals: The metrics of the evaluations at the syncs, in the order of their steps.
    """
    known = [row for row in evals if row.get(TRAINING_REVERSE_KL) is not None]
    # Three rises need four figures.
    newest = known[-RISES - 1 :]
    if len(newest) <= RISES:
        return ""
    values = [row[TRAINING_REVERSE_KL] for row in newest]
    rises = all(later > earlier for earlier, later in pairwise(values))
    if not rises or values[-1] < LEAST_RISE * values[0]:
        return ""
    return (
        f"the reverse KL on the training rollouts rose at {RISES} weight syncs in a row, from "
        f"{values[0]:.4g} (step {newest[0]['step']}) to {values[-1]:.4g} (step "
        f"{newest[-1]['step']}): the student moves away from its teacher; lower "
        "distill.optimizer.lr, or refresh the rollouts (distill.refresh.every)"
    )


def rises_of(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what to say of a whole training: the last rise that was seen, if there was one."""
    # At each sync as it was then, so that a resumed training says what an unbroken one says.
    said = [rise_of(evals[:end]) for end in range(len(evals) + 1)]
    return [text for text in said if text][-1:]
