"""Merges in CP space: every result is U diag(w) Vᵀ, a LoRA of rank R, and methods differ in w.

Symbols: K adapters, R the CP rank, C (K, R) the loadings.
"""

from tclora.adapter import LoraFactors
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.tensor.library import CPFactors

PAPER = "TC-LoRA, arXiv 2508.03999"


@register(
    "tc-lora",
    summary="joint CP factors, loadings averaged over clusters, rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
    weighted=True,
)
def tc_lora(stack: ModuleStack) -> LoraFactors:
    """Return U diag(Σ_k w_k C[k]) Vᵀ with weights of sum 1, all equal unless given."""
    cp = cp_factors(stack)
    return cp.weighted(stack.weights.to(cp.C) @ cp.C)


def cp_factors(stack: ModuleStack) -> CPFactors:
    """Return the module's joint CP factors, which the engine supplies to these methods."""
    if stack.cp is None:
        raise ValueError(f"{stack.module}: CP factors are missing; pass factors=factorise(…)")
    return stack.cp
