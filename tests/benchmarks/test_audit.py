"""benchmarks/audit.py, in small: the audit tells the example's teacher from a model nearly as
accurate, at the number of tokens that its tolerance needs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parents[2] / "benchmarks/audit.py"
TEACHER = Path(__file__).parents[2] / "examples/tiny_models/teacher"


def neighbour(folder: Path, size: float) -> Path:
    """The teacher with every weight moved by so much of itself, at random: another model, a few
    percent less often right.
    """
    shutil.copytree(TEACHER, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    moved = {
        name: value * (1 + size * torch.randn(value.shape, generator=generator))
        for name, value in sorted(weights.items())
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draws(tmp_path: Path, foreign: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path / "audit.json"
    subprocess.run(
        [sys.executable, str(SCRIPT), "--foreign", str(foreign), *options, "--json", str(out)],
        check=True,
        capture_output=True,
    )
    found: dict[str, list[dict[str, Any]]] = json.loads(out.read_text())
    return found


def test_true_and_foreign(tmp_path: Path) -> None:
    foreign = neighbour(tmp_path / "foreign", 0.05)
    found = draws(tmp_path, foreign, "--draws=1", "--responses=300", "--tolerance=0.0065")
    own = found["teacher"]
    other = found[str(foreign)]
    assert [row["verdict"] for row in own] == ["consistent"]
    assert [row["verdict"] for row in other] == ["inconsistent"]
    assert all(row["needed"] <= row["tokens"] for row in own)
    assert abs(sum(row["accuracy"] for row in own) - sum(row["accuracy"] for row in other)) < 0.06


@pytest.mark.slow
def test_right_in_95_of_100_draws_of_the_stated_size(tmp_path: Path) -> None:
    """Some five minutes; the same with an equally accurate model is in docs/benchmarks.md."""
    foreign = neighbour(tmp_path / "foreign", 0.05)
    found = draws(tmp_path, foreign, "--draws=20")
    for name, right in (("teacher", "consistent"), (str(foreign), "inconsistent")):
        assert sum(row["verdict"] == right for row in found[name]) >= 19, name
