"""One adapter for all clusters: shared factors, and a gate on its components for each cluster.

Symbols: K clusters, R components of a module, U (d_out, R) and V (R, d_in) with unit columns and
rows, g_k (R,) the gate of cluster k, f (R,) the fallback gate, s (R,) the static gate, G_k
(d_in, d_in) the Gram matrix of a cluster's inputs. The update for an input with routing weights π
and belonging κ is U diag(κ Σ_k π_k g_k + (1 − κ) f) V; the static merge is U diag(s) V. Gates are
numbers of their own, no ratios to the static ones: where the clusters' loadings cancel, s is next
to nothing and such a ratio without bound.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tclora.activations.collect import ActivationStatistics
from tclora.activations.metric import InputMetrics
from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import check_adapters, check_finite, module_factors, module_names
from tclora.errors import AdapterError
from tclora.route.equations import Fallback, GateEquations

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
    fallback : Mapping[str, Tensor], optional
        Module path → gate of rows that belong to no cluster, shape (R,), float32; the static gate
        where there is none.

    Raises
    ------
    AdapterError
        If a gate is not finite.
    """

    adapter: Adapter
    gates: Mapping[str, Tensor]
    names: tuple[str, ...]
    fallback: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for module, gates in [*self.gates.items(), *self.fallback.items()]:
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

    def elsewhere(self, module: str) -> Tensor:
        """Return the gate of a module for rows that belong to no cluster, shape (R,), float64."""
        gate = self.fallback.get(module)
        return self.static(module) if gate is None else gate.double()

    def blended(self, share: float) -> "GatedAdapter":
        """Return the same gates around a static merge U diag((1 − share) s + share f) V.

        Parameters
        ----------
        share : float
            0 leaves the static merge as it is, 1 makes it the fallback.

        Raises
        ------
        ValueError
            If it is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {share!r}; 0 is the static merge")
        if share == 0:
            return self
        static = {
            module: torch.lerp(self.static(module), self.elsewhere(module), share)
            for module in self.adapter.modules
        }
        # The sizes of a LoRA's components are positive: those turned round turn their gates too.
        signs = {m: torch.where(s < 0, -1.0, 1.0).float() for m, s in static.items()}
        return replace(
            self,
            adapter=self._plain(static, self.adapter.name),
            gates={m: gates * signs[m] for m, gates in self.gates.items()},
            fallback={m: gate * signs[m] for m, gate in self.fallback.items()},
        )

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
        return self._plain({m: pi @ gates.double() for m, gates in self.gates.items()}, name)

    def _plain(self, gates: Mapping[str, Tensor], name: str) -> Adapter:
        """Return U diag(g) V of one gate per module as a plain LoRA."""
        modules = {}
        for module, factors in self.adapter.modules.items():
            U, V = self.components(module)
            modules[module] = LoraFactors((U * gates[module]).to(factors.B), V.to(factors.A))
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


@dataclass(frozen=True)
class GateFit:
    """The equations of all gates on the components of a merge; any of them follow cheaply.

    Attributes
    ----------
    unit : GatedAdapter
        The merge, without gates.
    equations : Mapping[str, GateEquations]
        By module path.
    """

    unit: GatedAdapter
    equations: Mapping[str, GateEquations]

    def gated(self, rule: Fallback | None = None) -> GatedAdapter:
        """Return the merge with the gates of every cluster, and a fallback by a rule, if given."""
        gates = {module: found.own().float() for module, found in self.equations.items()}
        return replace(self.unit, gates=gates, fallback=self.fallback(rule) if rule else {})

    def fallback(self, rule: Fallback, without: int | None = None) -> dict[str, Tensor]:
        """Return the fallback gate of every module; see `GateEquations.fallback`."""
        return {
            module: found.fallback(rule, without).float()
            for module, found in self.equations.items()
        }


def fit_gates(
    adapters: Sequence[Adapter],
    merged: Adapter,
    statistics: ActivationStatistics | None = None,
    progress: Progress | None = None,
    *,
    fallback: Fallback | None = None,
) -> GatedAdapter:
    """Fit the gates of every cluster on the components of a merge.

    Parameters
    ----------
    adapters, merged, statistics, progress
        See `gate_equations`.
    fallback : Fallback, optional
        How the gate of rows that belong to no cluster is made; without it they get the static one.

    Returns
    -------
    GatedAdapter

    Notes
    -----
    g_k minimises ‖(Δ_k − U diag(g) V) G_k^{1/2}‖², a linear least squares problem of R unknowns:
    ((Uᵀ U) ∘ (V G_k Vᵀ)) g = diag(Uᵀ Δ_k G_k Vᵀ). As g = s is among its candidates, a cluster's
    gated update is never farther from its own one, in its own input metric, than the static merge.
    """
    return gate_equations(adapters, merged, statistics, progress).gated(fallback)


def gate_equations(
    adapters: Sequence[Adapter],
    merged: Adapter,
    statistics: ActivationStatistics | None = None,
    progress: Progress | None = None,
) -> GateFit:
    """Set up the equations of gates on the components of a merge.

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
    GateFit

    Raises
    ------
    AdapterError
        If the merge does not have the adapters' modules, or a factor is not finite.
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
    equations = {}
    for done, module in enumerate(names, 1):
        grams = metrics.of(module).grams if metrics else None
        own = module_factors(adapters, module)
        equations[module] = GateEquations.of(unit.components(module), own, grams)
        if progress:
            progress(done, len(names))
    return GateFit(unit, equations)
