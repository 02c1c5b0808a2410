"""Slow: real SGLang servers that are killed, and a trainer's rank that is, in the middle of a
weight sync of ``lopd distill``: it ends as one never killed.

Where else in a sync a server is lost, by each transport and also by SIGSTOP:
tests/sglang/test_weight_sync_lost.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lopd.artifacts import read_manifest
from tests.pipeline.running import Command, deterministic, files, lopd, metrics
from tests.pipeline.test_kill import HELD_RANK, SERVER, assert_one_line
from tests.pipeline.test_two_servers import REFRESHED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# There are syncs after steps 1, 2 and 3, of one bucket each.
SYNCED = (
    *REFRESHED,
    "distill.sync_every=2",
    "distill.sync_num_prompts=8",
    "distill.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("lost") / "run"
    for stage in ("demonstrate", "sft", "rollout", "score"):
        lopd(stage, run_dir, SYNCED)
    return run_dir


@pytest.fixture(scope="module")
def never_killed(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir: Path = shutil.copytree(scored, tmp_path_factory.mktemp("never") / "run")
    screen = lopd("distill", run_dir, [*SYNCED, "sync.transport=tensor"]).stdout
    assert screen.count("weights synced") == 3, (
        "the evaluation and the refresh of step 2 share theirs"
    )
    assert "sent again" not in screen
    return run_dir


def assert_same_result(run_dir: Path, never_killed: Path) -> None:
    stage = run_dir / "distill"
    expected = never_killed / "distill"
    assert read_manifest(stage).fingerprint == read_manifest(expected).fingerprint
    for pattern in ("model/*", "refresh-*/**/*.parquet"):
        assert {name: file.sha256 for name, file in files(stage, pattern).items()} == {
            name: file.sha256 for name, file in files(expected, pattern).items()
        }
    for kind in ("train", "eval"):
        assert deterministic(metrics(run_dir, "distill", kind)) == deterministic(
            metrics(never_killed, "distill", kind)
        )
    assert files(stage, "refresh-*/**/*.parquet")


@pytest.mark.parametrize("transport", ["tensor", "distributed"])
def test_killed_at_every_sync(
    transport: str, scored: Path, never_killed: Path, tmp_path: Path
) -> None:
    """At the first refresh, at the second with its evaluation, at the last evaluation; each sync
    goes over twice.
    """
    run_dir = shutil.copytree(scored, tmp_path / "run")
    holds = ["sync-1", "sync-3", "sync-5"]
    command = Command("distill", run_dir, [*SYNCED, f"sync.transport={transport}"], holds=holds)
    for number, place in enumerate(holds, start=1):
        command.wait_for(place)
        command.kill_child(SERVER)
        command.wait_until(
            lambda number=number: command.output.count("the student server died") == number,
            "its death is told",
        )  # type: ignore[misc]
        command.release(place)
    finished = command.wait()
    assert finished.code == 0, finished.stderr
    assert finished.stdout.count("the weights are sent again") == 3
    assert command.ends_completely()
    assert_same_result(run_dir, never_killed)


def test_killed_three_times_in_a_row(scored: Path, never_killed: Path, tmp_path: Path) -> None:
    """Nothing went in between: that is the end, with the server's last words, for all ranks; and
    the same command goes on.
    """
    run_dir = shutil.copytree(scored, tmp_path / "run")
    overrides = [*SYNCED, "sync.transport=tensor"]
    holds = ["sync-1", "sync-2", "sync-3"]
    command = Command("distill", run_dir, overrides, holds=holds)
    for number, place in enumerate(holds, start=1):
        command.wait_for(place)
        command.kill_child(SERVER)
        if number < len(holds):
            command.wait_until(
                lambda number=number: command.output.count("the student server died") == number,
                "its death is told",
            )  # type: ignore[misc]
        else:
            failure = run_dir / "distill" / "sglang-student.log.weights.json.failure"
            command.wait_until(failure.exists, "it is given up")
        command.release(place)
    finished = command.wait(300)
    assert finished.code == 2
    assert_one_line(finished)
    assert (
        "the student server died 3 times in a row without answering a request; at last: "
        in finished.stderr
    )
    assert "its log ends: " in finished.stderr
    assert finished.stdout.count("the weights are sent again") == 2
    assert command.ends_completely()
    lopd("distill", run_dir, overrides)
    assert_same_result(run_dir, never_killed)


@pytest.mark.parametrize("place", ["sync-1", "sync-2"])
def test_a_rank_killed_amid_a_sync(
    place: str, scored: Path, never_killed: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(scored, tmp_path / "run")
    overrides = [*SYNCED, "sync.transport=tensor"]
    command = Command("distill", run_dir, overrides, holds=[place])
    command.wait_for(place)
    command.kill_child(HELD_RANK)
    finished = command.wait(300)
    assert finished.code == 2
    assert_one_line(finished)
    assert command.ends_completely()
    lopd("distill", run_dir, overrides)
    assert_same_result(run_dir, never_killed)
