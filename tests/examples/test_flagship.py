"""The flagship's script itself on a CPU, with a tiny model of the same structure: bash
tests/examples/flagship.sh FOLDER.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lopd.megatron.weights.architecture import layout_problems, read_architecture
from lopd.planning.known_models import KNOWN_MODELS
from tests.examples.flagship import CONFIG, STUDENT, write_model
from tests.planning.test_recipes import recipe

SCRIPT = Path(__file__).with_name("flagship.sh")
SYNCED = re.compile(r"distill step (\d)/4: weights synced, .* by tensor in .* 789 tensors verified")


def flagship(folder: Path, *arguments: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": "400"}
    command = ["bash", str(SCRIPT), str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def test_the_tiny_model_has_the_flagships_structure(tmp_path: Path) -> None:
    real = KNOWN_MODELS[STUDENT]
    same = (
        "model_type",
        "num_experts",
        "num_experts_per_tok",
        "num_attention_heads",
        "num_key_value_heads",
        "norm_topk_prob",
    )
    assert {name: CONFIG[name] for name in same} == {name: real[name] for name in same}
    write_model(tmp_path / "model", seed=0)
    parallel = recipe("qwen3_30b_a3b").distill.parallel
    assert (parallel.ranks, parallel.tensor, parallel.expert) == (8, 4, 8)
    assert not [*layout_problems(read_architecture(tmp_path / "model"), parallel)]


def test_its_first_step_asks_for_no_gpu_where_a_cpu_is_meant(tmp_path: Path) -> None:
    done = flagship(tmp_path, "--only", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none is needed: launch.device is cpu" in done.stdout
    control = flagship(tmp_path, "--only", "check", "launch.device=gpu")
    assert control.returncode == 2
    assert "wrong GPUs" in control.stdout


@pytest.mark.slow
def test_every_step_of_the_script(tmp_path: Path) -> None:
    """About 8 minutes on 2 cores, 8 ranks and one server at a time."""
    done = flagship(tmp_path, timeout=3000)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert [int(found) for found in SYNCED.findall(done.stdout)] == [0, 2, 4], (
        "in turns with a server whose memory is empty between"
    )
    run = tmp_path / "runs" / "qwen3_30b_a3b"
    summary = json.loads((run / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == [
        "demonstrate",
        "sft",
        "rollout",
        "score",
        "distill",
        "evaluate",
        "export",
    ]
    assert {stage["status"] for stage in summary["stages"]} == {"done"}
    for benchmark in ("aime_2024", "aime_2025", "hmmt_2025"):
        for model in ("sft", "distill"):
            found = json.loads(
                (
                    tmp_path / "runs" / f"qwen3_30b_a3b-{benchmark}-{model}" / "summary.json"
                ).read_text()
            )
            assert found["samples_per_problem"] == 2, "evaluate.* of the arguments holds there too"
    again = flagship(tmp_path, "--only", "run", timeout=600)
    assert again.returncode == 0, again.stdout[-5000:] + again.stderr[-5000:]
    assert "starting SGLang" not in again.stdout, "everything is reused"
    more = flagship(tmp_path, "--only", "plan", "distill.num_steps=6")
    assert more.returncode == 0, more.stderr
    assert "aime" not in more.stdout
