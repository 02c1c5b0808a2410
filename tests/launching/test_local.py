"""nemo-run's local executor, for real: two workers and the job that completes the stage, then a
training, as jobs of one experiment on this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import LopdError
from lopd.launching.bridge import launch_python

TINY = Path(__file__).parents[2] / "examples/tiny_moe.toml"
SMALL = (
    "launch.device=cpu",
    "launch.workers=2",
    "prompts.sft.num_prompts=64",
    "demonstrate.shard_size=16",
    "sft.num_steps=2",
    "sft.batch_size=32",
)


def lopd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lopd.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )


def status(run: Path) -> dict[str, Any]:
    return {
        row["name"]: row
        for row in json.loads(lopd("status", TINY, *SMALL, f"run.dir={run}", "--json").stdout)
    }


@pytest.mark.slow
def test_the_local_executor_runs_the_jobs_in_order(tmp_path: Path) -> None:
    try:
        launch_python()
    except LopdError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    launched = lopd(
        "launch",
        TINY,
        *SMALL,
        f"run.dir={run}",
        "--on",
        "local",
        "--stages",
        "demonstrate,sft",
        "--json",
    )
    assert launched.returncode == 0, launched.stderr
    jobs = {job["name"]: job["state"] for job in json.loads(launched.stdout)["jobs"]}
    assert jobs == dict.fromkeys(
        ("demonstrate-0", "demonstrate-1", "demonstrate", "sft"), "SUCCEEDED"
    )
    rows = status(run)
    assert {name: rows[name]["state"] for name in ("demonstrate", "sft", "rollout")} == {
        "demonstrate": "done",
        "sft": "done",
        "rollout": "absent",
    }
    assert rows["demonstrate"]["rows"] == 64
    logs = (run / "demonstrate/log.txt").read_text()
    assert logs.count("starting SGLang") == 2, (
        "one server a worker, none for the job that completes the stage"
    )
    failing = lopd(
        "launch",
        TINY,
        *SMALL,
        f"run.dir={run}",
        "rollout.min_p=0.5",
        "--on",
        "local",
        "--stages",
        "rollout",
    )
    assert failing.returncode == 2, (
        "min_p does not go with seeded sampling: each job ends with code 2"
    )
    assert "failed" in failing.stderr
