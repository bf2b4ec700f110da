"""The job that collects the activation statistics of every cluster."""

from pathlib import Path

from tclora.activations.collect import collect
from tclora.model.base import Base
from tclora.model.sample import Sample


def collect_clusters(
    *, base: Base, sample: Sample, modules: list[str], targets: dict[str, Path]
) -> dict[str, int]:
    """Collect the base model's activation statistics on rows of every cluster.

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

    Returns
    -------
    dict of str to int
        Cluster → tokens seen.
    """
    loaded = base.load()
    tokens: dict[str, int] = {}
    for cluster, target in targets.items():
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
