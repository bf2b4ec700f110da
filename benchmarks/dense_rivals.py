"""Dense published forms on one Mistral-7B module of 1024 × 4096, extrapolated to all 224 modules.

PEFT's own ``add_weighted_adapter(combination_type="svd")`` (an SVD of the dense average), KnOTS (an
SVD of all dense updates side by side) and TSV-M (an SVD of each dense update and two polar factors)
against the same methods on factors. A dense SVD costs d_out d_in min(d_out, d_in).
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from libraries import MISTRAL_7B, draw_library
from peft import PeftModel
from tables import report
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from tclora.adapter import Adapter, write_adapter
from tclora.merge import merge

K, LAYERS = 10, 32
SHAPE = (1024, 4096)
MODULE = "model.layers.0.self_attn.k_proj"


def peft_model(library: Sequence[Adapter], folder: Path) -> PeftModel:
    """Load the adapters on a one-layer Mistral whose key projection has the shape measured."""
    config = MistralConfig(
        vocab_size=8, hidden_size=SHAPE[1], intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    base = MistralForCausalLM(config)
    for adapter in library:
        write_adapter(adapter, folder / adapter.name)
    first, *others = [adapter.name for adapter in library]
    model = PeftModel.from_pretrained(base, folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    return model


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


def measured(function: Callable[[], object]) -> tuple[float, float]:
    """Return a call's seconds and its peak memory above what was there before (MB)."""
    before, peak, done = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    function()
    elapsed = time.perf_counter() - begin
    done.set()
    watcher.join()
    return elapsed, max(0.0, peak[0] - before)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Time the dense and the factored forms and report."""
    library = draw_library({MODULE: SHAPE}, K)
    updates = torch.stack([adapter.modules[MODULE].delta() for adapter in library])
    names = [adapter.name for adapter in library]
    with tempfile.TemporaryDirectory() as folder:
        model = peft_model(library, Path(folder))

    def peft_svd(_: Tensor) -> None:
        model.add_weighted_adapter(names, [1 / K] * K, "merged", combination_type="svd")

    work = {name: d_out * d_in * min(d_out, d_in) for name, (d_out, d_in) in MISTRAL_7B.items()}
    factor = LAYERS * sum(work.values()) / (SHAPE[0] * SHAPE[1] * min(SHAPE))
    rows = []
    for dense, method in ((peft_svd, "svd"), (knots, "knots-ties"), (tsv_m, "tsv-m")):
        slow, more = measured(lambda dense=dense: dense(updates))
        fast, less = measured(lambda method=method: merge(library, method))
        rows.append(
            {
                "method": f"{dense.__name__} / {method}",
                "dense s": slow,
                "dense MB": more,
                "tclora s": fast,
                "tclora MB": less,
                "dense s, whole model (extrapolated)": slow * factor,
                "dense hours (extrapolated)": slow * factor / 3600,
            }
        )
    report(
        "dense_rivals",
        "Dense published forms against factor space, one module of 1024 by 4096",
        pd.DataFrame(rows),
        f"K = {K}, r = 16; MB: peak memory above what was there before the call, first call first; "
        "single precision for the dense forms, double for tclora. Extrapolated "
        f"by the cost of a dense SVD over {LAYERS} layers of a Mistral-7B.",
    )


if __name__ == "__main__":
    main()
