"""The job that collects the activation statistics of every cluster."""

from pathlib import Path

from tclora.activations.collect import collect
from tclora.adapter import read_adapter
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.model.sample import Sample


def collect_clusters(
    *,
    base: Base,
    sample: Sample,
    modules: list[str],
    targets: dict[str, Path],
    adapters: dict[str, Path],
) -> dict[str, int]:
    """Collect activation statistics on rows of every cluster.

    Parameters
    ----------
    base : Base
        The base model.
    sample : Sample
        The rows.
    modules : list of str
        Paths of the linear modules to watch.
    targets : dict of str to Path
        Cluster → file to write; see `ActivationStatistics.save`.
    adapters : dict of str to Path
        Cluster → adapter whose activations are meant; the base model's own for the others.

    Returns
    -------
    dict of str to int
        Cluster → tokens seen.
    """
    loaded = base.load()
    tokens: dict[str, int] = {}
    for cluster, target in targets.items():
        adapter = read_adapter(adapters[cluster]) if cluster in adapters else None
        with attached(loaded.model, adapter):
            statistics = collect(
                loaded.model,
                loaded.encode(sample.frame(cluster)),
                cluster,
                modules,
                pad_id=loaded.pad_id,
                token_budget=sample.token_budget,
            )
        statistics.save(target)
        tokens |= statistics.tokens
    return tokens
