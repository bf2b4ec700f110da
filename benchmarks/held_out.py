"""A finished run's adapters measured on its held-out in-domain rows, by NLL alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tclora.adapter import Adapter, read_adapter
from tclora.evaluate import evaluate_frame
from tclora.manifest import read_manifest
from tclora.merge import ActivationStatistics
from tclora.merge.calibrate import attached
from tclora.models import load_base_model, load_tokenizer
from tclora.summary import BASE, OWN, recovery

Context = Callable[[Any], AbstractContextManager[Any]]


class HeldOut:
    """A library, its base model, its cluster adapters and its held-out in-domain rows."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self.manifest = read_manifest(library)
        self.location = self.manifest["base_model"]["location"]
        self.tokenizer = load_tokenizer(self.location)
        self.model = self.base()
        names = sorted(name for name in self.manifest["training"] if name != "joint")
        opened = [read_adapter(library / "adapters" / name) for name in names]
        self.adapters = [Adapter(a.name, dict(a.modules), a.base_model) for a in opened]
        grams = sorted((library / "work" / "statistics").glob("*.safetensors"))
        self.statistics = ActivationStatistics.load(*grams)
        rows = pd.read_parquet(library / "work" / "rows" / "evaluation.parquet")
        self.rows = rows[rows["split"] == "test"].reset_index(drop=True)
        own = [self.items(OWN, self.rows[self.rows["cluster"] == k], self.attach(a))
               for k, a in enumerate(self.adapters)]  # fmt: skip
        self.references = pd.concat([self.items(BASE, self.rows), *own])

    def base(self) -> Any:  # noqa: ANN401
        """Load the base model."""
        return load_base_model(self.location, torch.float32)

    def training_rows(self, adapter: str) -> pd.DataFrame:
        """Return the rows an adapter was trained on."""
        return pd.read_parquet(self.library / "work" / "rows" / f"{adapter}.parquet")

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
        config = self.manifest["config"]["train"]
        found = evaluate_frame(
            model or self.model,
            self.tokenizer,
            rows,
            template=config["template"],
            max_tokens=config["max_tokens"],
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
        }
