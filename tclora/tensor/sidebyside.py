"""Many small computations side by side: whole ones on each core, not one spread over all.

The matrices of a module's core are so small that threads within one operation cost as much as they
save, and wait for each other at its end: beside a busy process one of them is always late.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield ``work(item)`` for every item, in their order.

    Parameters
    ----------
    work : callable
        Runs in threads of its own, on one core each; what it raises is raised here.
    items : iterable
        Taken as they are needed.

    Notes
    -----
    As many items are in work at once as torch has threads, and no more finished ones wait to be
    taken: this bounds the memory. Results do not depend on the number of threads.
    """
    count = torch.get_num_threads()
    running: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)  # the initializer's number is also that of later threads
