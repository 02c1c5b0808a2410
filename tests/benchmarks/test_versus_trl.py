"""benchmarks/versus_trl.py: its evaluator lets the teacher pass and the base student not."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.versus_trl import EXAMPLE, MAX_REVERSE_KL, MIN_ACCURACY, evaluate, memory_of

MODELS = EXAMPLE.parent / "tiny_models"


def test_the_teacher_passes_the_bar_and_the_base_student_does_not(tmp_path: Path) -> None:
    accuracy, divergence = evaluate(MODELS / "teacher", tmp_path, count=60)
    assert accuracy > 0.9
    assert divergence < 1e-6
    accuracy, divergence = evaluate(MODELS / "student", tmp_path, count=60)
    assert accuracy < MIN_ACCURACY
    assert divergence > 10 * MAX_REVERSE_KL


def test_the_memory_is_that_of_living_processes() -> None:
    assert memory_of(os.getpid()) > 2**24
    assert memory_of(2**22) == 0, "a process that has ended has none"
