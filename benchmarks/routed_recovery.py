"""What a routed library keeps at each CP rank, in bytes and FLOPs, against other ways to route.

Usage: ``python benchmarks/routed_recovery.py LIBRARY``, a finished run with held-out rows. Recovery
is (base − routed) / (base − own adapter) in response NLL per token on the held-out in-domain rows,
each routed by the text router; the interval is a paired bootstrap over items. Only NLL is
measured, nothing is generated.
"""

import sys
from pathlib import Path

import pandas as pd
import torch
from held_out import HeldOut
from peft import ArrowConfig, XLoraConfig, create_arrow_model, get_peft_model
from safetensors.numpy import load_file
from tables import report

from tclora.adapter import Adapter
from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.library.names import OWN, ROUTED
from tclora.merge import merge
from tclora.model.locate import locate_embedder
from tclora.model.loss import response_nll
from tclora.model.tokens import batches, encode_frame
from tclora.route import GatedAdapter, Router, derive, fit_gates, fit_router
from tclora.tensor import factorise

RANKS = (4, 8, 12, 16, 24, 32, 64, 96)
XLORA_ROWS, XLORA_BATCH, XLORA_LEARNING_RATE = 6, 4, 3e-3  # one pass; steps are slow
FRESH = 20  # held-out rows per task family, drawn anew


class Bench(HeldOut):
    """Ways to route the library's rows."""

    def __init__(self, library: Path) -> None:
        super().__init__(library, FRESH)
        clusters = pd.read_parquet(self.layout.clusters)
        vectors = load_file(self.layout.embeddings)["embeddings"]
        training = (clusters["split"] == "train").to_numpy()
        labels = clusters.loc[training, "cluster"].to_numpy()
        self.router = fit_router(vectors[training], labels)
        embedder = load_embedder(locate_embedder(self.manifest.embedding_model.id))
        self.vectors = embed_prompts(embedder, self.rows["prompt"].tolist())

    def routed(self, method: str, gated: GatedAdapter, router: Router) -> pd.DataFrame:
        """Measure rows, each routed by its text."""
        routing = router.route(self.vectors)
        with self.gated(gated) as (model, gating):
            return self.items(
                method,
                self.rows,
                lambda rows: routing.take(rows).context(gating),
                model,
            )

    def by_token(self, method: str, gated: GatedAdapter, top_k: int) -> pd.DataFrame:
        """Measure rows, every token routed in every module."""
        with self.gated(gated) as (model, gating):
            context = lambda _: gating.applied_per_token(top_k=top_k)  # noqa: E731
            return self.items(method, self.rows, context, model)

    def arrow(self, method: str, top_k: int) -> pd.DataFrame:
        """Measure rows by PEFT's Arrow over the separate adapters."""
        model = create_arrow_model(
            base_model=self.base(),
            task_specific_adapter_paths=[
                str(self.layout.adapter(adapter.name)) for adapter in self.adapters
            ],
            arrow_config=ArrowConfig(top_k=top_k, router_temperature=1.0),
        ).eval()
        return self.items(method, self.rows, model=model)

    @torch.enable_grad()
    def xlora(self, method: str) -> tuple[pd.DataFrame, int]:
        """Measure rows by PEFT's X-LoRA, its classifier trained on training rows of all clusters.

        Returns also the number of its classifier's parameters.
        """
        torch.manual_seed(0)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=self.model.config.hidden_size,
            adapters={  # PEFT looks its experts up by number
                str(k): str(self.layout.adapter(a.name)) for k, a in enumerate(self.adapters)
            },
        )
        base = self.base()
        base.config.use_cache = False  # as X-LoRA asks
        model = get_peft_model(base, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        rows = pd.concat(self.training_rows(a.name).head(XLORA_ROWS) for a in self.adapters)
        told = self.manifest.settings.train
        encoded = encode_frame(
            self.tokenizer,
            rows.sample(frac=1, random_state=0),
            template=told.template,
            max_tokens=told.max_tokens,
        )
        optimiser = torch.optim.Adam(trained, lr=XLORA_LEARNING_RATE)
        for start in range(0, len(encoded), XLORA_BATCH):
            part = encoded[start : start + XLORA_BATCH]
            (batch,) = batches(part, pad_id=self.tokenizer.pad_token_id, token_budget=1 << 30)
            optimiser.zero_grad()
            loss = response_nll(model, batch).sum() / batch.supervised
            loss.backward()
            optimiser.step()
            print(f"X-LoRA, {start} rows: {float(loss.detach()):.3f}", flush=True)
        model.eval()
        with torch.no_grad():
            items = self.items(method, self.rows, model=model)
        return items, sum(p.numel() for p in trained)


def cost(adapter: Adapter, gates: int = 0) -> tuple[float, float]:
    """Return megabytes in fp32 and million FLOPs per token of an adapter with K gates."""
    sizes = [(sum(f.shape), f.rank) for f in adapter.modules.values()]
    numbers = sum((sides + gates) * rank for sides, rank in sizes)
    flops = sum(2 * sides * rank + (rank if gates else 0) for sides, rank in sizes)
    return 4 * numbers / 1e6, flops / 1e6


def main(library: Path) -> None:
    """Measure everything and report."""
    bench = Bench(library)
    K = len(bench.adapters)
    separate = sum(cost(adapter)[0] for adapter in bench.adapters)
    rows: list[dict[str, object]] = []

    def add(name: str, rank: object, items: pd.DataFrame, size: tuple[float, float]) -> None:
        figures = bench.score(str(items["method"].iloc[0]), items)
        share = {"MB": size[0], "bytes / separate": size[0] / separate, "MFLOP/token": size[1]}
        rows.append({"library": name, "R": rank, **figures, **share})
        print(rows[-1], flush=True)

    for rank in RANKS:
        static = merge(bench.adapters, "tc-lora", rank=rank, statistics=bench.statistics).adapter
        gated = fit_gates(bench.adapters, static, bench.statistics)
        size = cost(gated.adapter, K)
        routed = bench.routed(ROUTED, gated, bench.router)
        add("routed (tc-lora factors, gates fitted on inputs)", rank, routed, size)
        if rank == 16:
            soft = derive(bench.router, "softmax")
            add("same, softmax at calibrated T", rank, bench.routed("softmax", gated, soft), size)
            for top in (1, 3):
                items = bench.by_token(f"token-{top}", gated, top)
                add(f"same, per token in factor space, top {top}", rank, items, size)
            add("its static merge", rank, bench.items("static", bench.rows, bench.attach(static)),
                cost(static))  # fmt: skip
        factors = factorise(bench.adapters, rank)
        mean = merge(bench.adapters, "tc-lora-mean", factors=factors).adapter
        free = fit_gates(bench.adapters, mean)
        items = bench.routed("free", free, bench.router)
        add("routed (CP of the updates, data-free)", rank, items, size)
    flops = cost(bench.adapters[0])[1]
    for top in (1, 3):
        items = bench.arrow(f"arrow-{top}", top)
        add(f"PEFT Arrow over the separate adapters, top {top}", "-", items, (separate, K * flops))
    items, numbers = bench.xlora("xlora")
    size = (separate + 4 * numbers / 1e6, K * flops + bench.model.num_parameters() * 2 / 1e6)
    add("PEFT X-LoRA over the separate adapters, two passes", "-", items, size)
    add("separate adapters, true cluster", "-",
        bench.references[bench.references["method"] == OWN].assign(method="own-again"),
        (separate, flops))  # fmt: skip
    report(
        "routed_recovery",
        "Recovery, bytes and FLOPs of the routed library by CP rank",
        pd.DataFrame(rows),
        f"{library.name}: {K} adapters of SmolLM2-135M-Instruct, r = 16, {len(bench.rows)} "
        "held-out in-domain rows, one training seed. MFLOP per token of the adapters' own products "
        "in all modules. X-LoRA's classifier (one linear layer) is trained on "
        f"{XLORA_ROWS} training rows per cluster; its own pass through the base model is counted.",
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(Path(sys.argv[1]))
