"""One adapter for all clusters: shared factors, and a gate on its components for each cluster.

Symbols: K clusters, R components of a module, U (d_out, R) and V (R, d_in) with unit columns and
rows, g_k (R,) the gate of cluster k, s (R,) the static gate, G_k (d_in, d_in) the Gram matrix of
a cluster's inputs. The update for an input with routing weights π is U diag(Σ_k π_k g_k) V; the
static merge is U diag(s) V. Gates are numbers of their own, no ratios to the static ones: where
the clusters' loadings cancel, s is next to nothing and such a ratio without bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
        The static merge: what stock PEFT loads.
    gates : Mapping[str, Tensor]
        Module path → gates of its unit components, shape (K, R), float32; R may differ between
        modules.
    names : tuple of str
        Adapter names of the clusters, in the order of the gates' rows.

    Raises
    ------
    AdapterError
        If a gate is not finite.
    """

    adapter: Adapter
    gates: Mapping[str, Tensor]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for module, gates in self.gates.items():
            if not gates.isfinite().all():
                raise AdapterError(f"gates of {module} must be finite; fit them again")

    def components(self, module: str) -> LoraFactors:
        """Return a module's unit components U (d_out, R) and V (R, d_in), float64.

        A component of the static merge that is exactly zero stays zero: it has no direction.
        """
        B, A = (factor.double() for factor in self.adapter.modules[module])
        norms = B.norm(dim=0), A.norm(dim=1)
        b, a = (torch.where(norm > 0, norm, 1) for norm in norms)
        return LoraFactors(B / b, A / a[:, None])

    def static(self, module: str) -> Tensor:
        """Return the static gate of a module's unit components, shape (R,), float64."""
        return static_gate(self.adapter.modules[module])

    def mixed(self, weights: Sequence[float] | Tensor, name: str = "mixed") -> Adapter:
        """Return the plain LoRA of one mixture of clusters, U diag(Σ_k π_k g_k) V.

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
        modules = {}
        for module, factors in self.adapter.modules.items():
            U, V = self.components(module)
            gate = pi @ self.gates[module].double()
            modules[module] = LoraFactors((U * gate).to(factors.B), V.to(factors.A))
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


def static_gate(factors: LoraFactors) -> Tensor:
    """Return the size of each component of an update B A, ‖B[:, ρ]‖ ‖A[ρ]‖, shape (R,), float64."""
    sizes: Tensor = factors.B.double().norm(dim=0) * factors.A.double().norm(dim=1)
    return sizes


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
    g_k minimises ‖(Δ_k − U diag(g) V) G_k^{1/2}‖², a linear least squares problem of R unknowns:
    ((Uᵀ U) ∘ (V G_k Vᵀ)) g = diag(Uᵀ Δ_k G_k Vᵀ). As g = s is among its candidates, a cluster's
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
    shared = {module: merged.modules[module] for module in names}
    unit = GatedAdapter(Adapter(merged.name, shared, merged.base_model), {}, tuple(clusters))
    gates = {}
    for done, module in enumerate(names, 1):
        own = module_factors(adapters, module)
        grams = metrics.of(module).grams if metrics else None
        gates[module] = _fit_module(unit.components(module), own, grams).float()
        if progress:
            progress(done, len(names))
    return replace(unit, gates=gates)


def _fit_module(unit: LoraFactors, own: Sequence[LoraFactors], grams: Tensor | None) -> Tensor:
    """Solve the normal equations of all clusters; gates (K, R).

    The components are of norm 1, so that a weak one is not taken for a redundant one.
    """
    U, V = unit
    rows = []
    for k, factors in enumerate(own):
        read = V if grams is None else V @ grams[k]  # V G_k, (R, d_in)
        normal = (U.mT @ U) * (read @ V.mT)
        right = ((U.mT @ factors.B.double()) * (read @ factors.A.double().mT)).sum(1)
        inverse = torch.linalg.pinv(normal, rtol=_TOLERANCE, hermitian=True)
        rows.append(inverse @ right)
    return torch.stack(rows)
