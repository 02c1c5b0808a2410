"""benchmarks/cache.py: memory does not grow with the cache, and reading costs far less than
training (in processor time: machines are busy).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/cache.py"


@pytest.mark.slow
def test_reading_takes_bounded_memory_and_little_time(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--megabytes=60",
            "--seconds=3",
            "--json",
            str(tmp_path / "a.json"),
        ],
        check=True,
        capture_output=True,
    )
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["bytes"] > 60e6
    for how in ("in order", "shuffled"):
        row = figures[how]
        assert row["tokens_per_processor_s"] > 20 * 30_000
        assert row["memory_mb"] < row["memory_mb_one_shard"] + 40, "a cache 60 times larger"
    assert figures["in order"]["tokens"] * 4 < figures["bytes"] < figures["in order"]["tokens"] * 16
