"""A finished run's adapters measured on held-out in-domain rows, by NLL alone.

The rows are the run's own test rows, or more of them drawn from the demo's task families.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tclora.activations import ActivationStatistics
from tclora.adapter import Adapter, read_adapter
from tclora.data.demo import demo_examples
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.recovery import recovery
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, OWN, cluster_number
from tclora.model.attach import attached
from tclora.model.locate import load_base_model, load_tokenizer

Context = Callable[[Any], AbstractContextManager[Any]]
_OTHER_SEED = 1000  # the rows that a run never saw are drawn by the run's seed plus this


def cluster_adapters(trained: Iterable[str]) -> list[str]:
    """Return the names of the clusters' own adapters, in the order of their numbers."""
    numbers = {name: cluster_number(name) for name in trained}
    return sorted((n for n in numbers if numbers[n] is not None), key=lambda n: numbers[n] or 0)


class HeldOut:
    """A library, its base model, its cluster adapters and held-out in-domain rows.

    Parameters
    ----------
    library : Path
        Directory of a finished run.
    fresh : int
        Rows per task family to draw anew, for a library of the demo's data; 0 takes the run's own.
    """

    def __init__(self, library: Path, fresh: int = 0) -> None:
        self.library = library
        self.layout = layout = Layout(library)
        self.manifest = read_manifest(library)
        self.location = self.manifest.base_model.location
        self.tokenizer = load_tokenizer(self.location)
        self.model = self.base()
        names = cluster_adapters(self.manifest.training)
        opened = [read_adapter(layout.adapter(name)) for name in names]
        self.adapters = [Adapter(a.name, dict(a.modules), a.base_model) for a in opened]
        self.statistics = ActivationStatistics.load(*map(layout.statistics, names))
        rows = pd.read_parquet(layout.held_out)
        self.rows = self._drawn(fresh) if fresh else rows[rows["split"] == "test"]
        self.rows = self.rows.reset_index(drop=True)
        own = [self.items(OWN, self.rows[self.rows["cluster"] == k], self.attach(a))
               for k, a in enumerate(self.adapters)]  # fmt: skip
        self.references = pd.concat([self.items(BASE, self.rows), *own])

    def _drawn(self, count: int) -> pd.DataFrame:
        """Draw rows that the run did not see, each in the cluster of most of its task's rows."""
        known = pd.read_parquet(self.layout.examples)
        clusters = pd.read_parquet(self.layout.clusters)
        training = known.merge(clusters[["id", "cluster"]], on="id")
        cluster_of = training[training["split"] == "train"].groupby("task")["cluster"]
        seed = self.manifest.settings.seed + _OTHER_SEED
        drawn = demo_examples(train_rows=0, test_rows=count, seed=seed)
        drawn = drawn[(drawn["split"] == "test") & ~drawn["prompt"].isin(known["prompt"])]
        return drawn.assign(
            id=[f"fresh-{i}" for i in range(len(drawn))],
            answer=drawn["response"],
            cluster=drawn["task"].map(cluster_of.agg(lambda labels: labels.mode()[0])),
        )

    def base(self) -> Any:  # noqa: ANN401
        """Load the base model."""
        return load_base_model(self.location, torch.float32)

    def training_rows(self, adapter: str) -> pd.DataFrame:
        """Return the rows an adapter was trained on."""
        return pd.read_parquet(self.layout.rows(adapter))

    def attach(self, adapter: Adapter) -> Context:
        """Return a context with one adapter for all rows."""
        return lambda _: attached(self.model, adapter)

    def items(
        self,
        method: str,
        rows: pd.DataFrame,
        context: Context = lambda _: nullcontext(),
        model: Any = None,  # noqa: ANN401
    ) -> pd.DataFrame:
        """Measure the NLL of rows."""
        settings = self.manifest.settings.train
        found = evaluate_frame(
            model or self.model,
            self.tokenizer,
            rows,
            template=settings.template,
            max_tokens=settings.max_tokens,
            token_budget=2048,
            max_new_tokens=None,
            context=context,
        )
        labels = rows[["split", "task", "cluster"]].reset_index(drop=True)
        return pd.concat([found, labels], axis=1).assign(method=method)

    def score(self, method: str, items: pd.DataFrame) -> dict[str, object]:
        """Return mean and worst recovery."""
        table = recovery(pd.concat([self.references, items]))
        rows = table.set_index(["method", "cluster"])
        mean, worst = rows.loc[(method, "mean")], rows.loc[(method, "worst")]
        return {
            "mean": mean["recovery"],
            "interval": f"{mean['low']:.3f} to {mean['high']:.3f}",
            "worst": worst["recovery"],
            "rows of worst": worst["n"],
        }
