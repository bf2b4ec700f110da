"""Merges in CP space: every result is U diag(w) Vᵀ, a LoRA of rank R, and methods differ in w.

Symbols: K adapters, R the CP rank, C (K, R) the loadings.
"""

from collections.abc import Mapping

from tclora.adapter import LoraFactors
from tclora.merge.methods.elementwise import disjoint_mean
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack

PAPER = "TC-LoRA, arXiv 2508.03999"


@register(
    "tc-lora-mean",
    summary="joint CP factors, loadings averaged over clusters, rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
    weighted=True,
)
def tc_lora_mean(stack: ModuleStack) -> LoraFactors:
    """Return U diag(Σ_k w_k C[k]) Vᵀ with weights of sum 1, all equal unless given."""
    cp = stack.joint()
    return cp.weighted(stack.weights.to(cp.C) @ cp.C)


@register(
    "tc-lora-sum",
    summary="joint CP factors, loadings summed over clusters times λ (scale), rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
)
def tc_lora_sum(stack: ModuleStack, *, scale: float = 0.4) -> LoraFactors:
    """Return λ U diag(Σ_k C[k]) Vᵀ."""
    cp = stack.joint()
    return cp.weighted(scale * cp.C.sum(0))


@register(
    "tc-lora-consensus",
    summary="joint CP factors, loadings averaged over the clusters of the winning sign, rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
)
def tc_lora_consensus(stack: ModuleStack, *, scale: float = 1.0) -> LoraFactors:
    """Return λ U diag(w) Vᵀ, w averaging the loadings with the sign of their sum."""
    cp = stack.joint()
    return cp.weighted(scale * disjoint_mean(cp.C))


@register(
    "tc-lora-calibrated",
    summary="joint CP factors, clusters weighed by numbers fitted on sample rows, rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
)
def tc_lora_calibrated(
    stack: ModuleStack, *, loadings: Mapping[str, float] | None = None
) -> LoraFactors:
    """Return U diag(Σ_k λ_k C[k]) Vᵀ with λ_k as given; see `fit_loadings`."""
    if loadings is None or set(loadings) != set(stack.names):
        raise ValueError(
            f"loadings must name every adapter ({', '.join(stack.names)}), got {loadings!r}; "
            "fit them with fit_loadings"
        )
    cp = stack.joint()
    return cp.weighted(cp.C.new_tensor([loadings[name] for name in stack.names]) @ cp.C)


@register(
    "tc-lora-reconstruct",
    summary="one cluster's own update back from the joint CP factors, rank R",
    paper=PAPER,
    exact=False,
    needs="factors",
)
def tc_lora_reconstruct(stack: ModuleStack, *, cluster: str | None = None) -> LoraFactors:
    """Return U diag(C[k]) Vᵀ for the named adapter, which may be left out if there is only one."""
    if cluster is None and len(stack.names) == 1:
        cluster = stack.names[0]
    if cluster is None or cluster not in stack.names:
        raise ValueError(f"cluster must be one of {', '.join(stack.names)}, got {cluster!r}")
    cp = stack.joint()
    return cp.weighted(cp.C[list(stack.names).index(cluster)])
