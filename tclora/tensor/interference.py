"""How much adapters get in each other's way, measured on their factors.

Symbols: K adapters, d_out × d_in a module, r_k the LoRA ranks, G (K, m, n) the updates in shared
bases.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tclora.adapter import Adapter
from tclora.adapter.union import check_adapters, module_factors, module_names
from tclora.tensor.compress import Core, compress
from tclora.tensor.lowrank import slice_svd
from tclora.tensor.sidebyside import side_by_side

# Singular values below this share of the adapter's largest carry no direction.
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Interference:
    """Pairwise measures, each a symmetric K × K frame labelled by adapter names.

    Attributes
    ----------
    cosine : DataFrame
        Cosine of the whole updates, −1 to 1.
    input_overlap, output_overlap : DataFrame
        Overlap of the directions read and written, 0 (orthogonal) to 1 (the same), weighted by how
        much each direction is used.
    sign_conflict : DataFrame
        Share of the interaction that is destructive, 0 to 1: along the directions both updates
        share, how much of Σ |projection| has the opposite sign.
    input_angle, output_angle : DataFrame
        Mean principal angle of the spaces read and written, in degrees: 0 the same, 90 orthogonal;
        every direction counts alike.
    input_nearest, output_nearest : DataFrame
        The smallest principal angle, in degrees.
    modules : DataFrame
        One row per module and pair: module, first, second, the measures, and the weight of the pair
        there, the product of the updates' norms.
    """

    cosine: pd.DataFrame
    input_overlap: pd.DataFrame
    output_overlap: pd.DataFrame
    sign_conflict: pd.DataFrame
    input_angle: pd.DataFrame
    output_angle: pd.DataFrame
    input_nearest: pd.DataFrame
    output_nearest: pd.DataFrame
    modules: pd.DataFrame

    def pairs(self) -> pd.DataFrame:
        """Return one row per pair of adapters: first, second and the measures."""
        names = list(self.cosine.index)
        first, second = np.triu_indices(len(names), k=1)
        return pd.DataFrame(
            {
                "first": [names[i] for i in first.tolist()],
                "second": [names[j] for j in second.tolist()],
                **{m: getattr(self, m).to_numpy()[first, second] for m in MEASURES},
            }
        )


MEASURES = (
    "cosine", "input_overlap", "output_overlap", "sign_conflict", "input_angle", "output_angle",
    "input_nearest", "output_nearest",
)  # fmt: skip


def interference(
    adapters: Sequence[Adapter], progress: Callable[[int, int], None] | None = None
) -> Interference:
    """Measure interference between every two adapters.

    Parameters
    ----------
    adapters : sequence of K Adapter
        With distinct names; a module that an adapter lacks counts as zero.
    progress : callable, optional
        Called with (modules done, modules in all).

    Returns
    -------
    Interference
        Over all modules, weighted by the product of the two updates' norms.

    Notes
    -----
    With the SVD Δ_k = U_k S_k V_kᵀ, the input overlap of i and j is
    ‖S_i^½ V_iᵀ V_j S_j^½‖² / (‖S_i‖ ‖S_j‖), the mean squared cosine of their directions weighted by
    singular values (spectra of equal shape and equal directions give 1). The sign conflict sums the
    terms (S_i)_a (U_iᵀ U_j)_ab (S_j)_b (V_iᵀ V_j)_ab of ⟨Δ_i, Δ_j⟩: the share of their absolute
    values that is negative. Cosines of principal angles are the singular values of V_iᵀ V_j; of two
    spaces of unlike dimension there are as many as the smaller has. None of it depends on how an
    update was split into B and A.

    References
    ----------
    Björck, Golub (1973), "Numerical methods for computing angles between linear subspaces",
    Mathematics of Computation 27.
    """
    check_adapters(adapters)
    names = [adapter.name for adapter in adapters]
    paths = module_names(adapters)
    rows = []

    def measure(module: str) -> tuple[dict[str, Tensor], Tensor]:
        factors = module_factors(adapters, module)
        return _measure(compress([f.B for f in factors], [f.A for f in factors]))

    for module, (measured, weight) in zip(paths, side_by_side(measure, paths), strict=True):
        rows.append((module, measured, weight))
        if progress:
            progress(len(rows), len(paths))
    total = sum((weight for _, _, weight in rows), torch.zeros(len(names), len(names)).double())
    frames = {}
    for name in MEASURES:
        summed = sum((m[name] * w for _, m, w in rows), torch.zeros_like(total))
        mean = torch.where(total > 0, summed / torch.where(total > 0, total, 1), 0.0)
        frames[name] = pd.DataFrame(mean.numpy(), index=names, columns=names)
    return Interference(**frames, modules=_pairs(names, rows))


def _measure(core: Core) -> tuple[dict[str, Tensor], Tensor]:
    """Return the K × K measures of one module and the weight ‖Δ_i‖ ‖Δ_j‖ of each pair."""
    U, S, V = slice_svd(core.B, core.A)  # (K, m, q), (K, q), (K, n, q)
    S = torch.where(_TOLERANCE * S[:, :1] < S, S, 0.0)
    outputs = torch.einsum("ima,jmb->ijab", U, U)
    inputs = torch.einsum("ina,jnb->ijab", V, V)
    strength = torch.einsum("ia,jb->ijab", S, S)
    terms = strength * outputs * inputs
    norms = S.norm(dim=1)
    weight = norms[:, None] * norms
    safe = torch.where(weight > 0, weight, 1)
    size = terms.abs().sum((2, 3))
    conflict = -terms.clamp_max(0).sum((2, 3)) / torch.where(size > 0, size, 1)
    return {
        "cosine": terms.sum((2, 3)) / safe,
        "input_overlap": (strength * inputs.square()).sum((2, 3)) / safe,
        "output_overlap": (strength * outputs.square()).sum((2, 3)) / safe,
        "sign_conflict": conflict,
        **_angles(inputs, S > 0, "input"),
        **_angles(outputs, S > 0, "output"),
    }, weight


def _angles(products: Tensor, used: Tensor, side: str) -> dict[str, Tensor]:
    """Return the mean and the smallest principal angle of every two spaces, in degrees.

    `products` (K, K, q, q) are those of orthonormal directions, of which `used` (K, q) count.
    """
    kept = used[:, None, :, None] & used[None, :, None, :]
    cosines = torch.linalg.svdvals(torch.where(kept, products, 0.0))  # (K, K, q), falling
    ranks = used.sum(1)
    count = torch.minimum(ranks[:, None], ranks)  # (K, K)
    real = torch.arange(cosines.shape[2], device=count.device) < count[..., None]
    angles = torch.rad2deg(torch.acos(cosines.clamp(0, 1)))
    mean = torch.where(real, angles, 0.0).sum(2) / count.clamp_min(1)
    nearest = torch.where(count > 0, angles[..., 0], 0.0)
    return {f"{side}_angle": mean, f"{side}_nearest": nearest}


def _pairs(
    names: Sequence[str], rows: Sequence[tuple[str, dict[str, Tensor], Tensor]]
) -> pd.DataFrame:
    """List every module and pair once."""
    first, second = np.triu_indices(len(names), k=1)
    frames = [
        pd.DataFrame(
            {
                "module": module,
                "first": [names[i] for i in first.tolist()],
                "second": [names[j] for j in second.tolist()],
                **{m: measured[m][first, second].numpy() for m in MEASURES},
                "weight": weight[first, second].numpy(),
            }
        )
        for module, measured, weight in rows
    ]
    return pd.concat(frames, ignore_index=True)
