"""What clusters' adapters do to each other's held-out rows, and which measure of them foretells it.

    python benchmarks/harm.py LIBRARY [--rows 16]

Every adapter is added to every other cluster's own, on rows that no adapter was trained on; the
measures are those of the factors alone.
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from tables import report

from tclora.adapter import read_adapter
from tclora.config import MeasureConfig
from tclora.evaluate.cross import measure_cross
from tclora.evaluate.harm import foretold, summarise_cross
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import cluster_number
from tclora.model.base import Base
from tclora.tensor.interference import interference


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows per cluster")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    layout, manifest = Layout(arguments.library), read_manifest(arguments.library)
    names = [name for name in manifest.training if cluster_number(name) is not None]
    adapters = {name: layout.adapter(name) for name in names}
    settings = manifest.settings.train
    base = Base(
        location=manifest.base_model.location,
        digest=manifest.base_model.digest,
        dtype=arguments.dtype,
        template=settings.template,
        max_tokens=settings.max_tokens,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "crossed")
        measure_cross(
            base=base, rows=layout.held_out, adapters=adapters, per_cluster=arguments.rows,
            seed=0, config=MeasureConfig(), file=file,
        )  # fmt: skip
        crossed = summarise_cross(pd.read_parquet(file))
    pairs = interference([read_adapter(path, name) for name, path in adapters.items()]).pairs()
    found = foretold(crossed, pairs)
    means = pairs.drop(columns=["first", "second"]).mean().rename("mean over pairs")
    table = found.merge(means, left_on="measure", right_index=True)
    harm = crossed[crossed["added"]]
    sure = int((harm["change_low"] > 0).sum())
    gain = (crossed[(crossed["adapter"] == "base")]["change"]).mean()
    note = (
        f"Library: {manifest.name}, {len(names)} clusters, {arguments.rows} rows of each; own "
        f"adapters gain {gain:.3f} nats per token over the base. Mean harm "
        f"{harm['change'].mean():.3f}, from {harm['change'].min():.3f} to "
        f"{harm['change'].max():.3f}; above 0 with its 95 % interval in {sure} of {len(harm)} "
        "ordered pairs. rho: Spearman's correlation of the measure with the harm over ordered "
        "pairs, interval by resampling clusters, p by permuting them (Mantel)."
    )
    report("harm", "Harm that adapters do to each other's rows, foretold by their factors",
           table, note)  # fmt: skip


if __name__ == "__main__":
    main()
