"""benchmarks/step_cost.py: the two ways it times are the same update, and it writes what it
promises. Nothing here looks at seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.step_cost import ClippedRatio
from lopd.objective import Lightning, TokenBatch
from tests.limits import apart, close, within

SCRIPT = Path(__file__).parents[2] / "benchmarks/step_cost.py"
SMALL = [
    "--pairs=1",
    "--responses=6",
    "--length=24",
    "--max-tokens=48",
    "--layers=2",
    "--hidden=64",
    "--vocab=256",
]


def gradients(
    student: torch.Tensor, old: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both losses by the student's log-probabilities."""
    mask = torch.arange(len(student)) % 5 > 1
    batch = TokenBatch(
        mask,
        torch.tensor([0, 10, 30], dtype=torch.int32),
        2,
        teacher_logprobs=teacher,
        sampling_logprobs=old,
    )
    found = []
    for objective in (Lightning(), ClippedRatio()):
        logprobs = student.clone().requires_grad_()
        objective(logprobs, batch).loss_sum.backward()
        assert logprobs.grad is not None
        found.append(logprobs.grad)
    return found[0], found[1]


def test_the_recipe_is_the_same_update_where_the_ratio_is_one() -> None:
    torch.manual_seed(0)
    # some advantages are clipped
    student = -20 * torch.rand(30)
    teacher = -3 * torch.rand(30)
    ours, recipe = gradients(student, student, teacher)
    close(ours, recipe, abs=1e-6)
    assert ours.abs().max() > 0.4
    ours, recipe = gradients(student, student - 0.1, teacher)
    apart(
        (ours - recipe).abs().max(),
        1e-3,
        "old log-probabilities of another policy would not be noticed",
    )


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["--ranks=2", "--tensor=2", "--expert=2"], id="tensor and expert"),
        pytest.param([], id="one rank", marks=pytest.mark.slow),
    ],
)
def test_parameters_are_the_same_after_three_steps(layout: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(file), *SMALL, *layout],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    figures = json.loads(file.read_text())
    within(figures["max_parameter_difference"], 1e-6)
    assert figures["max_parameter_change"] > 1e-5, "nothing was trained"
    assert figures["speedup_full_recompute"] > 0
    assert figures["speedup_no_recompute"] > 0
    assert "full recompute" in finished.stdout
    assert "no recompute" in finished.stdout


def test_help_tells_what_it_does() -> None:
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0
    assert "--json" in finished.stdout
