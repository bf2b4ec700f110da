"""A gated adapter against one plain LoRA, PEFT's mixed-adapter batch and PEFT's Arrow.

SmolLM2-135M, K = 8 adapters of rank 16 on all linear layers, one batch of 32 prompts that belong to
all clusters, one forward pass. Variants take turns, medians are compared. Also the largest
difference between the mixed batch's logits and each row's own gated adapter run alone.
Usage: ``python benchmarks/routed_speed.py [REPEATS]``.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from libraries import SMOLLM2_135M, draw_library, layers
from peft import ArrowConfig, PeftModel, create_arrow_model
from tables import report
from torch import Tensor

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.embed import embed_prompts, load_embedder
from tclora.merge import merge
from tclora.models import load_base_model, locate_base_model, locate_embedder
from tclora.route import Gating, fit_gates

K, ROWS, TOKENS = 8, 32, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small(adapter: Adapter) -> Adapter:
    """Scale an adapter down, so that logits stay in the model's range."""
    modules = {
        name: LoraFactors(1e-3 * B, A / A.shape[1] ** 0.5)
        for name, (B, A) in adapter.modules.items()
    }
    return Adapter(adapter.name, modules, adapter.base_model)


class Variants:
    """The models to compare, each with its own copy of the base."""

    def __init__(self, folder: Path) -> None:
        self._base = locate_base_model("smollm2-135m-instruct")
        library = [small(a) for a in draw_library(layers(SMOLLM2_135M, 30), K)]
        for adapter in library:
            write_adapter(adapter, folder / adapter.name)
        self.gated = fit_gates(library, merge(library, "tc-lora-mean", rank=16).adapter)
        write_adapter(self.gated.adapter, folder / "static")
        self.names = [adapter.name for adapter in library]
        self.plain = self._load(folder / "static")
        self.routed = self._load(folder / "static")
        self.gating = Gating(self.routed, self.gated)
        self.mixed = self._load(folder / self.names[0], self.names[0])
        for name in self.names[1:]:
            self.mixed.load_adapter(folder / name, name, autocast_adapter_dtype=False)
        arrow = ArrowConfig(top_k=3, router_temperature=1.0)
        paths = [str(folder / name) for name in self.names]
        self.arrow = create_arrow_model(
            base_model=load_base_model(self._base, torch.float32, DEVICE),
            task_specific_adapter_paths=paths,
            arrow_config=arrow,
        ).eval()
        self.folder = folder

    def _load(self, folder: Path, name: str = "default") -> PeftModel:
        base = load_base_model(self._base, torch.float32, DEVICE)
        return PeftModel.from_pretrained(base, folder, name, autocast_adapter_dtype=False).eval()

    def alone(self, ids: Tensor, row: int) -> Tensor:
        """Return the logits of one row by its own cluster's plain adapter."""
        place = self.folder / f"own-{row % K}"
        if not place.exists():
            write_adapter(self.gated.cluster(row % K), place)
        model = self._load(place)
        return model(input_ids=ids[row : row + 1]).logits


@torch.inference_mode()
def main(repeats: int) -> None:
    """Compare and report."""
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(Path(folder))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 40_000, (ROWS, TOKENS), generator=generator).to(DEVICE)
        weights = torch.eye(K)[torch.arange(ROWS) % K]
        names = [variants.names[i % K] for i in range(ROWS)]
        calls: dict[str, Callable[[], Tensor]] = {
            "one plain LoRA": lambda: variants.plain(input_ids=ids).logits,
            "gated, one gate per row": lambda: variants.routed(input_ids=ids).logits,
            "PEFT, adapter_names per row": lambda: (
                variants.mixed(input_ids=ids, adapter_names=names).logits
            ),
            "PEFT Arrow, top 3 per token": lambda: variants.arrow(input_ids=ids).logits,
            "gated, one gate per token": lambda: variants.routed(input_ids=ids).logits,
        }
        contexts = {
            "gated, one gate per row": lambda: variants.gating.applied(weights),
            "gated, one gate per token": lambda: variants.gating.applied_per_token(top_k=3),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, call in calls.items():
                with contexts.get(name, nullcontext)():
                    begin = time.perf_counter()
                    call().sum().item()  # waits for the device
                    seconds[name].append(time.perf_counter() - begin)
        with variants.gating.applied(weights):
            together = variants.routed(input_ids=ids).logits
        error = max(
            float((together[row] - variants.alone(ids, row)[0]).abs().max()) for row in range(K)
        )
    router = load_embedder(locate_embedder("all-minilm-l6-v2"), DEVICE)
    prompts = [f"What is {row} plus {17 * row}? Explain in one sentence." for row in range(ROWS)]
    embed_prompts(router, prompts)
    begin = time.perf_counter()
    embed_prompts(router, prompts)
    routing = (time.perf_counter() - begin) / ROWS
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    reference = median["one plain LoRA"]
    report(
        "routed_speed" if DEVICE == "cpu" else "routed_speed_gpu",
        "Throughput of a mixed batch, 32 prompts over 8 clusters",
        pd.DataFrame(
            {
                "variant": list(median),
                "median s": list(median.values()),
                "throughput / one plain LoRA": [reference / value for value in median.values()],
            }
        ),
        f"SmolLM2-135M, fp32 on {DEVICE}, {ROWS} prompts of {TOKENS} tokens, r = R = 16, "
        f"{repeats} forward passes each, in turn. Largest difference of logits between the mixed "
        f"batch and each cluster's own gated adapter run alone: {error:.1e}. Routing itself takes "
        f"{1000 * routing:.1f} ms per short prompt (all-MiniLM-L6-v2, batch of {ROWS}).",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
