"""A gated adapter against one plain LoRA, PEFT's mixed-adapter batch and PEFT's Arrow.

SmolLM2-135M, K = 8 adapters of rank 16 on all linear layers, one batch of 32 prompts that belong to
all clusters: one forward pass of 64 tokens each, and greedy generation of 16 tokens after 8. Both
the plain LoRA and the gated one run with PEFT's own forward pass and with the fused one
(`tclora.route.fused`). Variants take turns, medians are compared. Also the largest difference
between the mixed batch's logits and each row's own gated adapter run alone.
Usage: ``python benchmarks/routed_speed.py [REPEATS]``.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pandas as pd
import torch
from libraries import SMOLLM2_135M, draw_library, layers
from peft import ArrowConfig, PeftModel, create_arrow_model
from peft.tuners.lora import Linear
from tables import report
from torch import Tensor

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.merge import merge
from tclora.model.locate import load_base_model, locate_base_model, locate_embedder
from tclora.route import Gating, fit_gates
from tclora.route.fused import fuse

K, ROWS, TOKENS = 8, 32, 64
SHORT, NEW = 8, 16
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
        self.plain_fused = self._load(folder / "static")
        for layer in self.plain_fused.modules():
            if isinstance(layer, Linear):
                fuse(layer, "default", lambda: _ungated)
        self.routed = self._load(folder / "static")
        self.gating = Gating(self.routed, self.gated)
        self.unfused = self._load(folder / "static")
        self.unfused_gating = Gating(self.unfused, self.gated)
        for layer in self.unfused.modules():
            if isinstance(layer, Linear):
                vars(layer).pop("forward")  # the gates are in hooks, PEFT's own pass is left
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


def _ungated(components: Tensor) -> Tensor:
    return components


def in_turn(
    work: Callable[[str], None],
    names: list[str],
    contexts: Mapping[str, Callable[[], AbstractContextManager[None]]],
    repeats: int,
) -> list[float]:
    """Return each variant's median seconds; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in names:
            with contexts.get(name, nullcontext)():
                begin = time.perf_counter()
                work(name)
                seconds[name].append(time.perf_counter() - begin)
    return [statistics.median(seconds[name][1:]) for name in names]


@torch.inference_mode()
def main(repeats: int) -> None:
    """Compare and report."""
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(Path(folder))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 40_000, (ROWS, TOKENS), generator=generator).to(DEVICE)
        weights = torch.eye(K)[torch.arange(ROWS) % K]
        names = [variants.names[i % K] for i in range(ROWS)]
        models = {
            "one plain LoRA, PEFT's pass": variants.plain,
            "one plain LoRA, fused": variants.plain_fused,
            "gated, one gate per row, PEFT's pass": variants.unfused,
            "gated, one gate per row, fused": variants.routed,
            "PEFT, adapter_names per row": variants.mixed,
            "PEFT Arrow, top 3 per token": variants.arrow,
            "gated, one gate per token, fused": variants.routed,
        }
        unfused = variants.unfused_gating
        contexts = {
            "gated, one gate per row, PEFT's pass": lambda: unfused.applied(weights),
            "gated, one gate per row, fused": lambda: variants.gating.applied(weights),
            "gated, one gate per token, fused": lambda: variants.gating.applied_per_token(top_k=3),
        }
        options = {"PEFT, adapter_names per row": {"adapter_names": names}}

        def forward(name: str) -> None:
            models[name](
                input_ids=ids, logits_to_keep=1, **options.get(name, {})
            ).logits.sum().item()

        def generate(name: str) -> None:
            models[name].generate(
                input_ids=ids[:, :SHORT],
                attention_mask=torch.ones_like(ids[:, :SHORT]),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                **options.get(name, {}),
            )

        table = pd.DataFrame({"variant": list(models)})
        for title, work in (("forward", forward), ("generate", generate)):
            median = in_turn(work, list(models), contexts, repeats)
            table[f"{title}, median s"] = median
            table[f"{title}, throughput / plain, PEFT's pass"] = [median[0] / m for m in median]
            table[f"{title}, throughput / plain, fused"] = [median[1] / m for m in median]
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
    report(
        "routed_speed" if DEVICE == "cpu" else "routed_speed_gpu",
        "Throughput of a mixed batch, 32 prompts over 8 clusters",
        table,
        f"SmolLM2-135M, fp32 on {DEVICE}, {ROWS} prompts; forward: {TOKENS} tokens each; generate: "
        f"{NEW} tokens after {SHORT}; r = R = 16, "
        f"{repeats} runs each, in turn. Largest difference of logits between the mixed "
        f"batch and each cluster's own gated adapter run alone: {error:.1e}. Routing itself takes "
        f"{1000 * routing:.1f} ms per short prompt (all-MiniLM-L6-v2, batch of {ROWS}).",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
