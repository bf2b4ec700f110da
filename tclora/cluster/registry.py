"""The registry of clusterers: one decorated function per way to divide rows among adapters.

Symbols: N rows, D embedding width, K clusters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Vectors
from tclora.config import ClusterConfig
from tclora.registry import Registry

if TYPE_CHECKING:  # what needs the model is imported by what uses it
    from tclora.cluster.features.request import FeatureRequest, Features
    from tclora.jobs.call import EventCallback


@dataclass(frozen=True)
class Rows:
    """Rows to cluster, or to assign to clusters.

    Attributes
    ----------
    vectors : array or VectorFile of float32, shape (N, D)
        Unit-norm embeddings of the prompts; `numpy.asarray` reads those of a file into memory.
    tasks : sequence of N str or None
        Task labels, as far as there are any.
    features : array or VectorFile of float32, shape (N, F), optional
        What the base model says of the rows, for clusterers that asked for it; unit norm.
    """

    vectors: Vectors
    tasks: Sequence[str | None]
    features: Vectors | None = None

    def __len__(self) -> int:
        return len(self.vectors)


class HeldOut(Protocol):
    """Gives held-out rows the cluster whose adapter answers for them."""

    def __call__(self, rows: Rows, nearest: Labels, training: Labels) -> Labels:
        """Return the clusters of held-out rows.

        Parameters
        ----------
        rows : Rows
            Held-out rows.
        nearest : ndarray of int64, shape (N,)
            Their nearest centroids.
        training : ndarray of int64
            Final clusters of the training rows, small ones merged; -1 for dropped noise.
        """


def to_nearest(rows: Rows, nearest: Labels, training: Labels) -> Labels:
    """Give held-out rows the nearest centroid: right for clusters of similar prompts."""
    return nearest


@dataclass(frozen=True)
class Groups:
    """What a clusterer returns.

    Attributes
    ----------
    labels : ndarray of int64, shape (N,)
        Cluster of each training row, any numbers from 0; -1 for noise that is not trained on.
    notices : tuple of str
        What the user should know of how they came about.
    held_out : HeldOut
        Assigns held-out rows; to the nearest centroid by default.
    """

    labels: Labels
    notices: tuple[str, ...] = ()
    held_out: HeldOut = to_nearest


# Divides the training rows, (rows, config, seed) → groups.
ClusterFunction = Callable[[Rows, ClusterConfig, int], Groups]

# Computes features of the training rows with the base model, (request, on_event) → (N, F).
FeatureFunction = Callable[["FeatureRequest", "EventCallback"], "Features"]

# Says what is wrong with settings for a clusterer, before anything starts.
Check = Callable[[ClusterConfig], list[str]]


@dataclass(frozen=True)
class Clusterer:
    """A registered clusterer: its function, what it asks of the settings, what of the model."""

    function: ClusterFunction
    check: Check
    features: FeatureFunction | None = None
    counts: bool = True


clusterers: Registry[Clusterer] = Registry(
    "clusterer", lambda entry: (entry.function.__doc__ or "").partition("\n")[0]
)


def _any_settings(_: ClusterConfig) -> list[str]:
    return []


def register(
    name: str,
    *,
    check: Check = _any_settings,
    features: FeatureFunction | None = None,
    counts: bool = True,
) -> Callable[[ClusterFunction], ClusterFunction]:
    """Register a function as a clusterer; the first line of its docstring is its summary.

    Parameters
    ----------
    name : str
        What configurations call it.
    check : callable
        Returns a message per setting that does not suit it, each naming its key.
    features : callable, optional
        Computes what it divides rows by with the base model; runs as a job before it.
    counts : bool
        Whether ``cluster.k`` counts, rather than K coming from the rows alone.

    Raises
    ------
    ValueError
        If the name is taken.
    """
    enter = clusterers.register(name)

    def add(function: ClusterFunction) -> ClusterFunction:
        enter(Clusterer(function, check, features, counts))
        return function

    return add
