"""Children end with their parent, by their own process group, whatever ends the parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lopd import processes
from lopd.processes import GuardedProcess, group_alive

SLEEP = "import pathlib, signal, time; {before}pathlib.Path({up!r}).touch(); time.sleep(3600)"
PARENT = """
import os, signal, sys, time
# A shell ignores SIGINT for a command in the background, and a child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from lopd.processes import GuardedProcess
child = GuardedProcess({command!r}, env=dict(os.environ))
sys.stdout.write(f"{{child.pid}}\\n"); sys.stdout.flush()
time.sleep(3600)
"""


def sleeper(up: Path, before: str = "") -> list[str]:
    """A command that sleeps, and says by a file that it has come so far."""
    return [sys.executable, "-c", SLEEP.format(before=before, up=str(up))]


def appears(path: Path, within_s: float = 120.0) -> bool:
    deadline = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def ends(group: int, within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_alive(group)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_orphan_when_the_parent_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    with_a_grandchild = [
        sys.executable,
        "-c",
        f"import subprocess; subprocess.run({sleeper(tmp_path / 'up')!r})",
    ]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(command=with_a_grandchild)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    assert appears(tmp_path / "up")
    assert group_alive(group)
    assert os.getpgid(group) == group, "the child leads a group of its own"
    parent.send_signal(number)
    parent.wait(60)
    assert ends(group)


def test_stop_ends_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    command = sleeper(tmp_path / "up", before="signal.signal(signal.SIGTERM, signal.SIG_IGN); ")
    child = GuardedProcess(command, env=dict(os.environ))
    assert appears(tmp_path / "up")
    child.stop(grace_s=0.5)
    assert not group_alive(child.pid)
    child.stop()  # twice is harmless


def test_the_command_ends_when_its_guard_is_killed(tmp_path: Path) -> None:
    child = GuardedProcess(sleeper(tmp_path / "up"), env=dict(os.environ))
    assert appears(tmp_path / "up")
    os.kill(child.pid, signal.SIGKILL)
    child.wait(60)
    assert ends(child.pid)


@pytest.mark.parametrize(
    ("command", "code"),
    [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_exit_codes_pass_through(command: str, code: int) -> None:
    assert GuardedProcess([sys.executable, "-c", command], env=dict(os.environ)).wait(120) == code


def test_what_a_command_leaves_behind_ends_with_it() -> None:
    leaver = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    )
    child = GuardedProcess([sys.executable, "-c", leaver], env=dict(os.environ))
    assert child.wait(120) == 0
    assert ends(child.pid)


def test_a_command_that_is_begun_by_a_guard_that_has_been_killed_ends_too() -> None:
    """The kernel tells of a parent's end only who asked before it."""
    # In the child, os.getpid() is not the id of its parent.
    with subprocess.Popen(
        ["sleep", "3600"], preexec_fn=lambda: processes.die_with_parent(os.getpid())
    ) as orphan:
        assert orphan.wait(60) == -signal.SIGKILL
    with subprocess.Popen(
        ["true"], preexec_fn=partial(processes.die_with_parent, os.getpid())
    ) as child:
        assert child.wait(60) == 0, "the control"


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert processes.port_taken(port)
    assert any(not processes.port_taken(processes.free_port()) for _ in range(10)), (
        "one may have been given to another program meanwhile, not each"
    )


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n\ntwo\nthree\n")
    assert processes.last_lines(log, 2) == ["two", "three"]
    assert processes.last_lines(tmp_path / "absent") == []
