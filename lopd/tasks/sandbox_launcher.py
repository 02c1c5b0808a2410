"""Runs one untrusted program under protections. lopd.tasks.sandbox starts it in its own process.

It is a script with the standard library only, because it must start fast and must not load code
that the program could reach. Linux only.

``sandbox_launcher.py SPEC_FD STATUS_FD``: SPEC_FD is a descriptor with JSON (see
lopd.tasks.sandbox.run). What happened to the program is written to STATUS_FD as JSON. The program
has the input and output of this process.

There are two modes. ``namespaces`` gives the program its own network, processes, mounts, IPC and
host name, and a root folder of read-only binds and one tmpfs. ``filters`` keeps it from files by
Landlock alone. Both add rlimits, no_new_privs and a seccomp filter.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn

# Constants of Linux's headers, which Python does not have.
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_SPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

# System calls that libc may not offer. From 424 on, the numbers are the same on every processor.
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446

# Rights of Landlock.
_EXECUTE = 1
_WRITE_FILE = 2
_READ_FILE = 4
_READ_FOLDER = 8

# The exit code of a child that could not become the program. The reason is in STATUS_FD.
SETUP_FAILED = 125
# The user "nobody" of Linux.
NOBODY = 65534

# Python has no functions for these system calls, so they go through the C library.
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    # Without c_ulong, ctypes would pass the flags as a 32-bit int.
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode(),
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"mount {target}")


def build_root(spec: dict[str, Any]) -> None:
    """Make a root folder for the program, and enter it.

    It is a tmpfs with the read-only folders, three devices, and the writable folder /box of
    limited size. The previous root cannot be reached afterwards.
    """
    # An empty folder of the parent. What is mounted over it is seen only in this mount namespace.
    base = spec["work"]
    # Private, or the mounts below would appear in the machine's own namespace.
    _mount("", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in spec["readonly"]:
        _bind_readonly(path, base + path)
    # Devices cannot be made in a user namespace, so those of the machine are bound.
    os.makedirs(base + "/dev")
    for name in ("null", "zero", "urandom"):
        with open(f"{base}/dev/{name}", "w"):
            pass
        _mount(f"/dev/{name}", f"{base}/dev/{name}", "", MS_BIND)
    # The limit of inodes bounds what many empty files would take from the kernel's memory.
    os.makedirs(base + "/box")
    size = f"size={spec['limits']['disk_mb']}m,nr_inodes=4096,mode=1777"
    _mount("tmpfs", base + "/box", "tmpfs", MS_NOSUID | MS_NODEV, size)
    if not os.path.lexists(base + "/tmp"):
        os.symlink("box", base + "/tmp")
    # pivot_root and not chroot: a program can leave a chroot, but not a root without an earlier
    # one.
    former = base + "/.former"
    os.makedirs(former)
    number = _kernel(spec)["pivot_root"]
    _check(_libc.syscall(number, base.encode(), former.encode()), "pivot_root")
    os.chdir("/")
    _check(_libc.umount2(b"/.former", MNT_DETACH), "umount")
    os.rmdir("/.former")
    _mount("", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind_readonly(source: str, target: str) -> None:
    # /bin and /lib are links on many systems.
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
        return
    # A bind needs a target of the same kind.
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(source, target, "", MS_BIND | MS_REC)
    # struct mount_attr: flags to set, flags to clear, propagation, user namespace. Only this call
    # makes the mounts below the folder read-only too.
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    arguments = (AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, len(attributes))
    if _libc.syscall(SYS_MOUNT_SETATTR, *arguments) < 0:
        # Linux before 5.12 does not have it, and it may be forbidden.
        _mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def enter_namespaces(uid: int) -> None:
    """Enter new namespaces.

    Root enters them directly. Other users need a user namespace, in which they are ``nobody`` as
    soon as the program starts.

    Args:
        uid: The user that the program will have, if root starts it. 0 means none.
    """
    outside = os.getuid()
    # Root needs no namespace of users to make the others.
    if outside == 0 and uid:
        _check(_libc.unshare(_SPACES), "unshare")
        return
    group = os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | _SPACES), "unshare")
    # The kernel accepts a map of groups only after setgroups is denied.
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {outside} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


def _kernel(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what lopd.tasks.system_calls knows of this machine."""
    if spec["kernel"] is None:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    numbers: dict[str, Any] = spec["kernel"]
    return numbers


def install_seccomp(instructions: list[list[int]]) -> None:
    """Install the filter of system calls (lopd.tasks.system_calls.filter_program)."""
    # struct sock_filter: the code, the distances of a jump if true and if false, a constant.
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, six bytes of padding, a pointer to them.
    header = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    _check(_libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def landlock_version() -> int:
    """Return the version of the kernel's Landlock, or 0 if it has none."""
    return max(0, int(_libc.syscall(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def install_landlock(readonly: list[str], work: str) -> None:
    """Limit the files that this process may use.

    It may read and execute below ``readonly``, do everything below ``work``, and nothing
    elsewhere. From version 4 of Landlock on it may not use TCP either, and from version 6 on it
    may not send signals to other processes.
    """
    version = landlock_version()
    if version == 0:
        raise OSError(errno.ENOSYS, "Landlock is not there")
    # Version 1 has 13 rights of files, version 2 one more, and version 3 again one more. All of
    # them are taken away here; rules give some of them back.
    num_rights = 13 if version == 1 else 14 if version == 2 else 15
    every = (1 << num_rights) - 1
    # struct landlock_ruleset_attr grew: files, then TCP (bind and connect), then the scopes of
    # abstract sockets and signals.
    fields = [every]
    # A kernel refuses fields that it does not know, so each version gets its own.
    if version >= 4:
        fields.append(3)
    if version >= 6:
        fields.append(3)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _check(
        _libc.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset"
    )
    read = _EXECUTE | _READ_FILE | _READ_FOLDER
    device = _EXECUTE | _READ_FILE | _WRITE_FILE
    rules = [(path, read) for path in readonly]
    rules += [(path, device) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    rules.append((work, every))
    for path, access in rules:
        if os.path.exists(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            # The kernel refuses a rule that gives a file the rights of a folder.
            is_folder = os.path.isdir(path)
            kept = access if is_folder else access & (_EXECUTE | _WRITE_FILE | _READ_FILE)
            rule = struct.pack("=Qi", kept, descriptor)
            _check(
                _libc.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0),
                f"landlock rule of {path}",
            )
            os.close(descriptor)
    _check(_libc.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def set_limits(limits: dict[str, Any]) -> None:
    """Set the limits of this process and of all that it starts (lopd.tasks.sandbox.Limits)."""
    # The kernel counts whole seconds here. This is the bound behind the timer below.
    cpu = int(limits["cpu_s"]) + 1
    wanted = {
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (limits["memory_mb"] << 20,) * 2,
        resource.RLIMIT_FSIZE: (limits["file_mb"] << 20,) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (limits["processes"],) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    for name, value in wanted.items():
        resource.setrlimit(name, value)
    # This timer counts CPU time, stays across exec and ends the program. It knows parts of a
    # second.
    signal.setitimer(signal.ITIMER_PROF, limits["cpu_s"])


def run_program(spec: dict[str, Any], status: int) -> NoReturn:
    """Become the program. If something fails before that, the reason goes to ``status``."""
    try:
        home = "/box" if spec["mode"] == "namespaces" else spec["work"]
        os.chdir(home)
        for name, text in spec["files"].items():
            with open(name, "w", encoding="utf-8", errors="surrogatepass") as handle:
                handle.write(text)
        # Groups first: without root the process could not change them any more.
        if os.getuid() == 0 and spec["uid"]:
            os.setgroups([])
            os.setresgid(spec["uid"], spec["uid"], spec["uid"])
            os.setresuid(spec["uid"], spec["uid"], spec["uid"])
        # Landlock and seccomp need no_new_privs, and so a setuid program has no effect.
        _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        # Again, because a change of the user clears it.
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        set_limits(spec["limits"])
        # seccomp last: it refuses calls that the steps before need.
        if spec["landlock"]:
            install_landlock(spec["readonly"], spec["work"])
        if spec["seccomp"]:
            install_seccomp(_kernel(spec)["filter"])
        os.execve(spec["argv"][0], spec["argv"], _environment(home))
    except BaseException as error:
        # Nothing of ours may continue as if it were the program, whatever the error is.
        os.write(status, json.dumps({"failed": str(error) or type(error).__name__}).encode())
    os._exit(SETUP_FAILED)


def _environment(home: str) -> dict[str, str]:
    # None of the user's variables: they may hold keys. The fixed seed makes the order of sets the
    # same in every run, and more threads would only count against the limit of processes.
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def wait_for(child: int) -> int:
    """Return the exit code of a child, or minus the signal that ended it.

    Other children that end meanwhile are reaped.
    """
    while True:
        found, status = os.wait()
        if found == child:
            return os.waitstatus_to_exitcode(status)


def end_descendants() -> None:
    """End all processes that the program has left. This process is their reaper."""
    # A child may have started another one before it was killed, so this is repeated until no child
    # is left. The bound is for a process that the kernel cannot end.
    for _ in range(1000):
        children = _children()
        if not children:
            return
        for process in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def _children() -> list[int]:
    mine = os.getpid()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as handle:
                    # The name in parentheses may hold anything. Behind it: state, parent.
                    fields = handle.read().rpartition(")")[2].split()
                    if int(fields[1]) == mine:
                        found.append(int(entry))
            except OSError:
                # It has ended since the folder was listed.
                pass
    return found


class _WallLimitError(Exception):
    pass


def _at_wall_limit(*_: object) -> NoReturn:
    raise _WallLimitError


def supervise(spec: dict[str, Any], status: int) -> None:
    """Start the program, end it at the limit of the clock, and report how it ended."""
    program = os.fork()
    if program == 0:
        run_program(spec, status)
    signal.signal(signal.SIGALRM, _at_wall_limit)
    try:
        # A program that sleeps uses no processor time, so only a clock can end it.
        signal.setitimer(signal.ITIMER_REAL, spec["limits"]["wall_s"])
        code: int | None = wait_for(program)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _WallLimitError:
        os.kill(program, signal.SIGKILL)
        wait_for(program)
        code = None
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    # In that case the child itself has written the reason.
    if code != SETUP_FAILED:
        text = {
            "code": code,
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
            "memory_mb": usage.ru_maxrss // 1024,
        }
        os.write(status, json.dumps(text).encode())


def main() -> int:
    spec_fd = int(sys.argv[1])
    status = int(sys.argv[2])
    with os.fdopen(spec_fd, "rb") as handle:
        spec = json.loads(handle.read())
    # The program must not be able to write its own result.
    os.set_inheritable(status, False)
    # If lopd is killed, this process ends, and the program with it.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        if spec["mode"] == "namespaces":
            enter_namespaces(spec["uid"])
            first = os.fork()
            if first == 0:
                _run_first_process(spec, status)
            wait_for(first)
            return 0
        # Without a namespace of processes, orphans of the program come to this process.
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
        supervise(spec, status)
        end_descendants()
        return 0
    except OSError as error:
        os.write(status, json.dumps({"failed": str(error)}).encode())
        return SETUP_FAILED


def _run_first_process(spec: dict[str, Any], status: int) -> NoReturn:
    """Run as process 1 of the namespace. When it ends, the kernel ends all others in it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        build_root(spec)
    except OSError as error:
        os.write(status, json.dumps({"failed": str(error)}).encode())
        os._exit(SETUP_FAILED)
    supervise(spec, status)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
