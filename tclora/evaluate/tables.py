"""Tables of an evaluation: figures with intervals and n per task and method, in many formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tclora.evaluate.recovery import recovery, summarise
from tclora.files import atomic_path, write_text
from tclora.library.names import BASE, OWN

SPLITS = {"test": "in-domain", "ood": "out of domain", "composition": "composition"}
METRICS = {
    "accuracy": "Score",
    "accuracy_norm": "Accuracy of choices by log-likelihood per character",
    "nll": "NLL of the response (nats per token)",
}
ITEMS = "answers.parquet"  # one row per method and item
ENDS = ("", "_low", "_high", "_n")  # of a figure: itself, its interval, its number of items
_DIGITS = 3


@dataclass(frozen=True)
class Tables:
    """What an evaluation found.

    Attributes
    ----------
    items : DataFrame
        One row per method and item.
    summary : DataFrame
        See `tclora.evaluate.recovery.summarise`.
    recovery : DataFrame
        See `tclora.evaluate.recovery.recovery`; empty without base, own adapters and clusters.
    """

    items: pd.DataFrame
    summary: pd.DataFrame
    recovery: pd.DataFrame

    @classmethod
    def of(cls, items: pd.DataFrame, **options: Any) -> "Tables":  # noqa: ANN401
        """Summarise items; options are those of `tclora.evaluate.recovery.summarise`."""
        methods = set(items["method"])
        known = items.dropna(subset=["nll", "cluster"])
        found = pd.DataFrame(columns=["method", "cluster", "n", "seeds", "recovery", "low", "high"])
        if {BASE, OWN} <= methods and (known["split"] == "test").any():
            found = recovery(known, **options)
        return cls(items, summarise(items, **options), found)

    def by_task(self, metric: str) -> pd.DataFrame:
        """Return a table of one metric: tasks and splits by methods, each with its interval and n.

        Parameters
        ----------
        metric : str
            One of `METRICS`.

        Returns
        -------
        DataFrame
            Texts. Columns split, task, n and one per method; empty where nothing was measured.
        """
        rows = self.summary.dropna(subset=[metric])
        rows = rows[rows["group_kind"].isin(["task", "skills", "all"])]
        lines = []
        for split in SPLITS:
            part = rows[rows["split"] == split]
            kinds = ["skills" if (part["group_kind"] == "skills").any() else "task", "all"]
            for kind in kinds:
                for name, group in part[part["group_kind"] == kind].groupby("group", sort=True):
                    cells = {row["method"]: _cell(row, metric) for row in group.to_dict("records")}
                    n = int(group[f"{metric}_n"].max())
                    lines.append({"split": SPLITS[split], "task": name, "n": str(n)} | cells)
        columns = ["split", "task", "n", *self.summary["method"].unique()]
        return pd.DataFrame(lines, columns=columns).fillna("-")

    def of_recovery(self) -> pd.DataFrame:
        """Return the recovery of every method: mean over clusters, its interval, and the worst."""
        found = self.recovery
        lines = [
            {
                "method": method,
                "n": str(int(part.loc["mean", "n"])),
                "recovery": _cell(dict(part.loc["mean"]), "recovery", ends=("low", "high")),
                "worst cluster": f"{part.loc['worst', 'recovery']:.{_DIGITS}f}",
            }
            for method, part in (
                (m, found[found["method"] == m].set_index("cluster"))
                for m in found["method"].unique()
            )
        ]
        return pd.DataFrame(lines, columns=["method", "n", "recovery", "worst cluster"])

    def shown(self) -> Mapping[str, pd.DataFrame]:
        """Return the tables that have something in them, by title."""
        tables = {
            title: self.by_task(metric)
            for metric, title in METRICS.items()
            if metric in self.summary
        }
        tables["Recovery of what the own adapters gain in NLL"] = self.of_recovery()
        return {title: table for title, table in tables.items() if not table.empty}


def write_tables(tables: Tables, folder: Path) -> list[Path]:
    """Write an evaluation's tables: Parquet, CSV, Markdown, LaTeX and HTML.

    Parameters
    ----------
    tables : Tables
    folder : Path
        Where to.

    Returns
    -------
    list of Path
        The files.
    """
    files = [folder / name for name in (ITEMS, "figures.parquet", "recovered.parquet")]
    frames = (tables.items, tables.summary, tables.recovery)
    for file, frame in zip(files, frames, strict=True):
        with atomic_path(file) as fresh:
            frame.to_parquet(fresh)
    texts = {
        "figures.csv": tables.summary.to_csv(index=False),
        "tables.md": "\n".join(_markdown(*table) for table in tables.shown().items()),
        "tables.tex": "\n".join(_latex(*table) for table in tables.shown().items()),
        "tables.html": _page(tables.shown()),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return files + [folder / name for name in texts]


def flat_figures(rows: pd.DataFrame) -> dict[str, float]:
    """Return the figures of one method's summary by a path of split, group, metric and `ENDS`."""
    found: dict[str, float] = {}
    for row in rows.to_dict("records"):
        group = "" if row["group_kind"] == "all" else f"/{row['group_kind']}-{row['group']}"
        for kind in (metric for metric in METRICS if metric in row):
            for end in ENDS:
                found[f"{row['split']}{group}/{kind}{end}"] = float(row[f"{kind}{end}"])
    return found


def _cell(row: Mapping[Any, Any], metric: str, ends: tuple[str, str] | None = None) -> str:
    low, high = ends or (f"{metric}_low", f"{metric}_high")
    if pd.isna(row[metric]):
        return "-"
    value, *interval = (f"{row[name]:.{_DIGITS}f}" for name in (metric, low, high))
    return f"{value} [{', '.join(interval)}]"


def _markdown(title: str, table: pd.DataFrame) -> str:
    rule = ["---"] * len(table.columns)
    rows = [list(table.columns), rule, *table.astype(str).to_numpy().tolist()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([f"## {title}", "", *lines, ""])


def _latex(title: str, table: pd.DataFrame) -> str:
    return str(table.to_latex(index=False, escape=True, caption=title))


def _page(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return one self-contained page."""
    parts = [f"<h2>{title}</h2>\n{table.to_html(index=False)}" for title, table in tables.items()]
    style = (
        "body{font:15px/1.4 system-ui,sans-serif;margin:2rem;color:#222}"
        "table{border-collapse:collapse;border:0}td,th{border:0;border-bottom:1px solid #ddd;"
        "padding:.25rem .8rem;text-align:right;white-space:nowrap}"
        "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}"
    )
    head = f'<meta charset="utf-8"><title>Evaluation</title><style>{style}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"
