"""A finished run's adapters measured on held-out in-domain rows, by NLL alone.

The rows are the run's own test rows, or more of them drawn from the demo's task families.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel

from tclora.activations import ActivationStatistics
from tclora.adapter import Adapter, read_adapter, write_adapter
from tclora.data.demo import demo_examples
from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.recovery import recovery
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, OWN, cluster_number
from tclora.model.attach import attached
from tclora.model.locate import load_base_model, load_tokenizer
from tclora.route import GatedAdapter, Gating

Context = Callable[[Any], AbstractContextManager[Any]]
_OTHER_SEED = 1000  # the rows that a run never saw are drawn by the run's seed plus this


def cluster_adapters(trained: Iterable[str]) -> list[str]:
    """Return the names of the clusters' own adapters, in the order of their numbers."""
    numbers = {name: cluster_number(name) for name in trained}
    return sorted((n for n in numbers if numbers[n] is not None), key=lambda n: numbers[n] or 0)


class Opened:
    """A finished run's library with its base model and its clusters' adapters in memory.

    Parameters
    ----------
    library : Path
        Directory of a finished run.
    """

    def __init__(self, library: Path) -> None:
        self.library = library
        self.layout = layout = Layout(library)
        self.manifest = read_manifest(library)
        self.location = self.manifest.base_model.location
        self.tokenizer = load_tokenizer(self.location)
        self.model = self.base()
        names = cluster_adapters(self.manifest.training)
        self.adapters = [self.read(layout.adapter(name)) for name in names]
        self.statistics = ActivationStatistics.load(*map(layout.statistics, names))

    def read(self, path: Path) -> Adapter:
        """Read an adapter into memory."""
        opened = read_adapter(path)
        return Adapter(opened.name, dict(opened.modules), opened.base_model)

    def base(self) -> Any:  # noqa: ANN401
        """Load the base model."""
        return load_base_model(self.location, torch.float32)

    @contextmanager
    def gated(self, gated: GatedAdapter) -> Iterator[tuple[Any, Gating]]:
        """Load a gated adapter on a base model of its own."""
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(gated.adapter, Path(folder) / "static")
            model = PeftModel.from_pretrained(
                self.base(), Path(folder) / "static", autocast_adapter_dtype=False
            ).eval()
        yield model, Gating(model, gated)

    def drawn(self, count: int) -> pd.DataFrame:
        """Draw rows of the demo's families, of all splits, that the run did not see.

        Rows of trained families are in the cluster of most of their family's rows, others in none.
        """
        known = pd.read_parquet(self.layout.examples)
        seed = self.manifest.settings.seed + _OTHER_SEED
        drawn = demo_examples(train_rows=0, test_rows=count, seed=seed)
        drawn = drawn[~drawn["prompt"].isin(known["prompt"])]
        return drawn.assign(
            id=[f"fresh-{i}" for i in range(len(drawn))],
            answer=drawn["response"],
            cluster=drawn["task"].map(self.cluster_of_task()),
        )

    def cluster_of_task(self) -> dict[str, int]:
        """Return the cluster that most rows of every trained task went to."""
        clusters = pd.read_parquet(self.layout.clusters)
        training = clusters[clusters["split"] == "train"].groupby("task")["cluster"]
        return dict(training.agg(lambda labels: labels.mode()[0]))


class HeldOut(Opened):
    """A library and held-out in-domain rows, measured under the base and their own adapters.

    Parameters
    ----------
    library : Path
        Directory of a finished run.
    fresh : int
        Rows per task family to draw anew, for a library of the demo's data; 0 takes the run's own.
    """

    def __init__(self, library: Path, fresh: int = 0) -> None:
        super().__init__(library)
        rows = self.drawn(fresh) if fresh else pd.read_parquet(self.layout.held_out)
        self.rows = rows[rows["split"] == "test"].reset_index(drop=True)
        own = [self.items(OWN, self.rows[self.rows["cluster"] == k], self.attach(a))
               for k, a in enumerate(self.adapters)]  # fmt: skip
        self.references = pd.concat([self.items(BASE, self.rows), *own])

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
