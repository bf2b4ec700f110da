"""Everything that is registered, of every kind."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One registered variant.

    Attributes
    ----------
    kind : str
        What it is: merge method, router, clusterer, training engine, scorer.
    name : str
        What configurations call it.
    summary : str
        One line.
    module : str
        The module that defines it, ours or a plugin's.
    """

    kind: str
    name: str
    summary: str
    module: str


def variants() -> list[Variant]:
    """Return every registered variant by kind and name, those of plugins once they are loaded."""
    from tclora.cluster.registry import clusterers
    from tclora.evaluate.scorers import scorers
    from tclora.merge.registry import merge_methods
    from tclora.route.router import routers
    from tclora.train.engines import engines

    return [
        Variant(registry.kind, name, registry.summary(name), registry.module(name))
        for registry in (merge_methods, routers, clusterers, engines, scorers)
        for name in registry
    ]
