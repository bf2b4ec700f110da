"""The methods of an evaluation: three references, then the merges from best to worst."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from tclora.library.contents import Contents
from tclora.library.names import BASE, JOINT, OWN, REFERENCES

LABELS = {BASE: "base model", OWN: "own adapters", JOINT: "joint LoRA"}


class Estimate(NamedTuple):
    """A measured value and the ends of its interval, NaN where there is none."""

    value: float
    low: float
    high: float


def label(method: str) -> str:
    """Return how the report calls a method."""
    return LABELS.get(method, method)


def references(present: Iterable[str]) -> list[str]:
    """Return the references among some methods, in the report's order."""
    names = set(present)
    return [method for method in REFERENCES if method in names]


def merges(contents: Contents) -> list[str]:
    """Return the merges of a library, best first.

    They are sorted by mean recovery, else by the in-domain NLL per token, else by name.
    """
    names = set(contents.manifest.merges) | set(contents.summary["method"])
    names |= set(contents.recovery["method"])
    recovery, nll = recoveries(contents, "mean"), overall_nll(contents, "test")
    last = Estimate(math.inf, math.inf, math.inf)

    def order(method: str) -> tuple[float, float, str]:
        gain = recovery[method].value if method in recovery else -math.inf
        return -gain, nll.get(method, last).value, method

    return sorted(names - set(REFERENCES), key=order)


def recoveries(contents: Contents, cluster: str) -> dict[str, Estimate]:
    """Return each method's recovery (fraction) on one cluster, or its "mean" or "worst"."""
    rows = contents.recovery[contents.recovery["cluster"] == cluster].dropna(subset=["recovery"])
    return {
        row["method"]: Estimate(row["recovery"], row["low"], row["high"])
        for row in rows.to_dict("records")
    }


def training_seeds(contents: Contents) -> int:
    """Return over how many training seeds the evaluation goes."""
    seeds = contents.summary["seeds"].dropna()
    return int(seeds.max()) if len(seeds) else 1


def tied_with_best(contents: Contents) -> list[str]:
    """Return the merges whose mean recovery is not told apart from that of the best."""
    rows = contents.winners
    rows = rows[(rows["metric"] == "recovery") & (rows["group_kind"] == "all")]
    tied = set(rows[rows["tie"].astype(bool)]["method"])
    return [method for method in merges(contents) if method in tied]


def overall_nll(contents: Contents, split: str) -> dict[str, Estimate]:
    """Return each method's NLL over all rows of a split (nats per response token)."""
    rows = contents.summary
    rows = rows[(rows["split"] == split) & (rows["group_kind"] == "all")].dropna(subset=["nll"])
    return {
        row["method"]: Estimate(row["nll"], row["nll_low"], row["nll_high"])
        for row in rows.to_dict("records")
    }
