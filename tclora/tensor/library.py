"""The factors of a library: what clusters share (U, V) and what each one owns (its loadings).

Symbols: K adapters, d_out × d_in the module, R the CP rank; Δ_k ≈ U diag(C[k]) Vᵀ.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tclora.adapter import Adapter, LoraFactors
from tclora.errors import LibraryError
from tclora.files import atomic_path, sort_metadata
from tclora.tensor.cp import conventional
from tclora.tensor.lowrank import product_energy

if TYPE_CHECKING:
    from tensorly.cp_tensor import CPTensor

_FORMAT = "tclora-factors-1"


class CPFactors(NamedTuple):
    """Joint CP factors of one module: unit-norm U and V columns, all scale in C.

    Components are sorted by energy and Σ_k C[k, ρ] ≥ 0.
    """

    U: Tensor  # (d_out, R)
    V: Tensor  # (d_in, R)
    C: Tensor  # (K, R)
    explained_variance: float  # 1 − ‖residual‖²/‖𝒳‖², 1 where 𝒳 = 0
    energy: float  # ‖𝒳‖²

    @property
    def rank(self) -> int:
        """The CP rank R of this module."""
        return self.C.shape[1]

    def weighted(self, weights: Tensor) -> LoraFactors:
        """Return the rank-R update U diag(weights) Vᵀ for weights of shape (R,)."""
        return LoraFactors(self.U * weights.to(self.U), self.V.mT)

    def to_tensorly(self) -> "CPTensor":
        """Return the model of the stack of updates as TensorLy's ``CPTensor``.

        Returns
        -------
        CPTensor
            Of shape (K, d_out, d_in): weights 1, factors [C, U, V] as torch tensors that share
            memory with ours; compute with it under TensorLy's ``pytorch`` backend.
        """
        import tensorly
        from tensorly.cp_tensor import CPTensor

        with tensorly.backend_context("pytorch", local_threadsafe=True):
            return CPTensor((self.C.new_ones(self.rank), [self.C, self.U, self.V]))

    @classmethod
    def from_tensorly(
        cls, model: "CPTensor", *, explained_variance: float = 1.0, energy: float | None = None
    ) -> Self:
        """Bring a CP model of a stack of updates to our conventions.

        Parameters
        ----------
        model : CPTensor or (weights, factors)
            Of shape (K, d_out, d_in), with torch tensors or arrays; weights may be None.
        explained_variance : float
            What the model keeps of the stack it was fitted to (at most 1), which it does not know.
        energy : float, optional
            ‖𝒳‖² of that stack; by default, of the model itself.

        Returns
        -------
        CPFactors
            Unit columns in U and V, all scale in C, components sorted by energy, signs such that
            the loadings of each component sum to a non-negative number.

        Raises
        ------
        ValueError
            If the model does not have three modes.
        """
        weights, factors = model
        if len(factors) != 3:
            raise ValueError(
                f"model must have three modes (K, d_out, d_in), got {len(factors)}; "
                "stack the updates of one module along the first"
            )
        C, U, V = (torch.as_tensor(factor) for factor in factors)
        C = C if weights is None else C * torch.as_tensor(weights).to(C)
        solution = conventional(U[None], V[None], C[None])
        U, V, C = solution.U[0], solution.V[0], solution.C[0]
        if energy is None:
            energy = float(((U.mT @ U) * (V.mT @ V) * (C.mT @ C)).sum().clamp_min(0))
        return cls(U, V, C, explained_variance, energy)


@dataclass(frozen=True)
class LibraryFactors:
    """Joint CP factors of K adapters.

    Attributes
    ----------
    names : tuple of str
        Adapter names in the order of the rows of every C.
    rank : int
        CP rank R asked for; a module whose adapters have a smaller total rank uses that.
    modules : Mapping[str, CPFactors]
        Module path → factors, in sorted order.
    base_model : str or None
        The base model of the adapters.
    """

    names: tuple[str, ...]
    rank: int
    modules: Mapping[str, CPFactors]
    base_model: str | None = None

    @property
    def explained_variance(self) -> float:
        """Share of the total energy Σ ‖𝒳‖² that the factors keep, over all modules (0–1)."""
        energy = sum(cp.energy for cp in self.modules.values())
        lost = sum(cp.energy * (1 - cp.explained_variance) for cp in self.modules.values())
        return 1 - lost / energy if energy else 1.0

    def explained_variance_of(self, adapter: Adapter) -> float:
        """Return the share of one adapter's own energy Σ ‖Δ_k‖² that the factors keep, up to 1.

        It is negative where they are farther from it than zero is; 1 for an adapter of zeros.

        Parameters
        ----------
        adapter : Adapter
            One of the adapters that were factorised; found by its name.

        Raises
        ------
        ValueError
            If the factors hold no adapter of that name.
        """
        k = self.index(adapter.name)
        energy = lost = 0.0
        for module, cp in self.modules.items():
            U, V = cp.U.double(), cp.V.double()
            B, A = U[:, :0], V.mT[:0]
            if module in adapter.modules:
                B, A = (factor.double() for factor in adapter.modules[module])
            rest = torch.cat([B, -U * cp.C[k].double()], dim=1), torch.cat([A, V.mT])
            energy, lost = energy + product_energy(B, A), lost + product_energy(*rest)
        return 1 - lost / energy if energy else 1.0

    def index(self, adapter: str | int) -> int:
        """Return the row of an adapter given by name or by row.

        Raises
        ------
        ValueError
            If there is no such adapter.
        """
        if isinstance(adapter, str) and adapter in self.names:
            return self.names.index(adapter)
        if isinstance(adapter, int) and 0 <= adapter < len(self.names):
            return adapter
        raise ValueError(
            f"adapter must be one of {', '.join(self.names)} or a row below {len(self.names)}, "
            f"got {adapter!r}"
        )

    def reconstruct(self, adapter: str | int) -> Adapter:
        """Return one cluster's own update back from the shared factors, a LoRA of rank R."""
        k = self.index(adapter)
        weights = {module: cp.C[k] for module, cp in self.modules.items()}
        return self.adapter(weights, name=self.names[k])

    def adapter(self, weights: Mapping[str, Tensor], name: str = "tc-lora") -> Adapter:
        """Return the adapter U diag(w) Vᵀ.

        Parameters
        ----------
        weights : Mapping[str, Tensor]
            Component weights w of shape (R,) per module; every module must have them.
        name : str
            Name of the result.

        Returns
        -------
        Adapter
        """
        modules = {module: cp.weighted(weights[module]) for module, cp in self.modules.items()}
        return Adapter(name, modules, self.base_model)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; names, ranks and fit go to its header."""
        tensors = {
            f"{module}.{part}": getattr(cp, part).to(torch.float32, copy=True).contiguous()
            for module, cp in self.modules.items()
            for part in "UVC"
        }
        fit = {module: [cp.explained_variance, cp.energy] for module, cp in self.modules.items()}
        header = {
            "format": _FORMAT,
            "names": json.dumps(self.names),
            "rank": str(self.rank),
            "base_model": json.dumps(self.base_model),
            "explained_variance": json.dumps(self.explained_variance),
            "fit": json.dumps(fit),
        }
        with atomic_path(Path(path)) as fresh:
            save_file(tensors, fresh, metadata=header)
            sort_metadata(fresh)

    @classmethod
    def load(cls, path: str | Path) -> "LibraryFactors":
        """Read what `save` wrote.

        Raises
        ------
        LibraryError
            If the file is missing, damaged or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != _FORMAT:
                    raise LibraryError(
                        f"{path}: format must be {_FORMAT}, got {header.get('format')!r}; "
                        "factorise the adapters again"
                    )
                modules = {
                    module: CPFactors(
                        *(file.get_tensor(f"{module}.{part}") for part in "UVC"), *fit
                    )
                    for module, fit in json.loads(header["fit"]).items()
                }
        except (OSError, SafetensorError) as error:
            raise LibraryError(f"{path}: cannot be read as factors: {error}") from error
        return cls(
            names=tuple(json.loads(header["names"])),
            rank=int(header["rank"]),
            modules=modules,
            base_model=json.loads(header["base_model"]),
        )
