"""Starting ranks: their lines arrive, the error that stopped them comes back whole, and none
outlives the parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lopd.errors import DataError, TrainingError
from lopd.megatron.ranks import heartbeats
from lopd.megatron.ranks.launch import run_ranks

MODULE = "tests.megatron.launch_cases"
ROOT = Path(__file__).resolve().parents[2]


def mark_of(folder: Path) -> str:
    """A value of LOPD_CASE that only what this test starts has: another run of the tests may go on
    beside this one.
    """
    return f"{folder.name}-{os.getpid()}"


def start(case: str, folder: Path, mark: str = "", timeout_s: float = 600) -> list[str]:
    lines: list[str] = []
    mark = mark or mark_of(folder)
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LOPD_CASE": mark,
        "TMPDIR": str(temporary),
    }
    log = folder / "train.log"
    run_ranks(
        MODULE,
        [case, str(timeout_s)],
        ranks=2,
        threads_per_rank=1,
        log=log,
        timeout_s=timeout_s,
        env=environment,
        on_line=lines.append,
    )
    return lines


def processes_with(mark: str) -> list[int]:
    """Ids of live processes that have LOPD_CASE=mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"LOPD_CASE={mark}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def eventually_none(mark: str, patience_s: float = 60.0) -> bool:
    deadline = time.monotonic() + patience_s
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_with(mark)


def test_lines_of_all_ranks_are_seen_also_where_a_process_of_another_session_keeps_the_pipe(
    tmp_path: Path,
) -> None:
    lines = start("works", tmp_path)
    kept = processes_with(mark_of(tmp_path))
    for left in kept:
        os.kill(left, signal.SIGKILL)
    assert kept, "it was still there (for an hour, if nobody ends it), and nobody waited for it"
    expected = {f"rank {rank} of 2, 1 threads: {mark_of(tmp_path)}" for rank in (0, 1)}
    assert expected <= set(lines)
    assert expected <= set((tmp_path / "train.log").read_text().splitlines())
    assert [*(tmp_path / "temporary").iterdir()] == []


def test_an_error_that_a_rank_reports_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        start("reports", tmp_path)
    assert (
        str(raised.value)
        == "batch 3: no token carries loss; limit: at least 1; remedy: drop empty responses"
    )
    assert eventually_none(mark_of(tmp_path))
    assert [*(tmp_path / "temporary").iterdir()] == []


@pytest.mark.parametrize(
    ("case", "told"),
    [("raises", "RuntimeError: gradients of the wrong shape"), ("killed", "ended with code 1")],
)
def test_a_rank_that_fails_takes_the_others_along(case: str, told: str, tmp_path: Path) -> None:
    # If it were not stopped, the waiting rank would sleep for an hour.
    with pytest.raises(TrainingError, match=told) as raised:
        start(case, tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "train.log") in str(raised.value)
    assert eventually_none(mark_of(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    mark = mark_of(tmp_path)
    # a shell ignores SIGINT for what it runs in the background, and a child inherits that
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = (
        f"{heed}; from tests.megatron.test_launch import *; "
        f"start('waits', Path({str(tmp_path)!r}), mark={mark!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / "train.log"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count(mark) == 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes_with(mark)) >= 3, "torchrun and two ranks"
    parent.send_signal(number)
    parent.wait(120)
    assert eventually_none(mark)


# ---- a rank that hangs ----


def test_what_passes_while_the_parent_itself_is_stopped_is_nobodys_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the whole machine sleeps: the parent may wake before a rank's next beat. The control:
    as long, but the parent was there and listened.
    """
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(heartbeats, "time", clock)
    for step_s, silent in ((100.0, False), (1.0, True)):
        now = 1000.0
        monitor = heartbeats.HeartbeatMonitor(
            tmp_path / "heartbeats", range(1), 10.0, tmp_path / "error"
        )
        (monitor.folder / "0").write_text(str(os.getpid()))
        assert not monitor.has_silent_rank()
        while now < 1100.0:
            now += step_s
            found = monitor.has_silent_rank()
        assert found == silent


def test_a_stopped_rank_becomes_one_error_that_names_it_and_nothing_is_left_running(
    tmp_path: Path,
) -> None:
    """Stopped for good in a training over gloo while the other waits for it; the stopped process is
    ended too.
    """
    with pytest.raises(
        TrainingError, match=r"rank 1 gave no sign of life for \d+ s \(process \d+ is stopped\)"
    ) as raised:
        start("stopped", tmp_path, timeout_s=8)
    log = (tmp_path / "train.log").read_text()
    assert "rank 1 stops itself" in log
    assert "limit: at most timeout_s = 8" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert eventually_none(mark_of(tmp_path))
    assert not list(tmp_path.glob("*heartbeats*"))


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_take_part_is_bounded_by_the_collective(
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError, match="rank 0 waited too long for the other ranks") as raised:
        start("absent", tmp_path, timeout_s=20)
    assert "limit: timeout_s" in str(raised.value)
    assert eventually_none(mark_of(tmp_path))


@pytest.mark.slow
def test_a_slow_rank_that_shows_life_is_waited_for(tmp_path: Path) -> None:
    """The control: as long as others of its time, but alive; here the time limit is about life, not
    about speed.
    """
    assert "rank 1 is done" in start("slow", tmp_path, timeout_s=5)


@pytest.mark.slow
def test_a_rank_that_fell_silent_is_named_when_the_others_gave_up_first(tmp_path: Path) -> None:
    """As when the other had begun to wait long before: its collective times out first. The silent
    one is named at once, long before timeout_s.
    """
    with pytest.raises(
        TrainingError, match=r"rank 1 gave no sign of life for \d+ s \(process \d+ is stopped\)"
    ):
        start("stopped early", tmp_path, timeout_s=3600)
    assert eventually_none(mark_of(tmp_path))
