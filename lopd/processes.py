"""Child processes that end with their parent, each by its own process group. Standard library only.

``lopd`` never starts a server or a trainer directly: it starts ``python -m lopd.processes CMD...``
(the guard) in a new session. The guard leads the group, runs CMD in it, and reads a pipe whose
other end only the parent holds. When the parent ends, in whatever way, kill -9 included, the pipe
closes and the guard kills its group. If the guard itself is killed, the kernel ends CMD
(PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_GUARD_FD = "LOPD_GUARD_FD"


class GuardedProcess:
    """A command under a guard. stop() ends the whole group; so does the end of this process."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        output: IO[bytes] | int | None = None,
        cwd: Path | None = None,
    ) -> None:
        """output: where stdout and stderr go (None: to ours). Raises OSError where the command
        cannot be started.
        """
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lopd.processes", *command],
                env={**env, _GUARD_FD: str(read_end)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                pass_fds=(read_end,),
                start_new_session=True,
                cwd=cwd,
            )
        except BaseException:
            os.close(self._write_end)
            raise
        finally:
            os.close(read_end)

    @property
    def pid(self) -> int:
        """Process id of the guard, which is the id of the group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code of the command (negative: signal), or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        return self._process.wait(timeout_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM to the group, SIGKILL after grace_s to what is left of it. Safe to call twice."""
        if self._write_end < 0:
            return
        for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and group_alive(self.pid):
                self._process.poll()  # reap the guard, or its zombie counts as alive
                time.sleep(0.02)
        self._process.poll()
        os.close(self._write_end)
        self._write_end = -1


def group_alive(group: int) -> bool:
    """True while a process of this group that is not a zombie exists."""
    return any(state not in "ZX" for state in _states(group))


def group_stopped(group: int) -> bool:
    """True where nothing of this group runs or waits: what is left of it was stopped (SIGSTOP)."""
    left = [state for state in _states(group) if state not in "ZX"]
    return bool(left) and all(state in "Tt" for state in left)


def _states(group: int) -> Iterator[str]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    yield fields[0]


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def last_lines(path: Path, count: int = 8) -> list[str]:
    """The last non-empty lines of a log, for an error message."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, path.stat().st_size - 65536))
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends; holds across exec, not for children.
    parent: its process id, where this may come after its end.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _guard(command: Sequence[str]) -> int:
    pipe = int(os.environ.pop(_GUARD_FD))
    signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # the group gets it too; stay until the command has ended
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)  # what the command left behind in the group
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
