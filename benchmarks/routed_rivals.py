"""Other ways to route over the separate adapters, from their papers.

Symbols: K adapters, Δ_k = B_k A_k the update of one, n rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn

from tclora.adapter import Adapter, LoraFactors
from tclora.adapter.union import module_factors, module_names
from tclora.route import GatedAdapter, Routing
from tclora.route.text import strongest

# As LORAUTER's authors have it: three tasks, weights a softmax of cosine similarities.
LORAUTER_TOP_K, LORAUTER_TEMPERATURE = 3, 0.2


def stacked(adapters: Sequence[Adapter]) -> GatedAdapter:
    """Return the separate adapters as one of rank K r, each cluster's gate its own block alone.

    Its mixtures are exactly Σ_k π_k Δ_k x, a weighted sum of the separate adapters' outputs.
    """
    modules, gates = {}, {}
    for module in module_names(adapters):
        parts = module_factors(adapters, module)
        modules[module] = LoraFactors(
            torch.cat([part.B for part in parts], 1), torch.cat([part.A for part in parts], 0)
        )
        sizes = [part.B.norm(dim=0) * part.A.norm(dim=1) for part in parts]
        gates[module] = torch.block_diag(*sizes).float()  # (K, Σ r)
    names = tuple(adapter.name for adapter in adapters)
    return GatedAdapter(Adapter("stacked", modules, adapters[0].base_model), gates, names)


def lorauter(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> Routing:
    """Route by task representations, means of embeddings: a softmax over the nearest three.

    References
    ----------
    Dhasade et al. (2026), "Effective LoRA Adapter Routing using Task Representations", arXiv
    2601.21795. Each task here has one adapter, so that the search for a task's best falls away.
    """
    similarity = vectors @ centroids.T
    logits = strongest(similarity / LORAUTER_TEMPERATURE, LORAUTER_TOP_K, -np.inf)
    everyone = np.ones(len(vectors), dtype=bool)
    return Routing(softmax(logits, axis=1).astype("float32"), everyone, similarity.max(axis=1))


@contextmanager
def spectr(
    model: Any,  # noqa: ANN401
    adapters: Sequence[Adapter],
    top_k: int | None = None,
) -> Iterator[None]:
    """Mix the separate adapters in every module for every token by ‖Δ_k x‖, while it lasts.

    References
    ----------
    Fleshman and Van Durme (2025), "SpectR: Dynamically Composing LM Experts with Spectral
    Routing", arXiv 2504.03454: scores from the whole spectrum of an update, where Arrow takes its
    first singular vector alone; a softmax of them weighs the adapters.
    """
    handles = [
        model.get_submodule(module).register_forward_hook(
            _spectr_hook(module_factors(adapters, module), top_k, model.dtype)
        )
        for module in module_names(adapters)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spectr_hook(
    parts: Sequence[LoraFactors], top_k: int | None, dtype: torch.dtype
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    stack = torch.stack([part.B.float() for part in parts])  # (K, d_out, r)
    K, _, r = stack.shape
    upper = torch.linalg.qr(stack, mode="r").R.to(dtype)  # ‖B z‖ = ‖upper z‖, (K, r, r)
    B, A = stack.to(dtype), torch.cat([part.A for part in parts]).to(dtype)  # A (K r, d_in)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inner = (inputs[0] @ A.mT).unflatten(-1, (K, r))  # (n, T, K, r)
        scores = torch.einsum("ntkr,ksr->ntks", inner, upper).norm(dim=-1)  # (n, T, K)
        if top_k is not None and top_k < K:
            least = scores.topk(top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        mixed = inner * scores.float().softmax(-1).to(inner)[..., None]
        return output + torch.einsum("ntkr,kor->nto", mixed, B)

    return add
