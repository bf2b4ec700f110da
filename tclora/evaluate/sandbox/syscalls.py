"""A seccomp filter: system calls that a program in a sandbox has no use for fail with EPERM.

It closes what namespaces and resource limits leave open: sockets of any kind, memory that counts
for no process (memfd, System V and POSIX shared memory and queues), looking into other processes,
new namespaces (in which a program would have capabilities again), and interfaces of the kernel
beside system calls (io_uring, bpf). Numbers are the kernel's (``asm/unistd_64.h``,
``asm-generic/unistd.h``).
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

from tclora.evaluate.sandbox.kernel import call

_NAMES = (
    "socket", "memfd_create", "memfd_secret", "shmget", "msgget", "semget", "mq_open", "ptrace",
    "process_vm_readv", "process_vm_writev", "add_key", "request_key", "keyctl",
    "perf_event_open", "bpf", "userfaultfd", "io_uring_setup", "unshare", "setns",
)  # fmt: skip


class Machine(NamedTuple):
    """An architecture: its number, its calls, and what starts a process."""

    audit: int
    forbidden: dict[str, int]
    clone: int
    clone3: int
    forks: tuple[int, ...]


MACHINES = {
    "x86_64": Machine(
        0xC000003E,
        dict(zip(_NAMES, (41, 319, 447, 29, 68, 64, 240, 101, 310, 311, 248, 249, 250, 298, 321,
                          323, 425, 272, 308), strict=True)),
        56, 435, (57, 58),
    ),
    "aarch64": Machine(
        0xC00000B7,
        dict(zip(_NAMES, (198, 279, 447, 194, 186, 190, 180, 117, 270, 271, 217, 218, 219, 241, 280,
                          282, 425, 97, 268), strict=True)),
        220, 435, (),
    ),
}  # fmt: skip

_LOAD, _EQUAL, _ABOVE, _ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF operations
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # the other calling convention of x86-64
_THREAD, _NAMESPACES = 0x00010000, 0x7E020000  # flags of clone
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2

Instruction = tuple[int, int, int, int]  # operation, jump if true, jump if false, operand


def forbid_calls(*, allow_processes: bool) -> None:
    """Install the filter in this process, for good and for all it starts.

    Parameters
    ----------
    allow_processes : bool
        Let the program start processes; threads are allowed either way.

    Raises
    ------
    OSError
        If the machine is unknown or the kernel refuses.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no filter for processors of type {platform.machine()}")
    program = list(_program(machine, allow_processes))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    # struct sock_fprog, aligned as the compiler does
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", _PR_SET_SECCOMP, _FILTER_MODE, header)


def _program(machine: Machine, allow_processes: bool) -> Iterator[Instruction]:
    yield _LOAD, 0, 0, _ARCHITECTURE
    yield _EQUAL, 1, 0, machine.audit
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _NUMBER
    yield _ABOVE, 0, 1, _X32
    yield _RETURN, 0, 0, _KILL
    for number in (*machine.forbidden.values(), *(() if allow_processes else machine.forks)):
        yield _EQUAL, 0, 1, number
        yield _RETURN, 0, 0, _FAIL | errno.EPERM
    # The filter cannot see clone3's flags; without it the C library falls back to clone.
    yield _EQUAL, 0, 1, machine.clone3
    yield _RETURN, 0, 0, _FAIL | errno.ENOSYS
    yield _EQUAL, 1, 0, machine.clone
    yield _RETURN, 0, 0, _ALLOW
    yield _LOAD, 0, 0, _FIRST_ARGUMENT
    yield _ANY, 0, 1, _NAMESPACES
    yield _RETURN, 0, 0, _FAIL | errno.EPERM
    yield _ANY, 1, 0, _THREAD
    yield _RETURN, 0, 0, _ALLOW if allow_processes else _FAIL | errno.EPERM
    yield _RETURN, 0, 0, _ALLOW
