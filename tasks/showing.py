"""What Prefect's UI shows of a finished run: its methods, sizes and places, as artifacts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from tasks.tracking import Run
from tclora.config import Config
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest, size
from tclora.report.notation import size as size_text

_KINDS = {"nll": "NLL", "accuracy": "accuracy"}
Row = dict[str, Any]


@task(name="show", cache_policy=NO_CACHE)
def show(run: Run, config: Config, library: Path, published: str | None = None) -> None:
    """Make the artifacts: a link to the MLflow run, tables of methods, sizes and places."""
    key = "".join(c if c.isalnum() else "-" for c in config.name.lower())
    # A store without a server is looked at with `tclora ui`.
    server = run.uri if run.uri.startswith("http") else "http://127.0.0.1:5000"
    link = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    create_link_artifact(link=link, link_text=f"MLflow run {run.run_id}", key=f"mlflow-{key}")
    tables = {
        "methods": ("NLL per response token, accuracy, recovery", list(_methods(library))),
        "sizes": ("Bytes on disk", list(_sizes(library))),
        "places": ("Where everything is", list(_places(run, link, library, published))),
    }
    for name, (description, rows) in tables.items():
        if rows:
            create_table_artifact(table=rows, key=f"{name}-{key}", description=description)


def _methods(library: Path) -> Iterator[Row]:
    """Yield every method's figures over all rows of each split, if it was measured."""
    tables = Layout(library).evaluation
    if not tables.summary.exists():
        return
    summary, recovery = pd.read_parquet(tables.summary), pd.read_parquet(tables.recovery)
    overall = summary[summary["group_kind"] == "all"]
    shares = recovery.set_index(["method", "cluster"])["recovery"].to_dict()
    for method, rows in overall.groupby("method", sort=False):
        row: Row = {"method": method}
        for part in rows.to_dict("records"):
            row |= {f"{part['split']} {_KINDS[kind]}": _rounded(part[kind]) for kind in _KINDS}
        names = {"recovery": "mean", "recovery of worst cluster": "worst"}
        yield row | {name: _rounded(shares.get((method, k))) for name, k in names.items()}


def _rounded(value: float | None) -> float | None:
    return None if pd.isna(value) else round(float(value), 4)


def _sizes(library: Path) -> Iterator[Row]:
    manifest = read_manifest(library)
    stored: Mapping[str, int | None] = manifest.storage.model_dump()
    here = Layout(library)
    merges = {
        here.merged(name).relative_to(library).as_posix(): merge.bytes
        for name, merge in manifest.merges.items()
    }
    whole = {"whole library": size(library)}
    for what, n_bytes in {**stored, **merges, **whole}.items():
        if n_bytes is not None:
            yield {"what": what.replace("_", " "), "bytes": n_bytes, "size": size_text(n_bytes)}


def _places(run: Run, link: str, library: Path, published: str | None) -> Iterator[Row]:
    places: dict[str, object] = {
        "library": library,
        **({"published": published} if published else {}),
        "report": Layout(library).report,
        "MLflow store": run.uri,
        "MLflow run": link,
    }
    for what, where in places.items():
        yield {"what": what, "where": str(where)}
