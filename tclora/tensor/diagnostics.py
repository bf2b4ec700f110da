"""What the components of a factorised library hold: energy, and which clusters share it.

Symbols: K adapters, R the CP rank.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tclora.tensor.als import CPSolution
from tclora.tensor.library import CPFactors, LibraryFactors

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = [
    "module", "component", "energy", "energy_share", "spread", "shared", "top", "top_share",
]  # fmt: skip


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
        cluster's own, to K, shared evenly), the fraction of its energy that counts as `shared`,
        (spread − 1) / (K − 1), and the cluster of the largest loading, `top`, with its share of
        the energy.
    """
    import pandas as pd

    parts = [_describe(module, cp, factors.names) for module, cp in factors.modules.items()]
    return pd.concat(parts, ignore_index=True)[_COLUMNS]


def shared_share(factors: LibraryFactors) -> float:
    """Return the share of component energy that is shared rather than one cluster's own (0–1).

    0 for one adapter; see `component_diagnostics`.
    """
    frame = component_diagnostics(factors)
    total = frame["energy"].sum()
    return float((frame["shared"] * frame["energy"]).sum() / total) if total else 0.0


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
    spread = torch.where(energy > 0, 1 / shares.square().sum(0), 1.0)
    return pd.DataFrame(
        {
            "module": module,
            "component": range(cp.rank),
            "energy": energy.numpy(),
            "energy_share": (energy / total if total else energy).numpy(),
            "spread": spread.numpy(),
            "shared": ((spread - 1) / max(1, len(names) - 1)).numpy(),
            "top": [names[k] for k in owner.tolist()],
            "top_share": top_share.numpy(),
        }
    )
