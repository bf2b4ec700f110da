"""The clusterers that are registered here; one file each."""

from tclora.cluster.clusterers import hdbscan, kmeans, random, task  # noqa: F401
