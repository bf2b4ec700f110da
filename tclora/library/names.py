"""The names that adapters and methods have, on disk, in tables and in the report."""

import re

JOINT = "joint"  # one LoRA trained on the rows of all clusters
BASE = "base"  # the base model, without any adapter
OWN = "own"  # every row by its own cluster's adapter
ROUTED = "routed"  # every prompt by its own route through the routed library
ORACLE = "oracle"  # the same, every prompt by its true cluster
REFERENCES = (BASE, OWN, JOINT)

_CLUSTER = "cluster-"


def unrefitted_name(method: str) -> str:
    """Return the name of a merge as it was before its component weights were refitted."""
    return f"{method}-unrefitted"


def cluster_name(number: int) -> str:
    """Return the adapter name of a cluster, "cluster-3" for 3."""
    return f"{_CLUSTER}{number}"


def cluster_number(name: str) -> int | None:
    """Return the number of the cluster an adapter was trained for; None for other adapters."""
    found = re.fullmatch(rf"{_CLUSTER}(0|[1-9][0-9]*)", name)
    return int(found[1]) if found else None
