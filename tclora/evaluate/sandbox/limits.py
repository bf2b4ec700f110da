"""What a program in a sandbox may use."""

from typing import Literal, NamedTuple

_MIB = 1 << 20

# "full": namespaces of its own (no network, no process and no file of the host but the standard
# library, read-only). "process": neither network nor further processes, but the files of the
# machine are open to it as they are to the user it runs as.
Isolation = Literal["full", "process"]


class Limits(NamedTuple):
    """Limits of one sandbox; what exceeds them fails or is ended.

    Attributes
    ----------
    seconds : float
        Time until the sandbox is ended (s).
    cpu_seconds : int
        Processor time per process (s).
    memory : int
        Address space of all processes together (bytes); each may have its share.
    processes : int
        Processes and threads at a time, the program itself included.
    file_bytes : int
        Largest file (bytes).
    disk_bytes : int
        All files together (bytes), under the isolation "full".
    open_files : int
        Open files per process.
    output_bytes : int
        Longest output (bytes); a program that writes more is ended.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 2048 * _MIB
    processes: int = 4
    file_bytes: int = 16 * _MIB
    disk_bytes: int = 64 * _MIB
    open_files: int = 32
    output_bytes: int = _MIB
