"""Dividing rows among adapters: embeddings, registered clusterers, centroids."""

import tclora.cluster.clusterers  # noqa: F401  (registers them)
