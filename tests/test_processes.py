"""Children end with their parent, by their own process group, whatever ends the parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lopd import processes
from lopd.processes import GuardedProcess, group_alive

SLEEPER = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"]  # with a grandchild
PARENT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background, and a child inherits that
from lopd.processes import GuardedProcess
child = GuardedProcess({command!r}, env=dict(os.environ))
sys.stdout.write(f"{{child.pid}}\\n"); sys.stdout.flush()
time.sleep(600)
"""


def ends(group: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_alive(group)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_orphan_when_the_parent_is_killed(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(command=SLEEPER)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    time.sleep(0.5)
    assert group_alive(group)
    assert os.getpgid(group) == group, "the child leads a group of its own"
    parent.send_signal(number)
    parent.wait(10)
    assert ends(group)


def test_stop_ends_a_child_that_ignores_sigterm() -> None:
    command = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
    child = GuardedProcess(command, env=dict(os.environ))
    time.sleep(0.5)
    child.stop(grace_s=0.5)
    assert not group_alive(child.pid)
    child.stop()  # twice is harmless


def test_the_command_ends_when_its_guard_is_killed() -> None:
    child = GuardedProcess([sys.executable, "-c", "import time; time.sleep(600)"], env=dict(os.environ))
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    assert ends(child.pid)


@pytest.mark.parametrize(("command", "code"), [("raise SystemExit(3)", 3), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_exit_codes_pass_through(command: str, code: int) -> None:
    assert GuardedProcess([sys.executable, "-c", command], env=dict(os.environ)).wait(20) == code


def test_what_a_command_leaves_behind_ends_with_it() -> None:
    leaver = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    child = GuardedProcess([sys.executable, "-c", leaver], env=dict(os.environ))
    assert child.wait(20) == 0
    assert ends(child.pid)


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert processes.port_taken(port)
    assert not processes.port_taken(processes.free_port())


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n\ntwo\nthree\n")
    assert processes.last_lines(log, 2) == ["two", "three"]
    assert processes.last_lines(tmp_path / "absent") == []
