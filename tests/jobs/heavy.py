"""A function for jobs about libraries that compute with threads."""

import torch
from threadpoolctl import threadpool_info


def thread_limits() -> list[int]:
    return [torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())]
