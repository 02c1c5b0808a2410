"""Child processes that end with their parent. Uses only the standard library.

``lopd`` never starts a server or a trainer directly. It starts ``python -m lopd.processes CMD...``,
which is called the guard, in a new session. The guard leads a process group of its own, runs CMD in
that group, and reads a pipe whose other end only the parent holds. When the parent ends, even by
kill -9, the kernel closes the pipe and the guard kills its group. If the guard itself is killed,
the kernel kills CMD (PR_SET_PDEATHSIG).
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

# The option number of prctl(2) in <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1
# The environment variable that tells the guard the descriptor of its end of the pipe.
_GUARD_FD = "LOPD_GUARD_FD"


class GuardedProcess:
    """A command under a guard. The end of this process ends the whole group, as stop() does.

    Args:
        command: The program and its arguments.
        env: The complete environment of the command.
        output: Where stdout and stderr of the command go. None means to our own.
        cwd: The command's working directory. None means ours.

    Raises:
        OSError: The guard cannot be started, for example because cwd does not exist.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        output: IO[bytes] | int | None = None,
        cwd: Path | None = None,
    ) -> None:
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                # The same interpreter, so that the guard has this very version of the package.
                [sys.executable, "-m", "lopd.processes", *command],
                env={**env, _GUARD_FD: str(read_end)},
                # A server that reads from the terminal would take the keys that the user types.
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                # The write end is not passed on. If any child held it, the pipe would stay open
                # after our end.
                pass_fds=(read_end,),
                # A session of its own also keeps Ctrl-C in the terminal from reaching the group
                # directly: the parent decides how its children end.
                start_new_session=True,
                cwd=cwd,
            )
        # Nobody will call stop() on an object that was not made.
        except BaseException:
            os.close(self._write_end)
            raise
        finally:
            # The guard has a copy of its own. Ours would leak one descriptor per child.
            os.close(read_end)

    @property
    def pid(self) -> int:
        """The process id of the guard. It is also the id of the process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs.

        If a signal ended the command, the code is 128 plus the signal's number, as in a shell. If a
        signal ended the guard, which is the process that starts the command, the code is minus the
        signal's number.
        """
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the exit code (see poll()).

        Raises:
            subprocess.TimeoutExpired: The command still runs after timeout_s seconds.
        """
        return self._process.wait(timeout_s)

    def stop(self, grace_s: float = 5.0) -> None:
        """End the whole group: SIGTERM first, and SIGKILL after grace_s seconds for what is left.

        A second call does nothing.
        """
        # -1 marks a group that was ended before.
        if self._write_end < 0:
            return
        for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            # The group may have ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and group_alive(self.pid):
                # This reaps the guard. Nobody else does, and it would stay a zombie in the group.
                self._process.poll()
                time.sleep(0.02)
        self._process.poll()
        # Only now: closing the pipe earlier makes the guard kill its group without any grace.
        os.close(self._write_end)
        self._write_end = -1


def group_alive(group: int) -> bool:
    """Return whether the group has a process that is not a zombie."""
    return any(state not in "ZX" for state in _states(group))


def group_stopped(group: int) -> bool:
    """Return whether every remaining process of the group is stopped (by SIGSTOP)."""
    # Z is a zombie and X is dead. Both have ended and only wait to be reaped.
    left = [state for state in _states(group) if state not in "ZX"]
    return bool(left) and all(state in "Tt" for state in left)


def _states(group: int) -> Iterator[str]:
    """Yield the state letter of each process of the group, as in proc(5)."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # A process may end between the listing and the reading.
            with contextlib.suppress(OSError):
                # The program's name stands in parentheses and may hold spaces and parentheses
                # itself, so the fields are counted from the last one: state, parent, group.
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    yield fields[0]


def free_port() -> int:
    """Return a TCP port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        # Port 0 lets the kernel choose. Another process may take the port before our server binds
        # it; the server then fails to start, which its starter notices.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def port_taken(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether another process holds the TCP port."""
    with socket.socket() as probe:
        # A port whose last connections only wait for their timeout counts as free, as it does for a
        # server that sets the same option.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def last_lines(path: Path, count: int = 8) -> list[str]:
    """Return the last non-empty lines of a log, for an error message."""
    try:
        with path.open("rb") as handle:
            # The log of a server can have gigabytes. 64 KiB hold more than `count` lines.
            handle.seek(max(0, path.stat().st_size - 65536))
            # The seek may land within a character.
            text = handle.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends.

    The request stays in force after exec. Children of this process do not inherit it.

    Args:
        parent: The parent's process id, if the parent may have ended before this call.
    """
    # Python has no function for this system call.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The kernel reports only an end that comes after the request. After an earlier one this process
    # has another parent already.
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _guard(command: Sequence[str]) -> int:
    """Run the command, end its group when the parent ends, and return the exit code."""
    pipe = int(os.environ.pop(_GUARD_FD))
    # A signal to the group reaches the guard too. The guard must outlive the command, or nobody
    # would return the command's exit code. These are handlers and not SIG_IGN, because exec resets
    # handlers to the default and keeps SIG_IGN: the command must still end by SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    # The command asks for its own death between fork and exec, so there is no moment at which it
    # would survive the guard.
    child = subprocess.Popen(command, preexec_fn=partial(die_with_parent, os.getpid()))

    def watch() -> None:
        # The parent writes nothing, so a read returns only when the parent's end is closed.
        while os.read(pipe, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    # A daemon thread, because the guard must end with the command even while the pipe is open.
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    # The command may have left processes of its own behind in the group.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
