"""Runs one untrusted program under protections; started by lopd.tasks.sandbox as a script, in a
process of its own. Standard library only, Linux only.

``sandbox_launcher.py SPEC_FD STATUS_FD``: SPEC_FD holds JSON (``mode``, ``argv``, ``files``,
``limits``, ``readonly``, ``work``, ``uid``); what became of the program goes to STATUS_FD as JSON.
The program's input and output are this process's own. Modes: ``namespaces`` gives it network,
process, mount, IPC and host name spaces of its own and a root of read-only binds and one tmpfs;
``filters`` holds it by Landlock alone. Both add rlimits, no_new_privs and a seccomp filter.
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

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SETUP_FAILED = 125
NOBODY = 65534

_libc = ctypes.CDLL(None, use_errno=True)
# numbers of system calls: x86_64, aarch64. Only those that cut the program off from what it must
# not touch
_CALLS = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "open_by_handle_at": (304, 265), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "quotactl": (179, 60), "swapon": (167, 224), "reboot": (169, 142), "personality": (135, 92), "kcmp": (312, 272), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_NAMESPACE_FLAGS = (
    CLONE_NEWNS
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET
    | 0x02000000
)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode(),
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        f"mount {target}",
    )


# ---- a root of its own
# ----------------------------------------------------------------------------------------------------------------------------


def build_root(spec: dict[str, Any]) -> None:
    """A tmpfs with the read-only folders, three devices and the writable folder /box of limited
    size; the former root is gone afterwards.
    """
    base = spec["work"]  # an empty folder outside, hidden by what is mounted over it here
    _mount("", "/", "", MS_REC | MS_PRIVATE)
    _mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in spec["readonly"]:
        _bind_readonly(path, base + path)
    os.makedirs(base + "/dev")
    for name in ("null", "zero", "urandom"):
        with open(f"{base}/dev/{name}", "w"):
            pass
        _mount(f"/dev/{name}", f"{base}/dev/{name}", "", MS_BIND)
    os.makedirs(base + "/box")
    _mount(
        "tmpfs",
        base + "/box",
        "tmpfs",
        MS_NOSUID | MS_NODEV,
        f"size={spec['limits']['disk_mb']}m,nr_inodes=4096,mode=1777",
    )
    if not os.path.lexists(base + "/tmp"):
        os.symlink("box", base + "/tmp")
    os.makedirs(base + "/.former")
    _check(
        _libc.syscall((155, 41)[_architecture()[0]], base.encode(), (base + "/.former").encode()),
        "pivot_root",
    )
    os.chdir("/")
    _check(_libc.umount2(b"/.former", MNT_DETACH), "umount")
    os.rmdir("/.former")
    _mount("", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _bind_readonly(source: str, target: str) -> None:
    if os.path.islink(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _mount(source, target, "", MS_BIND | MS_REC)
    attributes = struct.pack(
        "QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0
    )  # struct mount_attr: to set, to clear, propagation, userns
    at_recursive = 0x8000
    if (
        _libc.syscall(442, -100, target.encode(), at_recursive, attributes, len(attributes)) < 0
    ):  # Linux before 5.12, or not permitted
        _mount("", target, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def enter_namespaces(uid: int) -> None:
    """Spaces of its own. As root directly; others through a user namespace, in which they are
    ``nobody`` as soon as the program starts.
    """
    outside = os.getuid()
    spaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    if outside == 0 and uid:
        _check(_libc.unshare(spaces), "unshare")
        return
    group = os.getgid()
    _check(_libc.unshare(CLONE_NEWUSER | spaces), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {outside} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


# ---- filters
# --------------------------------------------------------------------------------------------------------------------------------------


def _architecture() -> tuple[int, int]:
    """Column in _CALLS and the kernel's constant. OSError: system calls of this machine are not
    known here.
    """
    try:
        return _ARCHITECTURES[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}") from None


def install_seccomp() -> None:
    """Sockets, tracing, mounts, namespaces, keys and kernel interfaces answer EPERM; other word
    sizes end the program.
    """
    column, audit = _architecture()
    load, jump_equal, jump_any_bit, jump_ge, answer = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill, refuse, unknown = (
        0x7FFF0000,
        0x80000000,
        0x00050000 | errno.EPERM,
        0x00050000 | errno.ENOSYS,
    )
    program = [(load, 0, 0, 4), (jump_equal, 1, 0, audit), (answer, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        program += [(jump_ge, 0, 1, 0x40000000), (answer, 0, 0, kill)]  # the x32 calls
    for numbers in _CALLS.values():
        program += [(jump_equal, 0, 1, numbers[column]), (answer, 0, 0, refuse)]
    program += [
        (jump_equal, 0, 1, _CLONE3[column]),
        (answer, 0, 0, unknown),
    ]  # its flags cannot be seen; libc then uses clone
    program += [
        (jump_equal, 0, 4, _CLONE[column]),
        (load, 0, 0, 16),
        (jump_any_bit, 0, 1, _NAMESPACE_FLAGS),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    program += [(answer, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _check(_libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0), "seccomp")


def landlock_version() -> int:
    """0 where the kernel has none."""
    return max(0, int(_libc.syscall(444, None, ctypes.c_size_t(0), 1)))


def install_landlock(readonly: list[str], work: str) -> None:
    """Files: read and run below ``readonly``, everything below ``work``, nothing elsewhere. From
    version 4 also no TCP, from 6 no signals outwards.
    """
    version = landlock_version()
    if version == 0:
        raise OSError(errno.ENOSYS, "Landlock is not there")
    every = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1
    tcp = 3 if version >= 4 else 0
    attributes = (
        struct.pack("Q", every)
        if version < 4
        else struct.pack("QQ", every, tcp)
        if version < 6
        else struct.pack("QQQ", every, tcp, 3)
    )
    ruleset = _check(
        _libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0),
        "landlock_create_ruleset",
    )
    read, read_file = 1 | 4 | 8, 1 | 4  # execute, read file, read folder
    device = ["/dev/null", "/dev/zero", "/dev/urandom"]
    for path, access in [
        *((path, read) for path in readonly),
        *((path, read_file | 2) for path in device),
        (work, every),
    ]:
        if os.path.exists(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            kept = access if os.path.isdir(path) else access & (1 | 2 | 4)
            _check(
                _libc.syscall(445, ruleset, 1, struct.pack("=Qi", kept, descriptor), 0),
                f"landlock rule of {path}",
            )
            os.close(descriptor)
    _check(_libc.syscall(446, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def set_limits(limits: dict[str, Any]) -> None:
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
    signal.setitimer(
        signal.ITIMER_PROF, limits["cpu_s"]
    )  # stays across exec and ends the program; finer than the whole seconds of RLIMIT_CPU


# ---- running
# --------------------------------------------------------------------------------------------------------------------------------------


def run_program(spec: dict[str, Any], status: int) -> NoReturn:
    """Becomes the program. What fails before goes to ``status``."""
    try:
        home = "/box" if spec["mode"] == "namespaces" else spec["work"]
        os.chdir(home)
        for name, text in spec["files"].items():
            with open(name, "w", encoding="utf-8", errors="surrogatepass") as handle:
                handle.write(text)
        if os.getuid() == 0 and spec["uid"]:
            os.setgroups([])
            os.setresgid(spec["uid"], spec["uid"], spec["uid"])
            os.setresuid(spec["uid"], spec["uid"], spec["uid"])
        _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        set_limits(spec["limits"])
        if spec["landlock"]:
            install_landlock(spec["readonly"], spec["work"])
        if spec["seccomp"]:
            install_seccomp()
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": home,
            "TMPDIR": home,
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
        }
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        os.execve(spec["argv"][0], spec["argv"], environment)
    except BaseException as error:  # nothing of ours may go on as if it were the program
        os.write(status, json.dumps({"failed": str(error) or type(error).__name__}).encode())
    os._exit(SETUP_FAILED)


def wait_for(child: int) -> int:
    """Exit code, or minus the signal; other children that turn up are reaped on the way."""
    while True:
        found, status = os.wait()
        if found == child:
            return os.waitstatus_to_exitcode(status)


def end_descendants() -> None:
    """Ends what the program left behind; this process is the reaper of all of it."""
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
                    if int(handle.read().rpartition(")")[2].split()[1]) == mine:
                        found.append(int(entry))
            except OSError:
                pass
    return found


class _WallLimitError(Exception):
    pass


def _at_wall_limit(*_: object) -> NoReturn:
    raise _WallLimitError


def supervise(spec: dict[str, Any], status: int) -> None:
    """Starts the program below this process, ends it at the limit of the clock, and tells how it
    ended.
    """
    program = os.fork()
    if program == 0:
        run_program(spec, status)
    signal.signal(signal.SIGALRM, _at_wall_limit)
    try:
        signal.setitimer(signal.ITIMER_REAL, spec["limits"]["wall_s"])
        code: int | None = wait_for(program)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except _WallLimitError:
        os.kill(program, signal.SIGKILL)
        wait_for(program)
        code = None
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != SETUP_FAILED:
        text = {
            "code": code,
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
            "memory_mb": usage.ru_maxrss // 1024,
        }
        os.write(status, json.dumps(text).encode())


def main() -> int:
    spec_fd, status = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(spec_fd, "rb") as handle:
        spec = json.loads(handle.read())
    os.set_inheritable(status, False)
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        if spec["mode"] == "namespaces":
            enter_namespaces(spec["uid"])
            first = os.fork()
            if first == 0:  # process 1 of its space: when it ends, the kernel ends all others in it
                _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                try:
                    build_root(spec)
                except OSError as error:
                    os.write(status, json.dumps({"failed": str(error)}).encode())
                    os._exit(SETUP_FAILED)
                supervise(spec, status)
                os._exit(0)
            wait_for(first)
            return 0
        _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
        supervise(spec, status)
        end_descendants()
        return 0
    except OSError as error:
        os.write(status, json.dumps({"failed": str(error)}).encode())
        return SETUP_FAILED


if __name__ == "__main__":
    sys.exit(main())
