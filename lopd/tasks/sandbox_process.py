"""The process of a sandboxed program: how it gets its input, is waited for, and is ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A script that is started as a process of its own, not a module that is imported.
_LAUNCHER = str(Path(__file__).with_name("sandbox_launcher.py"))
# Seconds that the launcher itself may take on a busy machine, beside the program's limit.
_START_S = 20.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened to a program.

    Attributes:
        code: The exit code, or minus the signal that ended the program. None if it was stopped at
            its time limit.
        stdout: The output, cut at file_mb.
        stderr: The error output, cut at file_mb.
        cpu_s: The CPU seconds that it used.
        timed_out: Whether it was stopped at its time limit.
    """

    code: int | None
    stdout: bytes
    stderr: bytes
    cpu_s: float
    timed_out: bool


def launch(spec: Mapping[str, Any], stdin: bytes, *, wall_s: float, file_mb: int) -> Outcome:
    """Run a program by the launcher, and wait for its end.

    Args:
        spec: What to run, and under which protections, for sandbox_launcher.py.
        stdin: The input of the program.
        wall_s: The program's seconds of the clock.
        file_mb: MB of its stdout and of its stderr.

    Raises:
        OSError: The sandbox could not be set up.
    """
    with contextlib.ExitStack() as opened:
        # Files in memory instead of pipes: nobody has to read while the program runs, and its limit
        # of one file bounds their size.
        names = ("spec", "status", "stdin", "stdout", "stderr")
        fds = {name: os.memfd_create(f"lopd-{name}") for name in names}
        for descriptor in fds.values():
            opened.callback(os.close, descriptor)
        _fill(fds["spec"], json.dumps(spec).encode("utf-8", "surrogatepass"))
        _fill(fds["stdin"], stdin)
        # -I -S: no code of this user and no packages. An empty environment: it may hold keys. A
        # session of its own: it can be ended as a group.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _LAUNCHER, str(fds["spec"]), str(fds["status"])],
            stdin=fds["stdin"],
            stdout=fds["stdout"],
            stderr=fds["stderr"],
            pass_fds=(fds["spec"], fds["status"]),
            env={},
            start_new_session=True,
        )
        # The launcher itself keeps the limit of the clock. This one is for a launcher that hangs.
        stuck = not _ended(process, wall_s + _START_S)
        status = os.pread(fds["status"], 65536, 0)
        stdout = _content(fds["stdout"], file_mb << 20)
        stderr = _content(fds["stderr"], file_mb << 20)
    # A launcher that was killed has written nothing.
    about = json.loads(status) if status else {}
    if "failed" in about:
        raise OSError(f"the sandbox could not be set up: {about['failed']}")
    if not stuck and not status:
        said = stderr[-300:].decode(errors="replace")
        raise OSError(f"the sandbox's launcher ended with {process.returncode}: {said}")
    cpu = float(about.get("cpu_s", 0.0))
    # These two signals are the kernel's way to say that the CPU seconds are used up.
    code = None if stuck or about["code"] in (-signal.SIGPROF, -signal.SIGXCPU) else about["code"]
    return Outcome(code, stdout, stderr, cpu, timed_out=code is None)


def _ended(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """Wait for the launcher's end.

    Returns:
        False if it did not end by itself, as it should soon after the limit. Then it was killed
        with everything that it had started.
    """
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return False
    except BaseException:
        # The user has interrupted lopd. The program must not stay behind.
        _kill(process)
        raise
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher and with it the program.

    The kernel ends a namespace of processes together with its first process. Everything else is in
    the launcher's group.
    """
    with contextlib.suppress(ProcessLookupError):
        # The launcher leads a session, so its pid is that of its group.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fill(descriptor: int, content: bytes) -> None:
    # One write may take only a part.
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    # The reader shares the position of this descriptor.
    os.lseek(descriptor, 0, os.SEEK_SET)


def _content(descriptor: int, limit: int) -> bytes:
    return os.pread(descriptor, min(limit, os.fstat(descriptor).st_size), 0)
