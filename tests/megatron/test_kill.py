"""kill -9 at random moments of a training, while it starts, steps or saves: the figures of every
step are those of a training never killed, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd.processes import GuardedProcess
from tests.megatron.kill_cases import NUM_STEPS
from tests.megatron.launch import ROOT
from tests.megatron.test_launch import eventually_none, mark_of
from tests.models import write_qwen3_moe


def trainings(folder: Path, num_kills: int, seed: int, patience_s: float) -> dict[str, Any]:
    model = write_qwen3_moe(folder / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "LOPD_CASE": mark_of(folder),
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.megatron.kill_cases",
        str(model),
        str(folder),
        str(num_kills),
        str(seed),
    ]
    with (folder / "log").open("wb") as log:
        process = GuardedProcess(command, env=environment, output=log, cwd=ROOT)
        try:
            code = process.wait(patience_s)
        finally:
            process.stop(grace_s=1.0)
    lines = (folder / "log").read_text(errors="replace").splitlines()
    assert code == 0, "\n".join(lines[-40:])
    result: dict[str, Any] = json.loads(
        next(line for line in lines if line.startswith("result ")).removeprefix("result ")
    )
    return result


@pytest.mark.parametrize(
    ("num_kills", "seed"),
    [
        pytest.param(3, 30, id="3 kills"),
        pytest.param(20, 2, id="20 kills", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_trainings_killed_at_random_go_on_bit_for_bit(
    num_kills: int, seed: int, tmp_path: Path
) -> None:
    found = trainings(tmp_path, num_kills, seed, patience_s=550 if num_kills < 10 else 1700)
    unbroken = found["unbroken"]
    assert found["kills"] >= num_kills
    assert len(unbroken["steps"]) == NUM_STEPS
    for training in found["trainings"]:
        assert training["steps"] == unbroken["steps"]
        assert training["weights"] == unbroken["weights"]
        for step, *figures in training["lines"]:  # also those of steps that a kill took back
            assert figures == unbroken["steps"][step]
    assert max(found["resumed_at"]) > 0, "no training went on from a checkpoint"
    if num_kills == 20:
        assert any(len(training["lines"]) > NUM_STEPS for training in found["trainings"]), (
            "no kill took back a step"
        )
    assert eventually_none(mark_of(tmp_path)), "processes that a killed rank had started"
