"""The system calls that the sandbox refuses, and the seccomp filter that refuses them.

The numbers come from Linux's own tables (unistd.h). Only those calls are refused that would reach
what a program must not touch. The filter is not a list of everything that a program may do.
"""

from __future__ import annotations

import errno
from typing import Any, TypeAlias

# Name -> number on x86_64 and on aarch64.
_REFUSED = {
    # The network. All sockets are refused, also those of Unix and of kernel interfaces.
    "socket": (41, 198),
    # The memory and the files of other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Another view of the files, and other namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "quotactl": (179, 60),
    # Keys, which belong to the user and not to the process.
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    # Large interfaces of the kernel, in which mistakes were often found. io_uring would also make
    # system calls that this filter does not see.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # The machine itself.
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "reboot": (169, 142),
    "personality": (135, 92),
    # Shared memory, queues and semaphores that outlive their process.
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
}
# Name of the machine -> its column above, and its constant AUDIT_ARCH_... .
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE = (56, 220)
_CLONE3 = (435, 435)

# The flags of clone that make namespaces: mount, cgroup, UTS, IPC, user, process, network.
_NAMESPACE_FLAGS = (
    0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
)

# Instructions of BPF: load a word; jump if equal, if any bit is set, if greater or equal; answer.
_LOAD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_ANY_BIT = 0x45
_JUMP_GREATER_EQUAL = 0x35
_ANSWER = 0x06
# Answers: SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, and SECCOMP_RET_ERRNO with an error.
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_UNKNOWN = 0x00050000 | errno.ENOSYS
# Offsets in struct seccomp_data: the call's number, the architecture, the first argument.
_AT_NUMBER = 0
_AT_ARCHITECTURE = 4
_AT_ARGUMENT = 16

Instruction: TypeAlias = tuple[int, int, int, int]


def filter_program(machine: str) -> list[Instruction] | None:
    """Return the seccomp filter for a machine, or None if its numbers are not known here.

    Sockets, tracing, mounts, namespaces, keys and kernel interfaces fail with EPERM. A call for
    another architecture ends the program.

    Args:
        machine: The name as platform.machine() gives it, for example "x86_64".

    Returns:
        Instructions of BPF: the code, the distances of a jump if true and if false, a constant.
    """
    # Numbers of system calls differ between architectures. A wrong filter would be worse than none.
    if machine not in _ARCHITECTURES:
        return None
    column, audit = _ARCHITECTURES[machine]
    # The same number means another call on another architecture, so that is compared first.
    program: list[Instruction] = [
        (_LOAD, 0, 0, _AT_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, audit),
        (_ANSWER, 0, 0, _KILL),
        (_LOAD, 0, 0, _AT_NUMBER),
    ]
    if machine == "x86_64":
        # x32 has a second set of numbers for the same calls, with this bit.
        program += [(_JUMP_GREATER_EQUAL, 0, 1, 0x40000000), (_ANSWER, 0, 0, _KILL)]
    # Refused and not killed: a library that tries such a call gets an error and goes on.
    for numbers in _REFUSED.values():
        program += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_ANSWER, 0, 0, _REFUSE)]
    # The flags of clone3 are in memory, where a filter cannot read them. ENOSYS makes libc use
    # clone instead, whose flags are in its first argument.
    program += [(_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_ANSWER, 0, 0, _UNKNOWN)]
    program += [
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _AT_ARGUMENT),
        (_JUMP_ANY_BIT, 0, 1, _NAMESPACE_FLAGS),
        (_ANSWER, 0, 0, _REFUSE),
        (_ANSWER, 0, 0, _ALLOW),
    ]
    program.append((_ANSWER, 0, 0, _ALLOW))
    return program


def kernel_facts(machine: str) -> dict[str, Any] | None:
    """Return what the sandbox's launcher must know of this machine's kernel, as JSON values.

    Returns:
        ``filter``, see filter_program, and ``pivot_root``, the number of a call that libc does not
        offer. None if the numbers of this machine are not known here.
    """
    program = filter_program(machine)
    if program is None:
        return None
    column, _ = _ARCHITECTURES[machine]
    return {"filter": program, "pivot_root": _REFUSED["pivot_root"][column]}
