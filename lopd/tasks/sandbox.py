"""Runs untrusted programs, with their own files and with limits. Linux only.

A program has no network, and limits on time, memory, processes and output. Which protections hold
depends on what this machine permits; ``protections()`` tries them and says so. docs/tasks.md says
what they do not protect from.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from lopd.errors import ConfigError
from lopd.tasks.sandbox_process import Outcome, launch
from lopd.tasks.system_calls import kernel_facts

# What programs of the system need: libraries, the linker's cache, and the clock's zone.
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
# Programs that root starts get a user of their own, with a number that no account has: the kernel
# counts processes per user, and one program must not use up the limit of another. Numbers from
# 0x70000000 on are free on common systems.
_FIRST_UID = 1_879_048_192
_UIDS_PER_PROCESS = 512
_slots = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one program.

    Attributes:
        cpu_s: CPU seconds.
        wall_s: Seconds of the clock.
        memory_mb: MB of memory of each process.
        processes: Processes and threads at once.
        disk_mb: MB that it may write, all files together.
        file_mb: MB of one file, and of each of stdout and stderr.
    """

    cpu_s: float = 10.0
    wall_s: float = 30.0
    # Of each process, because the kernel has no limit of the sum for programs without cgroups.
    memory_mb: int = 1024
    processes: int = 16
    disk_mb: int = 64
    file_mb: int = 16


@dataclass(frozen=True, slots=True)
class Protections:
    """The protections that hold on this machine.

    Attributes:
        mode: namespaces, filters or none.
        network: The program cannot reach the network.
        files: Whether a program can reach only its own files and those of the system.
        processes: No process that it starts outlives it, and it cannot see or signal other
            processes.
        seccomp: A filter refuses system calls.
        landlock: Landlock limits the files.
        missing: The protections that were tried and do not work, with the reasons.
    """

    mode: str
    network: bool
    files: bool
    processes: bool
    seccomp: bool
    landlock: bool
    missing: tuple[str, ...] = ()

    @property
    def sufficient(self) -> bool:
        """Return whether a program has no network, and no files except its own and the system's."""
        # Processes and the rest are good to have, but a program that reaches neither network nor
        # files harms nobody.
        return self.network and self.files

    def describe(self) -> str:
        """Return one line for a log."""
        holds = {
            "no network": self.network,
            "files of its own": self.files,
            "processes of its own": self.processes,
            "seccomp": self.seccomp,
        }
        # Without any of them, rlimits are all that holds.
        words = ", ".join(name for name, yes in holds.items() if yes) or "limits alone"
        absent = f"; not available: {'; '.join(self.missing)}" if self.missing else ""
        return f"sandbox ({self.mode}): {words}{absent}"


def run(
    argv: Sequence[str],
    *,
    files: Mapping[str, str],
    stdin: bytes = b"",
    limits: Limits | None = None,
    packages: bool = False,
    protections_used: Protections | None = None,
) -> Outcome:
    """Run a program and wait for its end.

    Args:
        argv: The program and its arguments.
        files: Name and text of the files in its folder.
        stdin: The input of the program.
        limits: The limits of the program. None means the defaults.
        packages: Whether it may read what is installed in this environment.
        protections_used: The protections. None means the best ones of this machine.

    Raises:
        OSError: The sandbox could not be set up. The program cannot cause this.
    """
    limits = limits or Limits()
    held = protections_used or protections()
    # A copy, because the list is cached.
    readonly = list(readonly_folders())
    # The packages of this environment lie in its prefix, which need not be a folder of the system.
    if packages and sys.prefix not in readonly:
        readonly.append(sys.prefix)
    # The program may make files that only its own user can remove, hence ignore_cleanup_errors.
    with tempfile.TemporaryDirectory(prefix="lopd-run-", ignore_cleanup_errors=True) as folder:
        uid = 0
        # Only root can give each program a user of its own. Programs of one user could end each
        # other.
        if os.getuid() == 0:
            slot = next(_slots) % _UIDS_PER_PROCESS
            uid = _FIRST_UID + os.getpid() * _UIDS_PER_PROCESS + slot
        if held.mode != "namespaces" and uid:
            # In a mount namespace the program has /box instead, so the folder stays the parent's.
            os.chown(folder, uid, uid)
        spec = {
            "mode": held.mode,
            "argv": list(argv),
            "files": dict(files),
            "limits": asdict(_for_this_user(limits, held)),
            "readonly": readonly,
            "work": folder,
            "uid": uid,
            "seccomp": held.seccomp,
            "landlock": held.landlock,
            "kernel": kernel_facts(platform.machine()),
        }
        return launch(spec, stdin, wall_s=limits.wall_s, file_mb=limits.file_mb)


def _for_this_user(limits: Limits, held: Protections) -> Limits:
    """Return the limits with the number of processes that this user has already.

    Without a user or a namespace of its own, the kernel counts those too.
    """
    # A user namespace has its own count, and so has a user that runs nothing else.
    if held.mode == "namespaces" or os.getuid() == 0:
        return limits
    # RLIMIT_NPROC counts threads, and so does this sum.
    mine = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # A process may end while the list is read.
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid():
                    mine += len(os.listdir(f"/proc/{entry.name}/task"))
    return replace(limits, processes=limits.processes + mine)


def interpreter(held: Protections, *, packages: bool = False) -> str:
    """Return the Python that runs programs.

    It is the one behind this environment, with its standard library. Without ``packages`` nothing
    that was installed here is in its way.

    Args:
        held: The protections.
        packages: Whether programs may import what is installed here. Then it is this environment's
            own.
    """
    # The packages of an environment work only with its own interpreter.
    if packages:
        return sys.executable
    own = Path(os.path.realpath(sys.executable))
    if held.mode == "namespaces" or os.getuid() != 0:
        return str(own)
    # Root gives the program another user. That user cannot reach a Python below /root, so the
    # system's Python runs it.
    if all(folder.stat().st_mode & 0o001 for folder in own.parents):
        return str(own)
    return shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or str(own)


@cache
def readonly_folders() -> list[str]:
    """Return the folders that a program may read: the system's libraries, and its Python's."""
    python = os.path.realpath(sys.base_prefix)
    # A second bind inside /usr would need a folder there, which is read-only.
    is_inside = python.startswith(("/usr/", "/lib")) or python == "/usr"
    folders = _SYSTEM if is_inside else (*_SYSTEM, python)
    return [path for path in folders if os.path.lexists(path)]


@cache
def protections() -> Protections:
    """Try what this machine permits, best first, and return the first that works.

    In each mode a harmless program is run, and it must find that it is kept from network and files.
    """
    missing: list[str] = []
    # The columns: mode, network, files, processes, seccomp, landlock.
    for candidate in (
        Protections("namespaces", True, True, True, True, False),
        Protections("namespaces", True, True, True, False, False),
        Protections("filters", True, True, False, True, True),
        Protections("filters", True, False, False, True, False),
    ):
        # Tried and not looked up: whether a kernel permits a thing depends on settings and on
        # containers around it.
        reason = _try(candidate)
        if not reason:
            return replace(candidate, missing=tuple(missing))
        seccomp = " with seccomp" if candidate.seccomp else ""
        landlock = " and Landlock" if candidate.landlock else ""
        missing.append(f"{candidate.mode}{seccomp}{landlock} ({reason})")
    return Protections("none", False, False, False, False, False, tuple(missing))


# Prints 1 for each attempt that was refused: the network, a file of others, a file of the system.
_PROBE = """
import os, socket
def refused(attempt):
    try:
        attempt()
    except OSError:
        return 1
    return 0
open("mine", "w").close()
print(
    refused(lambda: socket.create_connection(("127.0.0.1", int(PORT)), 2)),
    refused(lambda: open(SECRET)),
    refused(lambda: open("/usr/lopd-probe", "w")),
)
"""


def _try(candidate: Protections) -> str:
    """Return why a mode does not work here, or "" if it works."""
    import socket

    folder = tempfile.mkdtemp(prefix="lopd-probe-")
    try:
        # Every user of this machine may read this file. Only the sandbox can keep it closed.
        os.chmod(folder, 0o755)
        secret = Path(folder, "secret")
        secret.write_text("secret")
        secret.chmod(0o644)
        # A server that listens: on an open network the connection would succeed.
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            port = server.getsockname()[1]
            # The program has no arguments and no variables, so the values are written into it.
            code = _PROBE.replace("PORT", str(port)).replace("SECRET", repr(str(secret)))
            # A mode that sets itself up without an error may still protect from nothing, for
            # example inside another container. Only an attempt tells.
            outcome = run(
                [interpreter(candidate), "-I", "main.py"],
                files={"main.py": code},
                limits=Limits(cpu_s=10, wall_s=30),
                protections_used=candidate,
            )
    except OSError as error:
        # The reason is part of a longer line.
        return str(error).replace("the sandbox could not be set up: ", "")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = outcome.stdout.split()
    if len(found) != 3:
        said = outcome.stderr[-200:].decode(errors="replace")
        return f"the probe ended with {outcome.code}: {said}"
    reachable = []
    if candidate.network and found[0] != b"1":
        reachable.append("network")
    if candidate.files and found[1] != b"1":
        reachable.append("files")
    return f"does not cut off {' and '.join(reachable)}" if reachable else ""


def require(allow_weak: bool) -> Protections:
    """Return how this machine protects itself from code that a model wrote.

    Args:
        allow_weak: Whether too few protections are accepted.

    Raises:
        ConfigError: The protections are too few to run code that a model wrote.
    """
    # Cached: the attempts take seconds, and what a machine permits does not change.
    held = protections()
    if not held.sufficient and not allow_weak:
        raise ConfigError(
            f"this machine cannot run the code of a model safely: {held.describe()}",
            where="task code",
            limit="the code must have no network and no access to other files",
            remedy=(
                "permit user namespaces (sysctl user.max_user_namespaces) or Landlock, "
                "run lopd in a separate container, or set "
                "task.options.allow_weak_sandbox=true"
            ),
        )
    return held
