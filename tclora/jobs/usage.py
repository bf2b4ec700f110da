"""What a process uses of its machine: a sample now and then, in MLflow's names of system metrics.

Names are those of MLflow's own monitors, which take seconds to import, and two of the process
itself. GPUs are seen with ``nvidia-ml-py`` alone (``pip install tclora[gpu]``); their numbers are
NVML's, in the order of the PCI bus.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Self

import psutil

from tclora.jobs.call import Event, EventCallback
from tclora.jobs.repeating import Repeating

SAMPLE = "system"  # the only key of an event that is a sample
_MEGABYTE = 1e6


class Sample(NamedTuple):
    """What a process uses.

    Attributes
    ----------
    host : str
        Name of its machine.
    used : Mapping[str, float]
        Name → figure.
    """

    host: str
    used: Mapping[str, float]


def sorted_out(
    on_event: EventCallback | None, on_sample: Callable[[Sample], None] | None
) -> EventCallback:
    """Return a callback that hands samples to one and other events to another, or to nobody."""

    def hear(event: Event) -> None:
        if SAMPLE not in event:
            if on_event:
                on_event(event)
        elif on_sample:
            on_sample(Sample(*event[SAMPLE]))

    return hear


class Sampling(Repeating):
    """Tells what this process uses while a block runs.

    The last sample is told at the end of the block, so that a short one has a sample too.

    Parameters
    ----------
    tell : callable
        Takes a sample.
    pause : float
        Time between two samples (s); shares of a processor are means over it.
    family : bool
        Whether processes that it has started count too.
    """

    def __init__(
        self, tell: Callable[[Sample], None], pause: float = 10.0, *, family: bool = False
    ) -> None:
        super().__init__(lambda: tell(self._sample()), pause)
        self._process, self._gpus = psutil.Process(), list(_gpus())
        self._family = family
        self._children: dict[int, psutil.Process] = {}
        self._host = socket.gethostname()

    def __enter__(self) -> Self:
        psutil.cpu_percent()  # what is measured from here on
        self._process.cpu_percent()
        return super().__enter__()

    def _sample(self) -> Sample:
        memory = psutil.virtual_memory()
        cpu, resident = self._used()
        sample = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_cpu_utilization_percentage": cpu,  # of one core
            "process_memory_usage_megabytes": resident / _MEGABYTE,
        }
        for gpu in self._gpus:
            sample |= gpu()
        return Sample(self._host, {name: round(value, 1) for name, value in sample.items()})

    def _used(self) -> tuple[float, float]:
        """Return what is used: % of one core, and bytes."""
        children = self._process.children(recursive=True) if self._family else ()
        # Those that are known remember their former times.
        self._children = {child.pid: self._children.get(child.pid, child) for child in children}
        cpu = resident = 0.0
        for process in (self._process, *self._children.values()):
            with suppress(psutil.Error):  # it has ended
                cpu += process.cpu_percent()
                resident += process.memory_info().rss
        return cpu, resident


def _gpus() -> Iterator[Callable[[], dict[str, float]]]:
    """Yield for every GPU that this process may use a function that looks at it."""
    try:
        import pynvml
    except ImportError:
        return
    try:
        pynvml.nvmlInit()
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = range(pynvml.nvmlDeviceGetCount()) if named is None else named.split(",")
        handles = [_handle(pynvml, str(gpu).strip()) for gpu in ids if str(gpu).strip()]
    except pynvml.NVMLError:  # there is no driver, or no such GPU
        return
    for handle in handles:
        yield partial(_gpu_sample, pynvml, handle)


def _handle(nvml: Any, gpu: str) -> Any:  # noqa: ANN401
    """Return NVML's handle of a GPU, as CUDA_VISIBLE_DEVICES names it."""
    if gpu.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(gpu))
    return nvml.nvmlDeviceGetHandleByUUID(gpu)


def _gpu_sample(nvml: Any, handle: Any) -> dict[str, float]:  # noqa: ANN401
    """Return what is used of a GPU, as far as it tells: a part of one (MIG) does not tell all."""
    sample: dict[str, float] = {}
    try:
        name = f"gpu_{nvml.nvmlDeviceGetIndex(handle)}"
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        sample[f"{name}_memory_usage_percentage"] = 100 * memory.used / memory.total
        sample[f"{name}_memory_usage_megabytes"] = memory.used / _MEGABYTE
        sample[f"{name}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        sample[f"{name}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except nvml.NVMLError:
        return sample
    return sample
