"""benchmarks/scoring.py: its figures are there and say that the score stage costs little of what
the engine gives.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import write_qwen3_moe

SCRIPT = Path(__file__).parents[2] / "benchmarks/scoring.py"


@pytest.mark.slow
def test_most_of_the_engine_reaches_the_cache(tmp_path: Path) -> None:
    model = write_qwen3_moe(tmp_path / "model")
    sizes = ["--responses", "300", "--rounds", "3", "--model", str(model)]
    subprocess.run(
        [sys.executable, str(SCRIPT), *sizes, "--json", str(tmp_path / "a.json")],
        check=True,
        capture_output=True,
    )
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["share_of_engine"].keys() == {"16", "64"}
    # On a quiet machine the shares are 0.9 and more.
    assert all(0.7 < share < 1.5 for share in figures["share_of_engine"].values()), figures
    assert figures["versus_unbounded_client"] > 0.8, figures
    beyond = {name: figures["clients"][f"{name} 64"]["own_mb"] for name in ("ours", "unbounded")}
    assert 0 < beyond["ours"] < 60, figures
