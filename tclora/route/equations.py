"""Normal equations of gates on the components of one module.

Symbols: K clusters, R components, U (d_out, R) and V (R, d_in) of unit columns and rows, Δ_k the
update of cluster k's own adapter, G_k (d_in, d_in) the Gram matrix of its inputs, g (R,) a gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tclora.adapter import LoraFactors

# Directions of the normal equations below this share of the largest carry no information.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class Fallback:
    """How the gate of rows that belong to no cluster is made of all clusters.

    Attributes
    ----------
    spread : float
        Share of the inputs that may be any cluster's (0–1). At 0 every update counts on its own
        cluster's inputs alone, as in RegMean; at 1 on all inputs alike, as in an average.
    scale : float
        Factor on the whole gate (above 0); below 1 it shrinks towards the base model.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    spread: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 1 or not 0 < self.scale < float("inf"):
            raise ValueError(
                f"spread must be between 0 and 1 and scale above 0, got {self.spread!r}, "
                f"{self.scale!r}; calibrate them again"
            )


@dataclass(frozen=True)
class GateEquations:
    """What every least squares gate of a module follows from.

    Attributes
    ----------
    normal : Tensor, shape (K, R, R)
        (Uᵀ U) ∘ (V G_j Vᵀ) for the inputs of every cluster j, float64.
    right : Tensor, shape (K, K, R)
        diag(Uᵀ Δ_i G_j Vᵀ) for update i on the inputs of cluster j, float64.
    """

    normal: Tensor
    right: Tensor

    @classmethod
    def of(
        cls, unit: LoraFactors, own: Sequence[LoraFactors], grams: Tensor | None
    ) -> "GateEquations":
        """Set up the equations of unit components U, V and the clusters' own updates.

        Parameters
        ----------
        unit : LoraFactors
            U and V, of norm 1, so that a weak component is not taken for a redundant one.
        own : sequence of K LoraFactors
            The clusters' updates.
        grams : Tensor, shape (K, d_in, d_in), optional
            Gram matrices of the clusters' inputs; every input direction counts alike without.
        """
        U, V = unit
        reads = [V] * len(own) if grams is None else [V @ gram for gram in grams]  # (R, d_in) each
        normal = torch.stack([(U.mT @ U) * (read @ V.mT) for read in reads])
        outputs = [U.mT @ factors.B.double() for factors in own]  # Uᵀ B_i, (R, r_i)
        right = [
            torch.stack([(out * (read @ factors.A.double().mT)).sum(1) for read in reads])
            for out, factors in zip(outputs, own, strict=True)
        ]
        return cls(normal, torch.stack(right))

    def own(self) -> Tensor:
        """Return the gate of every cluster, shape (K, R).

        g_k minimises ‖(Δ_k − U diag(g) V) G_k^{1/2}‖².
        """
        right = self.right.diagonal().mT  # (K, R)
        return torch.stack([_solve(n, b) for n, b in zip(self.normal, right, strict=True)])

    def fallback(self, rule: Fallback, without: int | None = None) -> Tensor:
        """Return the gate of rows that belong to no cluster, shape (R,).

        Parameters
        ----------
        rule : Fallback
            Spread t and scale λ.
        without : int, optional
            A cluster of which neither update nor inputs may enter.

        Notes
        -----
        λ times the minimiser of
        Σ_ij ((1 − t) [i = j] + t / K) ‖(Δ_i − U diag(g) V) G_j^{1/2}‖².
        """
        kept = [k for k in range(len(self.normal)) if k != without]
        K = len(kept)
        weights = (1 - rule.spread) * torch.eye(K) + rule.spread / K
        right = torch.einsum("ij,ijr->r", weights.to(self.right), self.right[kept][:, kept])
        return rule.scale * _solve(self.normal[kept].sum(0), right)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    solution: Tensor = torch.linalg.pinv(normal, rtol=_TOLERANCE, hermitian=True) @ right
    return solution
