"""The smoke run of a new node, in its CPU form: the very script, the same code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from lopd.megatron.weights.architecture import layout_problems, read_architecture
from lopd.planning.parameters import total_and_active
from lopd.smoke.forms import FORMS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def smoke(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "400",
    }
    command = ["bash", str(EXAMPLES / "smoke_8xh100.sh"), "--work", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=550, check=False
    )


def test_everything_works_together(tmp_path: Path) -> None:
    done = smoke(tmp_path / "work", "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = (
        "imports",
        "SGLang serves it",
        "collectives: gloo, 2 ranks",
        "attention: PackedAttention",
        "step 1: loss",
        "step 2: loss",
        "weights by disk",
        "weights by tensor",
        "weights by distributed",
        "answers from the weights that were synced last",
        "all of it works",
    )
    found = [done.stdout.index(text) for text in expected if text in done.stdout]
    assert len(found) == len(expected), done.stdout
    assert found == sorted(found), "in this order"


def test_without_gpus_the_nodes_form_says_so_at_once(tmp_path: Path) -> None:
    if torch.cuda.device_count() >= 8:
        return
    done = smoke(tmp_path / "work")
    assert done.returncode == 2
    assert (
        "GPUs; limit: at least 8; remedy: use a machine with more GPUs, or add --cpu to run "
        "the CPU form"
    ) in " ".join(done.stderr.split()), done.stderr


def test_the_nodes_form_is_the_real_model_with_fewer_layers(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(FORMS["node"].model))
    architecture = read_architecture(tmp_path)
    assert not [*layout_problems(architecture, FORMS["node"].training.parallel)]
    whole = {**FORMS["node"].model, "num_hidden_layers": 48}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert total_and_active(read_architecture(tmp_path))[0] == 30_532_122_624
