"""Processes that train the same adapters, each on its share of every step's rows.

Each has a copy of the base model and of all adapters, on a GPU of its own or on its share of the
cores. Gradients are added up before the optimisers step, so that all copies stay the same (data
parallelism, as torch's DDP has it; there is no module to wrap here, since gradients lie in tensors
of ours). The first process leads: it alone writes files and tells of steps.
"""

import multiprocessing
import os
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

import tclora.errors
from tclora.errors import JobError, TcloraError
from tclora.jobs.call import Event, EventCallback
from tclora.registry import load_plugins

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_PAUSE = 0.2  # s between looks at the processes
_BUCKET = 2**24  # values that are added up at once
_EVENT, _RESULT, _ERROR = "event", "result", "error"
_Messages = Any  # a queue of (kind, content); multiprocessing's is no type


@dataclass(frozen=True)
class Team:
    """One of the processes that train together; by default it is alone.

    Attributes
    ----------
    rank, size : int
        Which it is, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it writes files and tells of steps."""
        return self.rank == 0

    def share(self, rows: Sequence[T], lengths: Sequence[int]) -> list[T]:
        """Return the rows of this process, in their order; all have about as many tokens."""
        if self.size == 1:
            return list(rows)
        loads, mine = [0] * self.size, []
        for index in sorted(range(len(rows)), key=lambda index: -lengths[index]):
            rank = loads.index(min(loads))
            loads[rank] += lengths[index]
            if rank == self.rank:
                mine.append(index)
        return [rows[index] for index in sorted(mine)]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sums over all processes in the place of tensors, added in fp32."""
        if self.size > 1:
            for some in _in_buckets(tensors):
                total = torch.cat([tensor.flatten().float() for tensor in some])
                torch.distributed.all_reduce(total)
                parts = total.split([tensor.numel() for tensor in some])
                for tensor, part in zip(some, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, to which they are the same bits."""
        if self.size == 1:
            return list(values)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def agrees(self, values: Sequence[float]) -> bool:
        """Return whether all processes have the same numbers."""
        squares = [value * value for value in values]
        sums = self.sums([*values, *squares])
        return sums == [self.size * value for value in [*values, *squares]]

    def wait(self) -> None:
        """Wait for the others to come here."""
        if self.size > 1:
            torch.distributed.barrier()


def _in_buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors, so many together that their sums are few and need little memory."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(map(torch.numel, some)) + tensor.numel() > _BUCKET:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


def run_team(
    size: int,
    function: Callable[Concatenate[Team, EventCallback, P], R],
    on_event: EventCallback,
    /,
    *args: P.args,
    **arguments: P.kwargs,
) -> R:
    """Run a function in so many processes at once; return what it returns to the first.

    Parameters
    ----------
    size : int
        Processes, each with a GPU where there are any, else with its share of this one's threads.
    function : callable
        At the top level of its module. Takes its team, a callback for events, and the arguments.
    on_event : callable
        Called with every event of the first process.
    *args, **arguments
        Must be picklable.

    Raises
    ------
    JobError
        If there are fewer GPUs, or a process dies or fails otherwise; the others are ended.
    TcloraError
        As the function raises it, if it is of `tclora.errors`.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and gpus < size:
        raise JobError(
            f"train.data_parallel must be at most the GPUs that a job has, got {size} for {gpus}; "
            "lower it"
        )
    messages = multiprocessing.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory(prefix="tclora-team-") as folder:
        place = f"file://{Path(folder).absolute()}/rendezvous"
        threads = max(1, torch.get_num_threads() // size)
        given = (size, threads, place, messages, function, args, arguments)
        started: Any = start_processes(_member, given, size, join=False, start_method="spawn")
        results: list[R] = []
        errors: list[tuple[str, str]] = []

        def hear(pause: float) -> bool:
            """Take a message, if one comes within so many seconds."""
            try:
                kind, content = messages.get(timeout=pause)
            except queue.Empty:
                return False
            if kind == _EVENT:
                on_event(content)
            else:
                (results if kind == _RESULT else errors).append(content)
            return True

        try:
            while not errors and not started.join(timeout=0):
                hear(_PAUSE)
            while hear(_PAUSE):  # what came with the end
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            while hear(_PAUSE):
                pass
            if not errors:
                raise JobError(
                    f"one of {size} processes that train together died: {error}; if memory "
                    "lacked, lower train.data_parallel or train.tokens_per_forward"
                ) from error
        finally:
            for process in started.processes:
                process.kill()
                process.join()
    if errors:
        kind, message = errors[0]
        raise getattr(tclora.errors, kind, JobError)(message)
    return results[0]


def _member(
    rank: int,
    size: int,
    threads: int,
    place: str,
    messages: _Messages,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    arguments: dict[str, Any],
) -> None:
    """Be one process of a team."""
    _end_with_parent()
    team = Team(rank, size)

    def tell(event: Event) -> None:
        if team.leads:
            messages.put((_EVENT, dict(event)))

    try:
        load_plugins()
        _meet(team, place, threads)
        result = function(team, tell, *args, **arguments)
    except (TcloraError, OSError) as error:
        named = isinstance(error, TcloraError)
        message = str(error) if named else f"{type(error).__name__}: {error}"
        messages.put((_ERROR, (type(error).__name__, message)))
        raise
    if team.leads:
        messages.put((_RESULT, result))
    team.wait()  # whoever ends first would end the others' connections
    torch.distributed.destroy_process_group()


def _meet(team: Team, place: str, threads: int) -> None:
    """Take a GPU, or a share of the threads, and find the other processes."""
    given: dict[str, Any] = {"rank": team.rank, "world_size": team.size, "init_method": place}
    if torch.cuda.is_available():
        torch.cuda.set_device(team.rank)
        # Named, so that NCCL takes its memory now, and not when a model has all of it.
        device = torch.device("cuda", team.rank)
        torch.distributed.init_process_group("nccl", device_id=device, **given)
    else:
        torch.set_num_threads(threads)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        torch.distributed.init_process_group("gloo", **given)


def _loopback() -> str:
    """Return the name of the network interface that reaches this machine alone."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return str(name)
    raise JobError("a network interface with the address 127.0.0.1 must be there, but is not")


def _end_with_parent() -> None:
    """End this process as soon as the one that has started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("must run in a process that was started by run_team")

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
