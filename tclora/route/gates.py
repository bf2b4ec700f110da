"""One adapter for all clusters: shared factors, and a gate on its components for each cluster.

Symbols: K clusters, R components of a module, B (d_out, R) and A (R, d_in) its shared factors,
g_k (R,) the gate of cluster k, G_k (d_in, d_in) the Gram matrix of its inputs. The update for an
input with routing weights π is B diag(Σ_k π_k g_k) A; gates of 1 give the static merge B A.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tclora.activations.collect import ActivationStatistics
from tclora.activations.metric import InputMetrics
from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import check_adapters, check_finite, module_factors, module_names
from tclora.errors import AdapterError

# Directions of the normal equations below this share of the largest carry no information.
_TOLERANCE = 1e-7

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GatedAdapter:
    """A static merge and, per cluster, a gate on its components.

    Attributes
    ----------
    adapter : Adapter
        The static merge: what a gate of 1 gives, and what stock PEFT loads.
    gates : Mapping[str, Tensor]
        Module path → gates of shape (K, R), float32; R may differ between modules.
    names : tuple of str
        Adapter names of the clusters, in the order of the gates' rows.
    """

    adapter: Adapter
    gates: Mapping[str, Tensor]
    names: tuple[str, ...]

    def mixed(self, weights: Sequence[float] | Tensor, name: str = "mixed") -> Adapter:
        """Return the plain LoRA of one mixture of clusters, B diag(Σ_k π_k g_k) A.

        Parameters
        ----------
        weights : K floats
            π, usually of sum 1.
        name : str
            Name of the result.

        Raises
        ------
        ValueError
            If there is not one finite weight per cluster.
        """
        pi = torch.as_tensor(weights, dtype=torch.float64)
        if pi.shape != (len(self.names),) or not pi.isfinite().all():
            raise ValueError(
                f"weights must be {len(self.names)} finite numbers, one for each of "
                f"{', '.join(self.names)}, got {pi.tolist()}"
            )
        modules = {
            module: LoraFactors(B * (pi @ self.gates[module].double()).to(B), A)
            for module, (B, A) in self.adapter.modules.items()
        }
        return Adapter(name, modules, self.adapter.base_model)

    def cluster(self, cluster: str | int) -> Adapter:
        """Return the plain LoRA of one cluster, given by its adapter's name or its number.

        Raises
        ------
        ValueError
            If there is no such cluster.
        """
        known = dict(enumerate(self.names)) | {name: name for name in self.names}
        if cluster not in known:
            raise ValueError(
                f"cluster must be one of {', '.join(self.names)} or a number below "
                f"{len(self.names)}, got {cluster!r}"
            )
        name = known[cluster]
        return self.mixed([float(other == name) for other in self.names], name)


def fit_gates(
    adapters: Sequence[Adapter],
    merged: Adapter,
    statistics: ActivationStatistics | None = None,
    progress: Progress | None = None,
) -> GatedAdapter:
    """Fit the gates of every cluster on the components of a merge.

    Parameters
    ----------
    adapters : sequence of K Adapter
        The clusters' own adapters.
    merged : Adapter
        A merge of them; its components are the shared factors.
    statistics : ActivationStatistics, optional
        The clusters' activation statistics; without them every input direction counts alike.
    progress : callable, optional
        Called with (modules done, modules in all).

    Returns
    -------
    GatedAdapter

    Raises
    ------
    AdapterError
        If the merge does not have the adapters' modules, or a factor is not finite.

    Notes
    -----
    g_k minimises ‖(Δ_k − B diag(g) A) G_k^{1/2}‖², a linear least squares problem of R unknowns:
    ((Bᵀ B) ∘ (A G_k Aᵀ)) g = diag(Bᵀ Δ_k G_k Aᵀ). As g = 1 is among its candidates, a cluster's
    gated update is never farther from its own one, in its own input metric, than the static merge.
    """
    check_adapters(adapters)
    check_finite(merged)
    names = module_names(adapters)
    if set(merged.modules) != set(names):
        raise AdapterError(
            f"the merge must have the {len(names)} modules of the adapters, got "
            f"{len(merged.modules)}"
        )
    clusters = [adapter.name for adapter in adapters]
    equal = torch.full((len(adapters),), 1 / len(adapters))
    metrics = InputMetrics(statistics, clusters, equal) if statistics else None
    gates, shared = {}, {}
    for done, module in enumerate(names, 1):
        shared[module] = merged.modules[module]
        own = module_factors(adapters, module)
        grams = metrics.of(module).grams if metrics else None
        gates[module] = _fit_module(shared[module], own, grams).float()
        if progress:
            progress(done, len(names))
    adapter = Adapter(merged.name, shared, merged.base_model)
    return GatedAdapter(adapter, gates, tuple(clusters))


def _fit_module(shared: LoraFactors, own: Sequence[LoraFactors], grams: Tensor | None) -> Tensor:
    """Solve the normal equations of all clusters; gates (K, R)."""
    B, A = shared.B.double(), shared.A.double()
    # Components are scaled to norm 1, so that a weak one is not taken for a redundant one.
    norms = (B.norm(dim=0) * A.norm(dim=1)).clamp_min(torch.finfo(B.dtype).tiny)
    rows = []
    for k, factors in enumerate(own):
        read = A if grams is None else A @ grams[k]  # A G_k, (R, d_in)
        normal = (B.mT @ B) * (read @ A.mT) / norms / norms[:, None]
        right = ((B.mT @ factors.B.double()) * (read @ factors.A.double().mT)).sum(1) / norms
        inverse = torch.linalg.pinv(normal, rtol=_TOLERANCE, hermitian=True)
        rows.append(inverse @ right / norms)
    return torch.stack(rows)
