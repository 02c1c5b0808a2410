"""Sampling and scoring need no more memory for many responses than for few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def figures(count: int, folder: Path, prompt_len: int) -> dict[str, Any]:
    """Of sampling and scoring so many responses in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tests.sglang.client_memory",
        str(count),
        str(folder),
        str(prompt_len),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(run.stderr.splitlines()[-1])
    assert (found["sampled"], found["scored"]) == (count, count)
    return found


def _assert_constant(few: dict[str, Any], many: dict[str, Any]) -> None:
    for kind in ("sampling_peak_mb", "scoring_peak_mb"):
        assert few[kind] > few["before_mb"]  # the figure sees what the client needs
        # What is used beyond the interpreter and its libraries.
        own_few = few[kind] - few["before_mb"]
        own_many = many[kind] - many["before_mb"]
        assert own_many < 1.2 * own_few + 4, (few, many)
        assert many[kind] < 1.2 * few[kind], (few, many)


def test_peak_memory_of_ten_times_the_responses(tmp_path: Path) -> None:
    """The prompts are long enough to show: those of all requests together would be 16 MB."""
    _assert_constant(figures(400, tmp_path / "few", 1024), figures(4000, tmp_path / "many", 1024))


@pytest.mark.slow
def test_peak_memory_of_a_hundred_times_the_responses(tmp_path: Path) -> None:
    _assert_constant(figures(1_000, tmp_path / "few", 64), figures(100_000, tmp_path / "many", 64))
