"""Joint CP factorisation of LoRA adapters: exact compression, batched solver, shared factors.

Everything is computed from the adapters' factors; no dense update is ever formed.
"""

from tclora.tensor.als import CPSolution
from tclora.tensor.compress import Core, compress
from tclora.tensor.cp import cp_als
from tclora.tensor.diagnostics import (
    component_diagnostics,
    core_consistency,
    shared_share,
    shared_structure,
)
from tclora.tensor.factorise import explained_variance_curve, factorise, smallest_ranks
from tclora.tensor.library import CPFactors, LibraryFactors
from tclora.tensor.reference import cp_parafac

__all__ = [
    "CPFactors",
    "CPSolution",
    "Core",
    "LibraryFactors",
    "component_diagnostics",
    "compress",
    "core_consistency",
    "cp_als",
    "cp_parafac",
    "explained_variance_curve",
    "factorise",
    "shared_share",
    "shared_structure",
    "smallest_ranks",
]
