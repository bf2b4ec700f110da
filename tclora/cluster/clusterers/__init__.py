"""The clusterers that are registered here; one file each."""

from tclora.cluster.clusterers import by_model, hdbscan, kmeans, random, task  # noqa: F401
