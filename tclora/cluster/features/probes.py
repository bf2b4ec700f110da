"""Probe adapters: where a short training on a shard of the rows takes an adapter.

Model-based clustering (MBC) trains a LoRA per task, flattens it and clusters the singular vectors'
subspace. Here a shard is a task, or a small cluster of similar prompts where there are no labels;
updates Δ_i = B_i A_i are compared by their exact inner products, summed over modules, which do not
change with the factors' gauge. Coordinates whose inner products are the cosines are those of the
singular value decomposition of the normalised, flattened updates.

Symbols: N rows, P shards.

References
----------
.. [1] Ostapenko et al., "Towards Modular LLMs by Building and Routing a Library of LoRAs", ICML
   2024.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from tclora.adapter import Adapter, read_adapter
from tclora.cluster.centroids import Labels
from tclora.cluster.features.request import FeatureRequest, Features
from tclora.errors import DataError
from tclora.jobs.call import Event, EventCallback
from tclora.train.engines import AdapterRequest, train_adapters

ENGINE = "together"  # all probes in the same batches


def probe_coordinates(request: FeatureRequest, on_event: EventCallback) -> Features:
    """Return every row's coordinates: those of the probe adapter of its shard.

    Returns
    -------
    ndarray of float32, shape (N, P)
        Of unit norm; equal for the rows of a shard.
    """
    frame = request.frame()
    shards = shard_rows(request, frame)
    adapters = _train_probes(request, frame, shards, on_event)
    return coordinates(adapters)[shards]


def shard_rows(request: FeatureRequest, frame: pd.DataFrame) -> Labels:
    """Return each row's shard: its task, or its small cluster of similar prompts.

    Raises
    ------
    DataError
        If shards are to be tasks and a row has none.
    """
    wanted = request.config.probe_shards
    if wanted == "task":
        if missing := int(frame["task"].isna().sum()):
            raise DataError(
                "cluster.probe_shards: task needs a task label on every training row, "
                f"{missing} lack one; give a number"
            )
        return np.asarray(pd.factorize(frame["task"], sort=True)[0], dtype=np.int64)
    from sklearn.cluster import KMeans

    vectors = np.asarray(request.vectors())
    count = min(int(wanted), len(vectors))
    labels = KMeans(count, n_init=1, random_state=request.seed).fit_predict(vectors)
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.int64)


def _train_probes(
    request: FeatureRequest, frame: pd.DataFrame, shards: Labels, on_event: EventCallback
) -> list[Adapter]:
    """Train a probe per shard, all from one A_0; return them in the shards' order."""
    steps = request.config.probe_steps
    own = {
        "max_steps": steps,
        "epochs": float(steps * request.adapter.batch_size),  # one row alone is enough
        "validation_fraction": 0.0,
        "patience": None,
    }
    config = request.adapter.model_copy(update=own)
    folder, names = request.scratch, [f"probe-{i}" for i in range(shards.max() + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    requests = []
    for i, name in enumerate(names):
        file = folder / f"{name}.parquet"
        frame.loc[shards == i, ["prompt", "response"]].to_parquet(file)
        requests.append(
            AdapterRequest(
                name=name,
                rows=file,
                target=folder / name,
                checkpoint=folder / f"{name}.part",
                seed=request.seed,
                init_seed=request.seed,
            )
        )
    done = dict.fromkeys(names, 0)

    def count(event: Event) -> None:
        done[event["name"]] += 1
        on_event({"done": sum(done.values()), "of": steps * len(names)})

    train_adapters(
        engine=ENGINE, base=request.base, requests=requests, config=config, on_event=count
    )
    return [read_adapter(folder / name) for name in names]


def coordinates(adapters: Sequence[Adapter]) -> Features:
    """Return coordinates (P, P) whose inner products are the cosines of the updates."""
    products = inner_products(adapters)
    norms = np.sqrt(np.diag(products))
    cosines = products / np.outer(norms, norms)
    values, vectors = np.linalg.eigh(cosines)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)), dtype=np.float32)


def inner_products(adapters: Sequence[Adapter]) -> NDArray[np.float64]:
    """Return Σ_m ⟨Δ_i, Δ_j⟩ of every two adapters of the same modules and rank, shape (P, P)."""
    count = len(adapters)
    total = torch.zeros(count, count, dtype=torch.float64)
    for module in adapters[0].modules:
        B = torch.cat([a.modules[module].B.double().mT for a in adapters])  # (P r, d_out)
        A = torch.cat([a.modules[module].A.double() for a in adapters])  # (P r, d_in)
        terms = (B @ B.mT) * (A @ A.mT)
        total += terms.reshape(count, -1, count, len(A) // count).sum((1, 3))
    return total.numpy()
