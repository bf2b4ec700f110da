"""Routers: what sends prompts to clusters, by registered name, and the file that keeps one.

A router is a class with `fit`, `route`, `save` and `load`, registered under a name::

    @routers.register("mine")
    class Mine: ...

Symbols: N prompts, D embedding width, K clusters.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tclora.cluster.centroids import Labels
from tclora.cluster.vectors import Embeddings
from tclora.errors import LibraryError
from tclora.files import sort_metadata
from tclora.registry import VARIABLE, Registry
from tclora.route.nearness import Abstention
from tclora.route.routing import Routing


class FitOptions(TypedDict, total=False):
    """What the configuration says to every router; each takes what it needs.

    Attributes
    ----------
    top_k : int or None
        Mix at most this many clusters.
    coverage : float
        Share of each cluster's rows that are to be known at least (0–1).
    abstention : Abstention
        How belonging falls with distance; see `tclora.route.nearness.Abstention`.
    seed : int
        Seed of anything random.
    """

    top_k: int | None
    coverage: float
    abstention: Abstention
    seed: int


@dataclass(frozen=True)
class RouterState:
    """A router as plain values.

    Attributes
    ----------
    arrays : Mapping[str, ndarray]
        Its arrays by name.
    settings : Mapping
        Everything else, as JSON can hold it.
    """

    arrays: Mapping[str, NDArray[Any]]
    settings: Mapping[str, Any]


class Router(Protocol):
    """Sends prompts to clusters by their embeddings."""

    @classmethod
    def fit(cls, vectors: Embeddings, labels: Labels, **options: Unpack[FitOptions]) -> Self:
        """Calibrate a router on the rows that were clustered.

        Parameters
        ----------
        vectors : ndarray of float32, shape (N, D)
            Unit-norm embeddings of the training prompts.
        labels : ndarray of int64, shape (N,)
            Their clusters, 0 … K-1; -1 for rows that belong to none.
        **options
            See `FitOptions`.
        """

    def route(self, vectors: Embeddings) -> Routing:
        """Route prompts by their embeddings, shape (N, D), by the model that was fitted on."""

    def save(self) -> RouterState:
        """Return the router as plain values."""

    @classmethod
    def load(cls, state: RouterState) -> Self:
        """Return the router that `save` gave.

        Raises
        ------
        LibraryError
            If the values are another router's and lack what this one needs.
        """


routers: Registry[type[Router]] = Registry("router")


def fit_router(
    vectors: Embeddings, labels: Labels, *, router: str = "nearest", **options: Unpack[FitOptions]
) -> Router:
    """Calibrate a router by its registered name; see `Router.fit`.

    Raises
    ------
    ValueError
        If no router has this name.
    """
    return routers[router].fit(vectors, labels, **options)


def derive(router: Router, name: str) -> Router:
    """Return another router on the stored values of one.

    Raises
    ------
    ValueError
        If no router has this name.
    LibraryError
        If it needs values that this one does not have.
    """
    return routers[name].load(router.save())


def save_router(router: Router, path: Path) -> None:
    """Write a router with its registered name to a safetensors file."""
    state = router.save()
    save_file(
        {name: np.ascontiguousarray(array) for name, array in state.arrays.items()},
        path,
        metadata={
            "router": routers.name_of(type(router)),
            "module": type(router).__module__,
            "settings": json.dumps(dict(state.settings)),
        },
    )
    sort_metadata(path)


def load_router(path: Path, name: str | None = None) -> Router:
    """Read a router.

    Parameters
    ----------
    path : Path
        What `save_router` wrote.
    name : str, optional
        Another router to make of its values; the stored one by default.

    Raises
    ------
    ValueError
        If no router has the name asked for.
    LibraryError
        If the stored router is not registered here, which names the module that registers it, or
        the one asked for cannot be made of its values.
    """
    with safe_open(path, framework="np") as file:
        stored = file.metadata() or {}
    settings = json.loads(stored["settings"])
    earlier = settings.pop("mode", None)  # its place in libraries of version 0.1.0
    own = stored.get("router", earlier)
    if name is None and own not in routers:
        raise LibraryError(
            f"{path}: its router {own!r} is registered by module {stored.get('module')!r}, which "
            f"is not loaded; install its package or name the module in ${VARIABLE}"
        )
    return routers[name or own].load(RouterState(load_file(path), settings))
