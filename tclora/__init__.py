"""Tensorized Clustered LoRA: cluster-specialised adapters, jointly factorised and merged.

Implements TC-LoRA (Tensorized Clustered LoRA Merging for Multi-Task Interference,
arXiv 2508.03999). Pure functions over arrays, frames and files; the Prefect flows and MLflow
logging that chain them live in the packages ``flows`` and ``tasks``.
"""

from typing import TYPE_CHECKING, Any

from tclora.version import __version__

if TYPE_CHECKING:
    from tclora.route.model import load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `load` when it is asked for: it needs torch and transformers."""
    if name == "load":
        from tclora.route.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
