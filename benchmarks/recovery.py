"""Recovery of every merge method on the adapters of a finished demo run, on rows it never saw.

Usage: ``python benchmarks/recovery.py LIBRARY [--methods …] [--rank R] [--fresh N]``. Recovery is
(base − merged) / (base − own adapter) in response NLL per token: 1 where merging costs nothing; the
interval is a paired bootstrap over items. The last column is the recovery minus that of RegMean at
the same rank, paired item by item. Methods with a scale run at their published value and at the
best of a small grid on sample rows, which are training rows that the statistics come from too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from held_out import HeldOut
from tables import report

from tclora.adapter import Adapter
from tclora.evaluate.recovery import recovery
from tclora.merge import merge, methods
from tclora.model.tokens import Batch, batches, encode_frame
from tclora.tensor import factorise
from tclora.tune.components import fit_components, fit_loadings
from tclora.tune.scale import GRID, is_scaled, tune_scale

RIVAL = "regmean"
EMPHASES = (0.25, 0.5, 2.0, 8.0)
SAMPLE_ROWS = 4
# Need an input that a table of methods cannot give them, or are another name.
SKIPPED = {"tc-lora", "tc-lora-calibrated", "tc-lora-reconstruct"}


class Bench(HeldOut):
    """A library and a few sample rows of all its clusters."""

    def __init__(self, library: Path, fresh: int) -> None:
        super().__init__(library, fresh)
        self.rival: pd.DataFrame | None = None
        rows = pd.concat(self.training_rows(a.name).head(SAMPLE_ROWS) for a in self.adapters)
        settings = self.manifest.settings.train
        encoded = encode_frame(
            self.tokenizer, rows, template=settings.template, max_tokens=settings.max_tokens
        )
        pad = self.tokenizer.pad_token_id
        self.sample: Sequence[Batch] = list(batches(encoded, pad_id=pad, token_budget=2048))

    def row(
        self, name: str, rank: int | None, setting: str, **options: object
    ) -> dict[str, object]:
        """Measure one method at one rank."""
        merged = merge(self.adapters, name, rank=rank, statistics=self.statistics, **options)
        return {
            "method": name,
            "asked rank": rank or "own",
            "rank": merged.rank,
            "setting": setting,
            "lost in truncation": merged.truncation_loss,
            **self.measured(f"{name}/{rank}/{setting}", merged.adapter, name == RIVAL and rank),
        }

    @torch.no_grad()
    def measured(self, label: str, adapter: Adapter, is_rival: object = False) -> dict[str, object]:
        """Measure a merge, alone and against the rival."""
        items = self.items(label, self.rows, self.attach(adapter))
        if is_rival:
            self.rival = items.assign(method=RIVAL)
        figures = self.score(label, items)
        if self.rival is not None and not is_rival:
            both = pd.concat([self.references, self.rival, items])
            rows = recovery(both, against=RIVAL).set_index(["method", "cluster"])
            mean = rows.loc[(label, "mean")]
            figures[f"minus {RIVAL}, same items"] = (
                f"{mean['recovery']:+.4f} [{mean['low']:+.4f}, {mean['high']:+.4f}]"
            )
        return figures

    def refitted(self, rank: int) -> list[dict[str, object]]:
        """Measure the merges whose weights are fitted by the model's loss."""
        factors = factorise(self.adapters, rank)
        loadings = fit_loadings(self.model, factors, self.sample, n_steps=10)
        informed = merge(self.adapters, "tc-lora", rank=rank, statistics=self.statistics)
        components = fit_components(self.model, informed.adapter, self.sample, n_steps=10)
        return [
            {"method": name, "asked rank": rank, "rank": rank, "setting": "fitted",
             "lost in truncation": 0.0, **self.measured(name, adapter)}
            for name, adapter in (
                ("tc-lora-calibrated (K weights on the data-free CP)", loadings.adapter),
                ("tc-lora-activation, R component weights refitted", components.adapter),
            )
        ]  # fmt: skip


def main(library: Path, chosen: list[str], rank: int, fresh: int) -> None:
    """Run all methods and report."""
    torch.manual_seed(0)
    with torch.no_grad():
        bench = Bench(library, fresh)
    rows: list[dict[str, object]] = [bench.row(RIVAL, rank, "-")]
    for emphasis in EMPHASES if not chosen else ():
        row = bench.row("tc-lora-activation", rank, f"emphasis {emphasis}", emphasis=emphasis)
        rows.append(row)
        save(bench, rows)
    for info in methods():
        if info.name in SKIPPED or (chosen and info.name not in chosen):
            continue
        settings: list[tuple[str, dict[str, float]]] = [("-", {})]
        if is_scaled(info.name):
            best = tune_scale(bench.model, bench.adapters, info.name, bench.sample, rank=rank).scale
            published = f"scale {info.options['scale']} (published)"
            settings = [(published, {}), (f"scale {best} (tuned at {rank})", {"scale": best})]
        for setting, options in settings:
            for asked in (None, rank):
                if (info.name, asked) == (RIVAL, rank):
                    continue
                rows.append(bench.row(info.name, asked, setting, **options))
                save(bench, rows)
                if rows[-1]["rank"] == rank:
                    break  # its own rank is this one
    if not chosen:
        save(bench, rows + bench.refitted(rank))


def save(bench: Bench, rows: list[dict[str, object]]) -> None:
    """Report what has been measured so far."""
    merge_settings = bench.manifest.settings.merge
    report(
        "recovery",
        "Recovery of the demo's adapters by merge method",
        pd.DataFrame(rows).sort_values("mean", ascending=False),
        f"{bench.library.name}: SmolLM2-135M-Instruct, {len(bench.adapters)} clusters, "
        f"{len(bench.rows)} held-out rows, one training seed; statistics from "
        f"{merge_settings.sample_rows} training rows per cluster, scales tuned on "
        f"{SAMPLE_ROWS} of them over {GRID}.",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--fresh", type=int, default=20, help="rows per task family, drawn anew")
    arguments = parser.parse_args()
    main(arguments.library, arguments.methods, arguments.rank, arguments.fresh)
