"""Ranks that wait: they run what torchrun's ranks would, and end as those do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lopd.errors import DataError, TrainingError
from lopd.megatron.ranks import standby
from lopd.megatron.ranks.standby import STANDBY
from lopd.processes import group_alive
from tests.megatron.test_launch import ROOT, start

# Without the imports of a trainer, which these cases do not need.
_LIGHT = (
    "from lopd.megatron.ranks import forking; import sys; "
    "forking.IMPORTS = ('lopd.megatron.ranks.torchrun',); sys.exit(forking.main())"
)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The group of ranks that wait."""
    monkeypatch.setattr(standby, "PROGRAM", ("-c", _LIGHT))
    STANDBY.prepare({**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, 1)
    assert STANDBY._waiting is not None
    group = STANDBY._waiting.process.pid
    yield group
    STANDBY.close()
    assert not group_alive(group)


def test_they_have_the_place_the_threads_and_the_environment_of_ranks(
    waiting: int, tmp_path: Path
) -> None:
    lines = start("works", tmp_path)
    assert STANDBY.take(1) is None, "they were taken"
    mark = f"{tmp_path.name}-{os.getpid()}"
    assert {f"rank {rank} of 2, 1 threads: {mark}" for rank in (0, 1)} <= set(lines)
    assert not group_alive(waiting)


def test_the_error_that_a_rank_reports_is_raised_as_it_was(waiting: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batch 3: no token carries loss"):
        start("reports", tmp_path)
    assert not group_alive(waiting)


def test_a_rank_that_is_killed_takes_the_others_along(waiting: int, tmp_path: Path) -> None:
    # If it were not stopped, the waiting rank would sleep for an hour.
    with pytest.raises(TrainingError, match="was ended by SIGKILL"):
        start("killed", tmp_path)
    assert not group_alive(waiting)


def test_other_threads_than_those_that_wait_are_not_taken(waiting: int) -> None:
    assert STANDBY.take(2) is None
    assert group_alive(waiting)


def test_they_do_not_outlive_their_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from lopd.megatron.ranks import standby; "
        f"standby.PROGRAM = ('-c', {_LIGHT!r}); "
        "standby.STANDBY.prepare(dict(os.environ), 1); "
        "print(standby.STANDBY._waiting.process.pid, flush=True); time.sleep(3600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=-1, env=environment, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    assert group_alive(group)
    parent.send_signal(signal.SIGKILL)
    parent.wait(60)
    deadline = time.monotonic() + 60
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not group_alive(group)
