"""A real library under many merges: what is merged, the rows it is measured on, a store of results.

Everything measured lands in a folder as it comes, one table of items and one record per cell, so
that a command that was stopped goes on where it was, and several may share the work.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout
from merge_scoring import Routed, score_part, under

from tclora.activations import ActivationStatistics, collect
from tclora.adapter import Adapter, read_adapter, write_adapter
from tclora.adapter.union import module_names
from tclora.files import atomic_path, write_json
from tclora.jobs.devices import exclusive
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.names import BASE, JOINT, OWN, cluster_name
from tclora.model.attach import attached
from tclora.model.base import Base
from tclora.model.reading import Reading, head_among, reading
from tclora.model.sample import Sample, Use
from tclora.model.tokens import TokenRow
from tclora.tensor import LibraryFactors, factorise

SAMPLE_ROWS: dict[Use, int] = {"statistics": 8, "scale": 4, "refit": 4}  # per cluster
_BUDGET, _GPU_BUDGET = 4096, 32768


Adapters = Mapping[int, Adapter] | Adapter | Routed | None


class Bench:
    """A library, held-out rows of trained and of other tasks, and a few sample rows.

    Parameters
    ----------
    library : Path
        A finished library whose run's folder ``work`` is there.
    store : Path
        Folder of what has been measured.
    rows, other_rows : int
        Held-out rows per trained task and per other task.
    choices : bool
        Compare the choices of other tasks by their likelihood.
    """

    def __init__(
        self, library: Path, store: Path, rows: int, other_rows: int, choices: bool = True
    ) -> None:
        self.layout, self.store, self.choices = Layout(library), store, choices
        self.manifest = manifest = read_manifest(library)
        self.seed, train = manifest.settings.seed, manifest.settings.train
        self.loaded = Base(
            location=manifest.base_model.location,
            digest=manifest.base_model.digest,
            dtype="float32",  # on a GPU too: methods differ by less than bf16 rounds
            template=train.template,
            max_tokens=train.max_tokens,
        ).load()
        self.model = self.loaded.model
        on_cpu = self.model.device.type == "cpu"
        self.budget = _BUDGET if on_cpu else _GPU_BUDGET  # positions per forward pass
        self.names = [cluster_name(k) for k in range(manifest.clustering.k)]
        self.adapters = [self.read(self.layout.adapter(name), name) for name in self.names]
        self.r = max(f.rank for f in self.adapters[0].modules.values())
        write_json(store / "about.json", {"base": manifest.base_model.id, "rank": self.r})
        held_out = pd.read_parquet(self.layout.held_out)
        chosen = [
            part.sample(min(len(part), rows if split == "test" else other_rows), random_state=0)
            for (split, _), part in held_out.groupby(["split", "task"], sort=True)
        ]
        self.use(pd.concat(chosen))

    @cached_property
    def reader(self) -> Reading:
        """How rows pass through the model."""
        head_trained = head_among(self.model, module_names(self.adapters))
        return reading(self.model, self.loaded.base.max_tokens, head_trained=head_trained)

    def use(self, rows: pd.DataFrame) -> None:
        """Measure on these rows (columns as of the held-out ones)."""
        self.rows = rows.reset_index(drop=True)
        self.tokens = self.loaded.encode(self.rows)

    @staticmethod
    def read(folder: Path, name: str) -> Adapter:
        """Read an adapter into memory."""
        opened = read_adapter(folder, name)
        return Adapter(name, dict(opened.modules), opened.base_model)

    @cached_property
    def joint(self) -> Adapter:
        """The adapter trained on the rows of all clusters."""
        return self.read(self.layout.adapter(JOINT), JOINT)

    @property
    def references(self) -> dict[str, Adapters]:
        """Return what every table holds beside the merges."""
        return {BASE: None, OWN: dict(enumerate(self.adapters)), JOINT: self.joint}

    def sample(self, use: Use) -> dict[str, list[TokenRow]]:
        """Return sample rows of every cluster, others for every use."""
        rows = {name: self.layout.rows(name) for name in self.names}
        most = max(SAMPLE_ROWS.values())
        sample = Sample(rows=rows, count=most, use=use, seed=self.seed, token_budget=self.budget)
        frames = {name: sample.frame(name).head(SAMPLE_ROWS[use]) for name in self.names}
        return {name: self.loaded.encode(frame) for name, frame in frames.items()}

    def statistics(self, of: str) -> ActivationStatistics:
        """Return the activation statistics of the base model, or with each own adapter."""
        folder, files = self.store / "grams" / of, self.statistics_files(of)
        modules = module_names(self.adapters)
        with exclusive(folder.with_suffix(".lock")):
            rows = self.sample("statistics") if not all(f.exists() for f in files) else {}
            for adapter, file in zip(self.adapters, files, strict=True):
                if not file.exists():
                    with attached(self.model, adapter if of == "own" else None):
                        found = collect(
                            self.model, rows[adapter.name], adapter.name, modules,
                            pad_id=self.loaded.pad_id, token_budget=self.budget,
                        )  # fmt: skip
                    found.save(file)
        return ActivationStatistics.load(*files)

    def statistics_files(self, of: str) -> list[Path]:
        """Return the files that `statistics` reads, and makes if they are not there."""
        return [self.store / "grams" / of / f"{name}.safetensors" for name in self.names]

    def factors(self, rank: int, normalise: bool = False) -> LibraryFactors:
        """Return the joint CP factors of the updates, and note the time that they took."""
        key = f"cp-{rank}{'-normalised' * normalise}"
        file = self.store / f"{key}.safetensors"
        with exclusive(file.with_suffix(".lock")):
            if not file.exists():
                begin = time.process_time()
                found = factorise(self.adapters, rank, normalise=normalise, n_starts=2)
                write_json(self.store / f"{key}.json", {"seconds": time.process_time() - begin})
                found.save(file)
        return LibraryFactors.load(file)

    def factor_seconds(self, rank: int) -> float:
        """Return the processor time that `factors` took."""
        text = (self.store / f"cp-{rank}.json").read_text(encoding="utf-8")
        return float(json.loads(text)["seconds"])

    def keep(self, key: str, make: Callable[[], tuple[Adapter, dict[str, Any]]]) -> Adapter:
        """Return an adapter of an earlier run, or make it; its record goes beside it."""
        folder = self.store / "merges" / key
        with exclusive(self.store / "merges" / f"{key}.lock"):
            if not folder.exists():
                begin = time.process_time()
                adapter, record = make()
                record = {"seconds": time.process_time() - begin} | record
                write_json(folder.with_suffix(".json"), record)
                write_adapter(adapter, folder)
        return self.read(folder, key)

    def record(self, key: str) -> dict[str, Any]:
        """Return what `keep` noted."""
        text = (self.store / "merges" / key).with_suffix(".json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def measure(self, key: str, make: Callable[[], Adapters]) -> None:
        """Measure an adapter, or one per cluster, on all rows, unless that has been or is done."""
        file = self.store / "cells" / f"{key}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(file.with_name(f"{key}.lock"), timeout=0):
                if file.exists():
                    return
                items = self.items(make()).assign(method=key)
                with atomic_path(file) as fresh:
                    items.to_parquet(fresh)
        except Timeout:  # another process is at it
            return
        print(key, summary(items), flush=True)

    def items(self, adapters: Adapters) -> pd.DataFrame:
        """Return NLL, tokens and correctness of every row."""
        parts = []
        for chosen, adapter in self._groups(adapters):
            parts.append(self._items([int(i) for i in chosen.index], adapter))
        labels = self.rows[["id", "split", "task", "cluster"]]
        return labels.join(pd.concat(parts))

    def _groups(self, adapters: Adapters) -> Iterator[tuple[pd.DataFrame, Adapter | Routed | None]]:
        if not isinstance(adapters, Mapping):
            yield self.rows, adapters
            return
        for cluster, part in self.rows.groupby("cluster"):
            yield part, adapters[int(str(cluster))]

    def _items(self, places: Sequence[int], adapter: Adapter | Routed | None) -> pd.DataFrame:
        """Measure rows: NLL; correct if the greedy answer, or the likeliest choice, is right.

        A greedy answer is the reference where each of its tokens is the likeliest one after the
        reference's earlier ones. Choices are compared for tasks that nothing was trained on.
        """
        rows = [self.tokens[place] for place in places]
        found = self._score(rows, places, adapter).set_axis(places)
        choices = self._choices(places)
        if choices:
            owners = [place for place, _, _ in choices]
            scored = self._score([row for _, _, row in choices], owners, adapter)
            table = pd.DataFrame([c[:2] for c in choices], columns=["place", "right"])
            best = table.assign(nll=scored["nll"].to_numpy()).sort_values("nll", kind="stable")
            right = best.groupby("place")["right"].first().astype(float)
            found.loc[right.index, "correct"] = right
        return found

    def _choices(self, places: Sequence[int]) -> list[tuple[int, bool, TokenRow]]:
        """Return every choice of the rows of other tasks: place, whether it is right, tokens."""
        listed = [
            (place, choice.strip() == row["response"], row["prompt"], choice.strip())
            for place, row in self.rows.loc[list(places)].iterrows()
            if self.choices and row["split"] == "ood" and row["choices"] is not None
            for choice in row["choices"]
        ]
        if not listed:
            return []
        frame = pd.DataFrame(listed, columns=["place", "right", "prompt", "response"])
        encoded = self.loaded.encode(frame)
        return list(zip(frame["place"].tolist(), frame["right"].tolist(), encoded, strict=True))

    @torch.no_grad()
    def _score(
        self, rows: Sequence[TokenRow], places: Sequence[int], adapter: Adapter | Routed | None
    ) -> pd.DataFrame:
        """Return nll, tokens and correct (greedy) of rows, in their order, which have places."""
        found: dict[int, tuple[float, int, float]] = {}
        with self.reader.ready():
            for part in self.reader.parts(rows, self.budget):
                chosen = [places[index] for index in part.rows]
                with under(self.model, adapter, chosen, part.lengths):
                    nll, right = score_part(self.model, part)
                for index, value, greedy in zip(
                    part.rows, nll.tolist(), right.tolist(), strict=True
                ):
                    found[index] = (value, len(rows[index].response), float(greedy))
        columns = ["nll", "tokens", "correct"]
        return pd.DataFrame([found[i] for i in range(len(rows))], columns=columns)


def summary(items: pd.DataFrame) -> str:
    """Return the NLL per token and the accuracy of each split, for the log."""
    return "  ".join(
        f"{split} {part['nll'].sum() / part['tokens'].sum():.4f} {part['correct'].mean():.3f}"
        for split, part in items.groupby("split")
    )
