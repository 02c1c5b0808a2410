"""The sandbox in each of its modes: what a program may, and what it may not; and that nothing of it
stays behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lopd.errors import ConfigError
from lopd.processes import group_alive
from lopd.tasks import get_task, sandbox
from lopd.tasks.sandbox import Limits, Protections
from lopd.tasks.sandbox_process import Outcome
from lopd.tasks.system_calls import filter_program, kernel_facts

MODES = {
    "namespaces": Protections("namespaces", True, True, True, True, False),
    "filters": Protections("filters", True, True, False, True, True),
}
UNPROTECTED = Protections("none", False, False, False, False, False)
# The mark is on the command line of the programs that these tests start, and of no others.
MARK = os.environ.get("LOPD_SANDBOX_MARK", f"mark-{os.getpid()}")
SMALL = Limits(cpu_s=20, wall_s=100, memory_mb=256, processes=8, disk_mb=4, file_mb=2)


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> Protections:
    held = MODES[request.param]
    reason = sandbox._try(held)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return held


def run(held: Protections, code: str, stdin: bytes = b"", limits: Limits = SMALL) -> Outcome:
    return sandbox.run(
        [sandbox.interpreter(held), "-I", "main.py", MARK],
        files={"main.py": code},
        stdin=stdin,
        limits=limits,
        protections_used=held,
    )


def answer_of(program: list[tuple[int, int, int, int]], call: dict[int, int]) -> int:
    """What the filter answers to a call: {offset in seccomp_data: word}."""
    word = 0
    position = 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            word = call[constant]
        else:
            holds = {0x15: word == constant, 0x45: word & constant, 0x35: word >= constant}[code]
            position += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "audit", "socket", "read", "clone", "clone3"),
    [("x86_64", 0xC000003E, 41, 0, 56, 435), ("aarch64", 0xC00000B7, 198, 63, 220, 435)],
)
def test_the_filter_refuses_by_number_and_flags(
    machine: str, audit: int, socket: int, read: int, clone: int, clone3: int
) -> None:
    program = filter_program(machine)
    assert program is not None
    allow = 0x7FFF0000
    kill = 0x80000000
    refuse = 0x00050001
    unknown = 0x00050026
    threads = 0x100
    namespace = 0x20000000
    for number, flags, expected in (
        (read, 0, allow),
        (socket, 0, refuse),
        (clone, threads, allow),
        (clone, threads | namespace, refuse),
        (clone3, 0, unknown),
    ):
        assert answer_of(program, {0: number, 4: audit, 16: flags}) == expected, (number, flags)
    assert answer_of(program, {0: read, 4: audit + 1, 16: 0}) == kill, "of another architecture"
    assert kernel_facts("riscv64") is None


def test_a_program_reads_computes_writes_and_starts_others(mode: Protections) -> None:
    code = """
import subprocess, sys, threading
thread = threading.Thread(target=lambda: open("mine", "w").write(input()))
thread.start(); thread.join()
child = subprocess.run(["/bin/echo", "child"], capture_output=True, text=True)
print(open("mine").read()[::-1], child.stdout.strip())
sys.exit(3)
"""
    outcome = run(mode, code, stdin=b"abc\n")
    assert (outcome.code, outcome.stdout, outcome.stderr, outcome.timed_out) == (
        3,
        b"cba child\n",
        b"",
        False,
    )


@pytest.mark.parametrize(
    "attempt",
    [
        "open({secret!r}).read()",
        "open('/etc/passwd').read()",
        "os.listdir('/proc')",
        "os.listdir({folder!r})",
        "open('/usr/proof', 'w')",
        "socket.socket()",
        "os.kill({pid}, 0)",
        "open('/proc/{pid}/environ').read()",
        "os.setuid(0)",
        "os.chroot('.')",
    ],
)
def test_what_is_refused(mode: Protections, attempt: str, tmp_path: Path) -> None:
    """Control: the same attempts without a sandbox succeed (those that harm nothing)."""
    (tmp_path / "secret").write_text("secret")
    code = "import os, socket\n" + attempt.format(
        secret=str(tmp_path / "secret"), folder=str(tmp_path), pid=os.getpid()
    )
    outcome = run(mode, code)
    assert outcome.code == 1, outcome
    assert b"Error" in outcome.stderr
    if "secret" in attempt or "passwd" in attempt or "socket" in attempt:
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)",
        "ptrace(0, 0, 0, 0)",
        "syscall(425, 1, 0)",
        "mount(b'a', b'.', b'tmpfs', 0, 0)",
    ],
)
def test_the_kernel_answers_no(mode: Protections, call: str) -> None:
    assert (
        run(
            mode,
            (
                "import ctypes\n"
                "libc = ctypes.CDLL(None, use_errno=True)\n"
                f"print(libc.{call}, ctypes.get_errno())"
            ),
        ).stdout
        == b"-1 1\n"
    )


def test_no_variable_of_ours_is_seen(mode: Protections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    assert b"secret" not in run(mode, "import os\nprint(os.environ)").stdout


def test_limits(mode: Protections) -> None:
    assert run(mode, "while True: pass", limits=replace(SMALL, cpu_s=0.5)).timed_out
    start = time.monotonic()
    assert run(mode, "import time\ntime.sleep(600)", limits=replace(SMALL, wall_s=0.5)).timed_out
    assert time.monotonic() - start < 100
    assert b"MemoryError" in run(mode, "bytearray(10**9)").stderr
    forks = run(
        mode,
        (
            "import os, time\n"
            "n = 1\n"
            "try:\n"
            "    while True:\n"
            "        if os.fork() == 0: time.sleep(60)\n"
            "        n += 1\n"
            "except OSError:\n"
            "    print(n)"
        ),
    )
    assert int(forks.stdout) <= SMALL.processes
    assert len(run(mode, "while True: print('x' * 10**5)").stdout) <= SMALL.file_mb << 20


def test_all_files_together_are_bounded_where_the_disk_is_its_own() -> None:
    if sandbox._try(MODES["namespaces"]):
        pytest.skip("no name spaces here")
    code = "for number in range(99): open(str(number), 'w').write('x' * 10**5)"
    assert b"No space left" in run(MODES["namespaces"], code).stderr
    assert run(MODES["namespaces"], code, limits=replace(SMALL, disk_mb=64)).code == 0, (
        "the control"
    )


@pytest.mark.parametrize("ending", ["print('left')", "time.sleep(60)"], ids=["ends", "is stopped"])
def test_what_it_leaves_behind_is_ended(mode: Protections, ending: str) -> None:
    mark = f"4242{os.getpid()}"
    code = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        f"        time.sleep({mark})\n"
        "    os._exit(0)\n"
        "time.sleep(0.2)\n"
        f"{ending}"
    )
    run(mode, f"mark = {mark}\n" + code, limits=replace(SMALL, wall_s=1))
    assert not orphans(), "a process of the sandbox is alive"


def orphans() -> list[str]:
    """Command lines of programs of this test session's sandboxes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if MARK.encode() in words:
                found.append(f"{entry.name} {words}")
    return found


def test_it_ends_with_its_parent(mode: Protections, tmp_path: Path) -> None:
    """kill -9 of the process that asked for the run ends the program."""
    script = f"""
from tests.tasks.test_sandbox import MODES, SMALL, run
from dataclasses import replace
run(MODES[{mode.mode!r}], "import time; time.sleep(60)", limits=replace(SMALL, wall_s=60))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "LOPD_SANDBOX_MARK": MARK},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans(), "the program has started"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not orphans()
    assert not group_alive(parent.pid)


def test_protections_are_found_out_and_told() -> None:
    held = sandbox.protections()
    assert held.mode in (*MODES, "none")
    assert ("no network" in held.describe()) == held.network
    open_mode = replace(MODES["filters"], seccomp=False, landlock=False)
    assert sandbox._try(open_mode) == "does not cut off network and files", (
        "the probe notices what is open"
    )


def test_code_is_refused_where_nothing_protects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "protections", lambda: UNPROTECTED)
    with pytest.raises(
        ConfigError,
        match=r"the code of a model safely: sandbox \(none\): limits alone.*allow_weak",
    ) as caught:
        get_task("code", {}).check_machine()  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
    allowed: Any = get_task("code", {"allow_weak_sandbox": True})
    assert "limits alone" in allowed.check_machine()
