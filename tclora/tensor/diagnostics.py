"""What the components of a factorised library hold: energy, and which clusters share it.

Symbols: K adapters, R the CP rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tclora.adapter import Adapter
from tclora.adapter.union import module_factors
from tclora.tensor.als import CPSolution
from tclora.tensor.compress import compress
from tclora.tensor.library import CPFactors, LibraryFactors
from tclora.tensor.sidebyside import side_by_side

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["module", "component", "energy", "energy_share", "spread", "top", "top_share"]


def component_diagnostics(factors: LibraryFactors) -> "pd.DataFrame":
    """Describe every component of every module.

    Parameters
    ----------
    factors : LibraryFactors

    Returns
    -------
    DataFrame
        One row per module and component: `energy` Σ_k C[k, ρ]², its share of the module's
        component energy, `spread` over clusters (participation ratio (Σ c²)² / Σ c⁴ from 1, one
        cluster's own, to K, shared evenly), and the cluster of the largest loading, `top`, with
        its share of the energy.
    """
    import pandas as pd

    parts = [_describe(module, cp, factors.names) for module, cp in factors.modules.items()]
    return pd.concat(parts, ignore_index=True)[_COLUMNS]


def shared_share(factors: LibraryFactors) -> float:
    """Return the share of component energy that is shared rather than one cluster's own (0–1).

    Notes
    -----
    A component of spread s counts (s − 1) / (K − 1) of its energy as shared; 0 for one adapter.
    """
    return _shared(component_diagnostics(factors), len(factors.names))


def shared_structure(adapters: Sequence[Adapter], factors: LibraryFactors) -> "pd.DataFrame":
    """Describe what the clusters share in every module.

    Parameters
    ----------
    adapters : sequence of K Adapter
        What was factorised, in the order of the factors' names.
    factors : LibraryFactors

    Returns
    -------
    DataFrame
        Columns module, rank (CP rank R), energy (Σ C²), shared (share of it that is shared, see
        `shared_share`), spread (mean over components, weighted by energy), core_consistency (in
        percent; NaN where R > K or the module is zero, see `core_consistency`).
    """
    import pandas as pd

    K, rows = len(factors.names), []
    consistencies = side_by_side(partial(_consistency, adapters, factors), factors.modules)
    consistency = dict(zip(factors.modules, consistencies, strict=True))
    for module, parts in component_diagnostics(factors).groupby("module", sort=True):
        rank = factors.modules[str(module)].rank
        energy = parts["energy"]
        spread = float((parts["spread"] * energy).sum() / energy.sum()) if energy.sum() else 1.0
        unique = consistency[str(module)]
        rows.append((module, rank, energy.sum(), _shared(parts, K), spread, unique))
    columns = ["module", "rank", "energy", "shared", "spread", "core_consistency"]
    return pd.DataFrame(rows, columns=columns)


def _shared(components: "pd.DataFrame", K: int) -> float:
    total = components["energy"].sum()
    if K == 1 or not total:
        return 0.0
    return float(((components["spread"] - 1) / (K - 1) * components["energy"]).sum() / total)


def _consistency(adapters: Sequence[Adapter], factors: LibraryFactors, module: str) -> float:
    """Return a module's core consistency; NaN where R > K or nothing was updated."""
    cp = factors.modules[module]
    if cp.rank > len(adapters) or not cp.C.any():
        return float("nan")
    found = module_factors(adapters, module)
    core = compress([f.B for f in found], [f.A for f in found])
    U, V = core.left.mT @ cp.U.to(core.left), core.right.mT @ cp.V.to(core.right)
    model = CPSolution(U[None], V[None], cp.C.to(U)[None], U.new_zeros(1))
    return float(core_consistency(core.B[None], core.A[None], model))


def core_consistency(B: Tensor, A: Tensor, solution: CPSolution) -> Tensor:
    """Return the core consistency of CP models, 100 where the model is trilinear, in percent.

    Parameters
    ----------
    B : Tensor, shape (M, K, m, r)
        Output factors of the cores.
    A : Tensor, shape (M, K, r, n)
        Input factors of the cores.
    solution : CPSolution
        Models of the same cores.

    Returns
    -------
    Tensor, shape (M,)
        At most 100; low or negative where components explain each other's variation.

    Notes
    -----
    100 (1 − ‖𝒢 − ℐ‖² / R) with the least-squares Tucker core 𝒢 (R, R, R) of the model's factors
    and the superdiagonal ℐ. With R > K the loadings are linearly dependent, so that the measure is
    below 100 even for an exact model: read it for R ≤ K.

    References
    ----------
    Bro, Kiers (2003), "A new efficient method for determining the number of components in PARAFAC
    models", J. Chemometrics 17(5).
    """
    rank = solution.C.shape[2]
    left = torch.linalg.pinv(solution.U)[:, None] @ B  # (M, K, R, r)
    right = A @ torch.linalg.pinv(solution.V).mT[:, None]  # (M, K, r, R)
    core = torch.einsum("mck,mkuv->mcuv", torch.linalg.pinv(solution.C), left @ right)
    ideal = torch.zeros_like(core)
    diagonal = torch.arange(rank, device=core.device)
    ideal[:, diagonal, diagonal, diagonal] = 1
    return 100 * (1 - (core - ideal).square().sum((1, 2, 3)) / rank)


def _describe(module: str, cp: CPFactors, names: tuple[str, ...]) -> "pd.DataFrame":
    import pandas as pd

    squared = cp.C.double().square()  # (K, R)
    energy = squared.sum(0)
    total = float(energy.sum())
    shares = squared / torch.where(energy > 0, energy, 1)
    top_share, owner = shares.max(0)
    return pd.DataFrame(
        {
            "module": module,
            "component": range(cp.rank),
            "energy": energy.numpy(),
            "energy_share": (energy / total if total else energy).numpy(),
            "spread": torch.where(energy > 0, 1 / shares.square().sum(0), 1.0).numpy(),
            "top": [names[k] for k in owner.tolist()],
            "top_share": top_share.numpy(),
        }
    )
