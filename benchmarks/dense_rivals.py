"""Dense published forms on one Mistral-7B module of 1024 × 4096, extrapolated to all 224 modules.

PEFT's ``add_weighted_adapter(combination_type="svd")`` (an SVD of the dense average), KnOTS (an SVD
of all dense updates side by side) and TSV-M (an SVD of each dense update and two polar factors),
against the same methods on factors. A dense SVD costs d_out d_in min(d_out, d_in).
"""

import time
from collections.abc import Callable

import pandas as pd
import torch
from libraries import MISTRAL_7B, draw_library
from tables import report
from torch import Tensor

from tclora.merge import merge

K, LAYERS = 10, 32
SHAPE = (1024, 4096)


def peft_svd(updates: Tensor) -> Tensor:
    """Average, then a full SVD, as PEFT does."""
    U, S, Vh = torch.linalg.svd(updates.mean(0), full_matrices=False)
    return U[:, :16] * S[:16] @ Vh[:16]


def knots(updates: Tensor) -> Tensor:
    """SVD of the concatenation, then an average of the right factors."""
    U, S, Vh = torch.linalg.svd(torch.cat(list(updates), dim=1), full_matrices=False)
    return U @ (S[:, None] * Vh).reshape(len(S), K, -1).mean(1)


def tsv_m(updates: Tensor) -> Tensor:
    """Singular vectors of every update, made orthonormal together."""
    k = min(updates.shape[1:]) // K
    parts = [torch.linalg.svd(update, full_matrices=False) for update in updates]
    P, _, Qh = torch.linalg.svd(torch.cat([U[:, :k] for U, _, _ in parts], 1), full_matrices=False)
    G, _, Hh = torch.linalg.svd(torch.cat([Vh[:k] for _, _, Vh in parts]), full_matrices=False)
    return P @ Qh @ torch.diag(torch.cat([S[:k] for _, S, _ in parts])) @ G @ Hh


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    """Time the dense and the factored forms and report."""
    library = draw_library({"m": SHAPE}, K)
    updates = torch.stack([adapter.modules["m"].delta() for adapter in library])
    work = {name: d_out * d_in * min(d_out, d_in) for name, (d_out, d_in) in MISTRAL_7B.items()}
    factor = LAYERS * sum(work.values()) / (SHAPE[0] * SHAPE[1] * min(SHAPE))
    rows = []
    for dense, method in ((peft_svd, "svd"), (knots, "knots-ties"), (tsv_m, "tsv-m")):
        slow = seconds(lambda dense=dense: dense(updates))
        fast = seconds(lambda method=method: merge(library, method))
        rows.append(
            {
                "method": f"{dense.__name__} / {method}",
                "dense s": slow,
                "tclora s": fast,
                "dense s, whole model (extrapolated)": slow * factor,
                "dense hours (extrapolated)": slow * factor / 3600,
            }
        )
    report(
        "dense_rivals",
        "Dense published forms against factor space, one module of 1024 by 4096",
        pd.DataFrame(rows),
        f"K = {K}, r = 16, single precision for the dense forms, double for tclora. Extrapolated "
        f"by the cost of a dense SVD over {LAYERS} layers of a Mistral-7B.",
    )


if __name__ == "__main__":
    main()
