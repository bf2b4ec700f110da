"""The walls of a sandbox: what a process gives up before it runs a program.

`isolate` runs in the supervisor and makes namespaces; `confine` in its child, the first process of
them. After `confine` the process has no capability, a user of its own, a root folder that holds the
standard library (read-only) and a scratch folder in memory, no network device, and limits that it
cannot raise. Works as root (namespaces directly, then an unused user id) and as any user that the
kernel lets make user namespaces.
"""

import os
import resource
import struct
import sys
from pathlib import Path

from tclora.evaluate.sandbox.kernel import call
from tclora.evaluate.sandbox.limits import Isolation, Limits
from tclora.evaluate.sandbox.syscalls import forbid_calls

# unshare: mounts, control groups, host name, IPC, process ids, network
_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
_NEW_USER = 0x10000000
_NOBODY = 65534
_UNUSED_USERS = 2_000_000_000  # from here on no system hands out ids; one per sandbox
_BIND, _RECURSIVE, _PRIVATE, _NOSUID, _NODEV = 4096, 16384, 1 << 18, 2, 4
_DETACH = 2
_MOUNT_SETATTR, _HERE, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_CAPBSET_DROP, _PR_SET_DUMPABLE, _PR_SET_PDEATHSIG, _SIGKILL = 24, 4, 1, 9
_CAPABILITIES_V3 = 0x20080522
# How many the kernel knows; read now, for there is no /proc in a sandbox.
_CAPABILITIES = 1 + int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SCRATCH = "/tmp"  # noqa: S108 - of the sandbox's own root


def isolate() -> None:
    """Give this process's children namespaces of their own.

    Raises
    ------
    OSError
        If the kernel does not let this user do it.
    """
    user, group = os.getuid(), os.getgid()
    if user == 0:
        call("unshare", _NAMESPACES)
        return
    call("unshare", _NAMESPACES | _NEW_USER)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1", encoding="ascii")


def confine(folder: str, limits: Limits, isolation: Isolation, *, number: int) -> None:
    """Shut this process in, for good.

    Parameters
    ----------
    folder : str
        An empty folder: where the new root is mounted, or the program's folder itself.
    limits : Limits
        What it may use.
    isolation : Isolation
        "full" needs `isolate` in the parent.
    number : int
        No other sandbox's at this time, such as the supervisor's process id.

    Raises
    ------
    OSError
        If anything is refused; nothing may be run then.
    """
    full, root = isolation == "full", os.getuid() == 0
    ids = Path("/proc/self/uid_map").read_text(encoding="ascii")
    user = unused_user(number, ids) if root else os.getuid()
    library = [path for path in sys.path if Path(path).is_dir()]
    os.umask(0o022)
    if full:
        _enter_root(folder, library, user, limits.disk_bytes)
    else:
        os.chdir(folder)
        if root:
            os.chown(folder, user, user)
    _set_limits(limits)
    if full or root:
        _drop_privileges(user)
    if not all(os.access(path, os.R_OK | os.X_OK) for path in library):
        raise PermissionError(f"user {user} cannot read the standard library in {library}")
    os.environ.clear()
    call("prctl", _PR_SET_DUMPABLE, 0)
    call("prctl", _PR_SET_PDEATHSIG, _SIGKILL)
    forbid_calls(allow_processes=full)


def unused_user(number: int, ids: str) -> int:
    """Return the user to be in place of root: one that owns no file and no other process.

    Parameters
    ----------
    number : int
        See `confine`.
    ids : str
        The kernel's ``uid_map``. In a container it may hold few ids; then it is nobody, whom other
        processes may be as well.
    """
    user = _UNUSED_USERS + number
    ranges = [tuple(map(int, line.split())) for line in ids.splitlines()]
    known = any(first <= user < first + count for first, _, count in ranges)
    return user if known else _NOBODY


def _enter_root(folder: str, library: list[str], user: int, room: int) -> None:
    """Make a root folder of the library, a few devices and `room` bytes to write; enter it."""
    call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    _mount_memory(folder, "size=1m,mode=0755")
    for path in (*_SYSTEM, *library, *_DEVICES):
        _show(path, folder)
    scratch = folder + _SCRATCH
    Path(scratch).mkdir(exist_ok=True)
    _mount_memory(scratch, f"size={room},nr_inodes=1024,mode=0700,uid={user},gid={user}")
    _restrict(folder, _ATTR_READ_ONLY)
    os.chdir(folder)
    call("pivot_root", b".", b".")  # the former root lies on top of the new one, ...
    call("umount2", b".", _DETACH)  # ... and is taken away
    os.chdir(_SCRATCH)


def _show(path: str, root: str) -> None:
    """Let a file or folder of the host appear in the new root, read-only."""
    source, target = Path(path), Path(root + path)
    if not source.exists() or target.exists():  # a part of what is shown already
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    call("mount", os.fsencode(source), os.fsencode(target), None, _BIND | _RECURSIVE, None)
    device = path in _DEVICES
    attributes = _ATTR_NOSUID if device else _ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV
    _restrict(str(target), attributes, recursive=True)


def _mount_memory(target: str, options: str) -> None:
    flags = _NOSUID | _NODEV
    call("mount", b"tmpfs", os.fsencode(target), b"tmpfs", flags, options.encode())


def _restrict(target: str, attributes: int, *, recursive: bool = False) -> None:
    """Set attributes of a mount, with all that is mounted below it if asked to."""
    wanted = struct.pack("=4Q", attributes, 0, 0, 0)  # struct mount_attr
    depth = _AT_RECURSIVE if recursive else 0
    call("syscall", _MOUNT_SETATTR, _HERE, os.fsencode(target), depth, wanted, len(wanted))


def _set_limits(limits: Limits) -> None:
    values = {
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_AS: limits.memory // limits.processes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, value in values.items():
        resource.setrlimit(kind, (value, value))


def _drop_privileges(user: int) -> None:
    """Give up root and every capability, also those that a program could get by others' files."""
    for capability in range(_CAPABILITIES):
        call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    call("capset", header, bytes(24))
