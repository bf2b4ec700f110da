"""Merging LoRA adapters in factor space: a registry of methods and the engine that runs them."""

import tclora.merge.methods  # noqa: F401  (registers them)
from tclora.merge.engine import Merge, merge
from tclora.merge.registry import MethodInfo, methods, register

__all__ = ["Merge", "MethodInfo", "merge", "methods", "register"]
