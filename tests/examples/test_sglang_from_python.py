"""examples/sglang_from_python.py, the very file, against real servers: samples, scores, and weights
by every transport.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/sglang_from_python.py"
HANGS_S = 550


def run_example(*arguments: str) -> str:
    command = [
        sys.executable,
        str(EXAMPLE),
        str(ROOT / "examples/tiny_models/student"),
        "--dtype",
        "float32",
        *arguments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANGS_S, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def check(text: str) -> None:
    assert "40 responses, 40 of them different" in text
    found = re.search(r"40 scores, at most (\S+) nats from the log-probabilities of sampling", text)
    assert found, text
    assert 0 < float(found.group(1)) < 1e-3, "float32: 1e-5 was seen"
    for transport in ("disk", "tensor", "distributed"):
        assert re.search(
            (
                rf"MiB by {transport} in .* 102 tensors verified\n"
                rf"40 responses of the weights by-{transport}\n"
            ),
            text,
        ), text


def test_it_samples_scores_and_puts_weights_into_running_servers() -> None:
    text = run_example()
    check(text)
    assert "starting it again" not in text


@pytest.mark.slow
def test_a_server_that_is_killed_meanwhile_costs_no_response() -> None:
    text = run_example("--kill")
    check(text)
    assert text.count("starting it again") == 1


def test_it_uses_public_names_that_the_library_page_has() -> None:
    script = EXAMPLE.read_text()
    library = (ROOT / "docs/library.md").read_text()
    imported = {
        name.strip()
        for names in re.findall(
            r"^from sglang_rollout\S* import ([^#\n]+)", script, flags=re.MULTILINE
        )
        for name in names.split(",")
    }
    assert {"serve", "SamplingRequest", "ScoreRequest", "build_receiver"} <= imported
    assert not [name for name in re.findall(r"\.(_\w+)", script) if not name.startswith("__")]
    for name in imported:
        assert re.search(rf"`[\w.]*\b{name}\b", library), (
            f"{name} is used by the example and not documented in docs/library.md"
        )
