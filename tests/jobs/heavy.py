"""A function for jobs whose module imports what trainings do."""

import torch
from threadpoolctl import threadpool_info

import tclora.train.engines  # noqa: F401


def thread_limits() -> list[int]:
    return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]
