"""benchmarks/training_step.py: both sides make the same update, and ratios are of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training_step import (
    figures_of,
    trainer_steps,
    transformers_steps,
    write_responses,
)
from tests.limits import apart, within
from tests.megatron.launch import run_ranks


def first_norms(folder: str) -> list[float]:
    """The gradient norm of the first step of the trainer, of the loop, and of the loop without one
    response.
    """
    work = Path(folder)
    write_responses(work, 1, 6, 4)
    [responses] = json.loads((work / "responses.json").read_text())["steps"]
    norms = []
    orders: list[tuple[Any, Any, str]] = [
        (trainer_steps(), responses, ""),
        (transformers_steps(4), responses, "sorted"),
        (transformers_steps(4), responses[1:], "sorted"),
    ]
    for steps, given, way in orders:
        next(steps)
        norms.append(steps.send((given, way))["grad_norm"])
    return norms


def test_both_make_the_same_update(tmp_path: Path) -> None:
    [(ours, theirs, control)] = run_ranks(first_norms, 1, folder=str(tmp_path))
    within(abs(theirs / ours - 1), 1e-4)
    apart(abs(control / ours - 1), 1e-2)


def test_a_ratio_is_the_median_of_ratios_within_a_round() -> None:
    """A machine that is ten times slower in one round changes no ratio."""

    def steps(seconds: list[float]) -> list[dict[str, float]]:
        base = {"tokens": 10.0, "grad_norm": 2.0}
        warm_up = [{"seconds": 99.0, "processor_seconds": 99.0, **base}] * 2
        return warm_up + [{"seconds": s, "processor_seconds": s / 2, **base} for s in seconds]

    figures = figures_of({"one": steps([1.0, 10.0, 1.0]), "sorted": steps([2.0, 20.0, 3.0])})
    assert figures["versus_transformers"] == pytest.approx(2.0)
    assert figures["versus_transformers_quickest_processor"] == pytest.approx(2.0)
    assert figures["seconds_of"] == {"one": 1.0, "sorted": 3.0}
    assert "two_ranks_versus_one" not in figures
