"""Tensorized Clustered LoRA: cluster-specialised adapters, jointly factorised and merged.

Implements TC-LoRA (Tensorized Clustered LoRA Merging for Multi-Task Interference,
arXiv 2508.03999). Pure functions over arrays, frames and files; the Prefect flows and MLflow
logging that chain them live in the packages ``flows`` and ``tasks``.
"""

__version__ = "0.1.0"
