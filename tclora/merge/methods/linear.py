"""Linear merges: averages, sums and their truncation, exact as concatenated factors."""

from tclora.adapter import LoraFactors
from tclora.merge.registry import register
from tclora.merge.stack import ModuleStack
from tclora.merge.truncate import truncate_to_one

_SVD = "Eckart, Young 1936; PEFT add_weighted_adapter(combination_type='svd')"
_ARITHMETIC = "Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089"


@register(
    "uniform",
    summary="average of the updates, exact at rank Σ r_k",
    paper="Wortsman et al. 2022, Model Soups, arXiv 2203.05482",
    weighted=True,
)
def uniform(stack: ModuleStack) -> LoraFactors:
    """Return Σ_k w_k Δ_k with weights of sum 1, all equal unless given."""
    return stack.concatenated(stack.weights)


@register(
    "svd",
    summary="average of the updates, truncated to one adapter's rank by SVD",
    paper=_SVD,
    weighted=True,
    truncation=truncate_to_one,
)
def svd(stack: ModuleStack) -> LoraFactors:
    """Return Σ_k w_k Δ_k, to be truncated."""
    return stack.concatenated(stack.weights)


@register(
    "task-arithmetic",
    summary="sum of the updates times λ (scale), exact at rank Σ r_k",
    paper=_ARITHMETIC,
)
def task_arithmetic(stack: ModuleStack, *, scale: float = 0.4) -> LoraFactors:
    """Return λ Σ_k Δ_k."""
    return stack.concatenated(scale * stack.weights.new_ones(len(stack.factors)))


@register(
    "cat",
    summary="sum of the updates, exact at rank Σ r_k",
    paper="PEFT add_weighted_adapter(combination_type='cat') with weights 1",
)
def cat(stack: ModuleStack) -> LoraFactors:
    """Return Σ_k Δ_k."""
    return stack.concatenated(stack.weights.new_ones(len(stack.factors)))
