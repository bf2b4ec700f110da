"""The process above a sandbox: it starts the program, ends it, and keeps its output short.

It runs no line of the program. Whatever happens to those who started it, its control pipe closes,
and the sandbox ends with all that was started in it.
"""

import fcntl
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from tclora.evaluate.sandbox import program, tests
from tclora.evaluate.sandbox.confine import confine, isolate
from tclora.evaluate.sandbox.limits import Limits
from tclora.evaluate.sandbox.values import receive, send

_CONTROL, _REPORT = 0, 1  # the supervisor's own standard input and output
_GRACE = 0.5  # for a program to end when it is not needed any more (s)
_FIRST = 3  # the descriptors of a role begin here
_ROLES: dict[str, Callable[[str], None]] = {"program": program.main, "tests": tests.main}


def main() -> None:
    """Run one sandbox as the control pipe's message says, and report how it ended."""
    order = receive(_CONTROL)
    limits, isolation = Limits(**order["limits"]), order["isolation"]
    problem, trouble = os.pipe()
    output, written = os.pipe()
    try:
        if isolation == "full":
            isolate()
    except OSError as error:
        send(_REPORT, {"setup": str(error)})
        return
    number = os.getpid()
    child = os.fork()
    if not child:
        _become(order, limits, number, written, trouble)
    os.close(trouble)
    os.close(written)
    for descriptor in order["descriptors"]:
        os.close(descriptor)
    send(_REPORT, _follow(child, problem, output, limits))


def _become(order: dict[str, Any], limits: Limits, number: int, output: int, trouble: int) -> None:
    """Shut this process in and run its role; never returns."""
    try:
        _arrange([*order["descriptors"], trouble], output)
        trouble = _FIRST + len(order["descriptors"])
        confine(order["folder"], limits, order["isolation"], number=number)
    except BaseException:  # nothing may be run then, whatever it was
        os.write(trouble, traceback.format_exc().strip().encode()[-2000:])
        os._exit(1)
    os.close(trouble)
    try:
        _ROLES[order["role"]](order["text"])
    finally:
        sys.stdout.flush()
        os._exit(0)


def _arrange(descriptors: list[int], output: int) -> None:
    """Leave open: standard input (empty), output and errors, and the descriptors in their order."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    last = _FIRST + len(descriptors)
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, last) for descriptor in descriptors]
    for place, copy in enumerate(copies, start=_FIRST):
        os.dup2(copy, place)
    os.closerange(last, os.sysconf("SC_OPEN_MAX"))


def _follow(child: int, problem: int, output: int, limits: Limits) -> dict[str, Any]:
    """Wait for the end of a sandbox, or bring it about; say how it came."""
    ended, deadline = os.pidfd_open(child), time.monotonic() + limits.seconds
    poll = select.poll()
    for descriptor in (ended, output, problem, _CONTROL):
        poll.register(descriptor, select.POLLIN)
    kept: dict[int, bytes] = {output: b"", problem: b""}
    cause, late = "", "time"
    while not cause:
        ready = [d for d, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
        for descriptor in {output, problem}.intersection(ready):
            chunk = os.read(descriptor, 1 << 16)
            kept[descriptor] += chunk
            if not chunk:
                poll.unregister(descriptor)
        if len(kept[output]) > limits.output_bytes:
            cause = "output"
        elif ended in ready:
            cause = "end"
        elif _CONTROL in ready:  # its tests have ended; it will see that by itself, and soon
            poll.unregister(_CONTROL)
            deadline, late = min(deadline, time.monotonic() + _GRACE), "stopped"
        elif time.monotonic() >= deadline:
            cause = late
    os.kill(child, signal.SIGKILL)  # with the first process of a namespace the kernel ends all
    _, status = os.waitpid(child, 0)
    for descriptor in kept:  # what a pipe still held
        while chunk := os.read(descriptor, 1 << 16):
            kept[descriptor] += chunk
    return {
        "setup": kept[problem].decode(errors="replace"),
        "cause": cause,
        "code": os.waitstatus_to_exitcode(status),
        "output": kept[output][: limits.output_bytes].decode(errors="replace"),
    }


if __name__ == "__main__":
    main()
