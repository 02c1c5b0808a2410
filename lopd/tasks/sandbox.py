"""Runs untrusted programs: without network, with their own files, and with limits on time, memory,
processes and output. Linux only.

Which protections hold depends on what this machine permits; ``protections()`` tries them out and
says so. docs/tasks.md says what they do not protect from.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lopd.errors import ConfigError

_LAUNCHER = str(Path(__file__).with_name("sandbox_launcher.py"))
_SYSTEM = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/etc/localtime",
)
# of programs started by root: a number of its own each, that no account has; limits of processes
# count per user
_FIRST_UID = 1_879_048_192
_slots = itertools.count()
_START_S = 20.0  # the launcher's own time, added to the program's limit: a busy machine


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. memory is per process; processes count threads; disk is all it may write,
    file one file (and each of stdout and stderr).
    """

    cpu_s: float = 10.0
    wall_s: float = 30.0
    memory_mb: int = 1024
    processes: int = 16
    disk_mb: int = 64
    file_mb: int = 16


@dataclass(frozen=True, slots=True)
class Protections:
    """What holds here. mode: namespaces, filters or none. missing: what was tried and why it does
    not work.
    """

    mode: str
    network: bool
    files: bool
    processes: bool  # nothing it starts outlives it, and it sees and signals no other process
    seccomp: bool
    landlock: bool
    missing: tuple[str, ...] = ()

    @property
    def sufficient(self) -> bool:
        """No network, and no files but its own and the system's."""
        return self.network and self.files

    def describe(self) -> str:
        """One line for a log."""
        holds = {
            "no network": self.network,
            "files of its own": self.files,
            "processes of its own": self.processes,
            "seccomp": self.seccomp,
        }
        words = ", ".join(name for name, yes in holds.items() if yes) or "limits alone"
        return f"sandbox ({self.mode}): {words}" + (
            f"; not available: {'; '.join(self.missing)}" if self.missing else ""
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """code: exit code, or minus the signal that ended the program; None where it was stopped at its
    time limit. stdout, stderr: bytes, cut at file_mb.
    """

    code: int | None
    stdout: bytes
    stderr: bytes
    cpu_s: float
    timed_out: bool


def run(
    argv: Sequence[str],
    *,
    files: Mapping[str, str],
    stdin: bytes = b"",
    limits: Limits | None = None,
    packages: bool = False,
    protections_used: Protections | None = None,
) -> Outcome:
    """Runs argv with these files in its folder. packages: it may read what is installed in this
    environment too.

    OSError: the sandbox itself could not be set up (never the program's doing).
    """
    limits, held = limits or Limits(), protections_used or protections()
    with tempfile.TemporaryDirectory(prefix="lopd-run-", ignore_cleanup_errors=True) as folder:
        uid = _FIRST_UID + os.getpid() * 512 + next(_slots) % 512 if os.getuid() == 0 else 0
        if held.mode != "namespaces" and uid:
            os.chown(folder, uid, uid)
        spec = {
            "mode": held.mode,
            "argv": list(argv),
            "files": dict(files),
            "limits": asdict(_for_this_user(limits, held)),
            "readonly": [
                *readonly_folders(),
                *([sys.prefix] if packages and sys.prefix not in readonly_folders() else []),
            ],
            "work": folder,
            "uid": uid,
            "seccomp": held.seccomp,
            "landlock": held.landlock,
        }
        return _launch(spec, stdin, limits)


def _for_this_user(limits: Limits, held: Protections) -> Limits:
    """Without a user of its own the limit of processes counts all that this user has already."""
    if held.mode == "namespaces" or os.getuid() == 0:
        return limits
    mine = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid():
                    mine += len(os.listdir(f"/proc/{entry.name}/task"))
    return replace(limits, processes=limits.processes + mine)


def _launch(spec: Mapping[str, Any], stdin: bytes, limits: Limits) -> Outcome:
    with contextlib.ExitStack() as opened:
        fds = {
            name: os.memfd_create(f"lopd-{name}")
            for name in ("spec", "status", "stdin", "stdout", "stderr")
        }  # the program's own limit bounds their size
        for descriptor in fds.values():
            opened.callback(os.close, descriptor)
        _fill(fds["spec"], json.dumps(spec).encode("utf-8", "surrogatepass"))
        _fill(fds["stdin"], stdin)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", _LAUNCHER, str(fds["spec"]), str(fds["status"])],
            stdin=fds["stdin"],
            stdout=fds["stdout"],
            stderr=fds["stderr"],
            pass_fds=(fds["spec"], fds["status"]),
            env={},
            start_new_session=True,
        )
        stuck = not _ended(process, limits.wall_s + _START_S)
        status = os.pread(fds["status"], 65536, 0)
        stdout, stderr = (
            _content(fds[name], limits.file_mb << 20) for name in ("stdout", "stderr")
        )
    about = json.loads(status) if status else {}
    if "failed" in about:
        raise OSError(f"the sandbox could not be set up: {about['failed']}")
    if not stuck and not status:
        raise OSError(
            f"the sandbox's launcher ended with {process.returncode}: {stderr[-300:].decode(errors='replace')}"
        )
    cpu = float(about.get("cpu_s", 0.0))
    code = None if stuck or about["code"] in (-signal.SIGPROF, -signal.SIGXCPU) else about["code"]
    return Outcome(code, stdout, stderr, cpu, timed_out=code is None)


def _ended(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    """False where the launcher did not end by itself, as it should soon after the limit; then
    everything it started is gone too.
    """
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        _kill(process)
        return False
    except BaseException:  # interrupted
        _kill(process)
        raise
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher and, with it, the program: the kernel ends a process space with its first
    process, and what stays is in the launcher's group.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fill(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _content(descriptor: int, limit: int) -> bytes:
    return os.pread(descriptor, min(limit, os.fstat(descriptor).st_size), 0)


# ---- what holds here
# ------------------------------------------------------------------------------------------------------------------------------


def interpreter(held: Protections, *, packages: bool = False) -> str:
    """The Python that programs run with: the one behind this environment, with its standard library
    and, without packages, nothing that was installed here.

    Where root starts programs without a root folder of their own and that Python lies where others
    may not go (/root): the system's.
    """
    if packages:
        return sys.executable
    own = Path(os.path.realpath(sys.executable))
    if (
        held.mode != "namespaces"
        and os.getuid() == 0
        and not all(folder.stat().st_mode & 0o001 for folder in own.parents)
    ):
        return shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or str(own)
    return str(own)


@cache
def readonly_folders() -> list[str]:
    """What a program may read: the system's programs and libraries, and the Python it runs with."""
    own = [
        path
        for path in dict.fromkeys([os.path.realpath(sys.base_prefix)])
        if not path.startswith(("/usr/", "/lib")) and path != "/usr"
    ]
    return [path for path in (*_SYSTEM, *own) if os.path.lexists(path)]


@cache
def protections() -> Protections:
    """Tries what this machine permits, best first: a harmless program is run in each mode and must
    find that it is cut off.
    """
    missing: list[str] = []
    for candidate in (
        Protections("namespaces", True, True, True, True, False),
        Protections("namespaces", True, True, True, False, False),
        Protections("filters", True, True, False, True, True),
        Protections("filters", True, False, False, True, False),
    ):
        reason = _try(candidate)
        if not reason:
            return replace(candidate, missing=tuple(missing))
        missing.append(
            f"{candidate.mode}{' with seccomp' if candidate.seccomp else ''}{' and Landlock' if candidate.landlock else ''} ({reason})"
        )
    return Protections("none", False, False, False, False, False, tuple(missing))


_PROBE = """
import os, socket
def refused(attempt):
    try:
        attempt()
    except OSError:
        return 1
    return 0
open("mine", "w").close()
print(refused(lambda: socket.create_connection(("127.0.0.1", int(PORT)), 2)), refused(lambda: open(SECRET)), refused(lambda: open("/usr/lopd-probe", "w")))
"""


def _try(candidate: Protections) -> str:
    """Why a mode does not work here, or nothing where it does."""
    import socket

    folder = tempfile.mkdtemp(prefix="lopd-probe-")
    try:
        os.chmod(folder, 0o755)
        secret = Path(folder, "secret")
        secret.write_text("secret")
        secret.chmod(0o644)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            code = _PROBE.replace("PORT", str(server.getsockname()[1])).replace(
                "SECRET", repr(str(secret))
            )
            limits = Limits(cpu_s=10, wall_s=30)
            outcome = run(
                [interpreter(candidate), "-I", "main.py"],
                files={"main.py": code},
                limits=limits,
                protections_used=candidate,
            )
    except OSError as error:
        return str(error).replace("the sandbox could not be set up: ", "")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = outcome.stdout.split()
    if len(found) != 3:
        return (
            f"the probe ended with {outcome.code}: {outcome.stderr[-200:].decode(errors='replace')}"
        )
    open_doors = [
        what
        for what, shut, needed in zip(
            ("network", "files"), found[:2], (candidate.network, candidate.files), strict=True
        )
        if needed and shut != b"1"
    ]
    return f"does not cut off {' and '.join(open_doors)}" if open_doors else ""


def require(allow_weak: bool) -> Protections:
    """The protections here. ConfigError: too few to run code that a model wrote, unless allow_weak."""
    held = protections()
    if not held.sufficient and not allow_weak:
        remedy = "permit user namespaces (sysctl user.max_user_namespaces) or Landlock, run in a container of its own, or set task.options.allow_weak_sandbox=true"
        raise ConfigError(
            f"code that a model wrote is not run here: {held.describe()}",
            where="task code",
            limit="no network, no foreign files",
            remedy=remedy,
        )
    return held
