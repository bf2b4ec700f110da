"""What the report says first: the verdict, the key figures and the profile of the data."""

from dataclasses import dataclass

import pandas as pd

from tclora.library.contents import Contents
from tclora.library.names import BASE, JOINT, OWN
from tclora.report.methods import (
    Estimate,
    merges,
    overall_nll,
    recoveries,
    tied_with_best,
)
from tclora.report.notation import interval, number, percent, size

_LENGTHS = {
    "prompt_tokens_mean": "mean prompt",
    "prompt_tokens_max": "longest prompt",
    "response_tokens_mean": "mean response",
    "response_tokens_max": "longest response",
}
_APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
_LOSSES = {"skipped_rows", "truncated_rows", "repeated_prompts"}


@dataclass(frozen=True)
class Fact:
    """One named value; `warn` marks one to look at, `note` qualifies it."""

    name: str
    value: str
    note: str = ""
    warn: bool = False


def verdict(contents: Contents) -> str:
    """Say what the run found: the best merge, the primary one, the joint LoRA, own adapters."""
    parts = (_best_merge, _primary_merge, _joint_adapter, _own_adapters)
    sentences = [part(contents) for part in parts]
    return " ".join(sentence for sentence in sentences if sentence)


def key_facts(contents: Contents) -> list[Fact]:
    """Return the symbols of the run and its headline numbers."""
    manifest = contents.manifest
    clustering, factors, storage = manifest.clustering, manifest.factors, manifest.storage
    facts = [
        Fact("training rows", number(len(contents.training_rows))),
        Fact("clusters K", str(clustering.k), clustering.method),
        Fact("LoRA rank r", str(manifest.settings.train.r)),
        Fact("CP rank R", str(factors.rank)),
        Fact("explained variance", f"{percent(factors.explained_variance, 1)} %", "at R"),
    ]
    separate, shared = storage.separate_adapters, storage.factors
    if separate and shared:
        share = f"{percent(shared / separate)} %"
        facts.append(Fact("shared factors", size(shared), f"{share} of {size(separate)}"))
    return facts


def data_profile(contents: Contents) -> list[Fact]:
    """Return the profile of the data with readable names; rows lost or cut are marked."""
    return [
        Fact(
            _readable(name),
            number(value, 0 if float(value).is_integer() else 1),
            "tokens" if name in _LENGTHS else "",
            warn=name in _LOSSES and value > 0,
        )
        for name, value in contents.manifest.profile.items()
    ]


def _readable(name: str) -> str:
    if name.startswith("rows_"):
        return f"{name.removeprefix('rows_')} rows"
    return _LENGTHS.get(name, name.replace("_", " "))


def explained_variance_points(contents: Contents) -> list[dict[str, float]]:
    """Return the explained variance (fraction) at each CP rank: overall, lowest, highest module."""
    curve = contents.explained_variance
    overall = curve[curve["module"] == "overall"].groupby("rank")["explained_variance"].first()
    modules = curve[curve["module"] != "overall"].groupby("rank")["explained_variance"]
    points = pd.DataFrame({"overall": overall, "lowest": modules.min(), "highest": modules.max()})
    return [{str(k): v for k, v in row.items()} for row in points.reset_index().to_dict("records")]


def no_recovery(contents: Contents) -> str:
    """Say why no merge has a recovery."""
    if contents.recovery.empty:
        return "Recovery was not measured."
    return "Recovery is undefined: no own adapter has a lower NLL than the base model."


def _best_merge(contents: Contents) -> str:
    means = recoveries(contents, "mean")
    ranked = [method for method in merges(contents) if method in means]
    if not ranked:
        return no_recovery(contents)
    best = ranked[0]
    k = contents.manifest.clustering.k
    among = f"the best of {len(ranked)} methods, " if len(ranked) > 1 else ""
    found = (
        f"{best}{_rank(contents, best)}, {among}recovers {_percent(means[best])} of what the {k} "
        f"clusters{_APOSTROPHE} own adapters gain over the base model{_worst(contents, best)}."
    )
    tied = " and ".join(tied_with_best(contents))
    return f"{found} It is not told apart from {tied} by these items." if tied else found


def _primary_merge(contents: Contents) -> str:
    primary, means = contents.primary, recoveries(contents, "mean")
    ranked = [method for method in merges(contents) if method in means]
    if primary not in ranked or primary == ranked[0]:
        return ""
    recovered = _percent(means[primary])
    return f"The primary merge, {primary}, recovers {recovered}{_worst(contents, primary)}."


def _joint_adapter(contents: Contents) -> str:
    means = recoveries(contents, "mean")
    if JOINT not in means:
        return ""
    recovered = f"{_percent(means[JOINT])}{_worst(contents, JOINT)}"
    return f"One LoRA trained on all rows recovers {recovered}."


def _own_adapters(contents: Contents) -> str:
    nll = overall_nll(contents, "test")
    if not {BASE, OWN} <= set(nll):
        return ""
    numbers = f"{_nats(nll[BASE])} to {_nats(nll[OWN])} nats per token"
    if nll[OWN].value < nll[BASE].value:
        return f"Own adapters lower the in-domain NLL from {numbers}."
    return f"Own adapters do not lower the in-domain NLL ({numbers}): recovery means nothing here."


def _worst(contents: Contents, method: str) -> str:
    worst = recoveries(contents, "worst")
    return f" (worst cluster: {_percent(worst[method])})" if method in worst else ""


def _rank(contents: Contents, method: str) -> str:
    merge = contents.manifest.merges.get(method)
    return f" (rank {merge.rank})" if merge else ""


def _percent(share: Estimate) -> str:
    return f"{percent(share.value)} % {interval(percent(share.low), percent(share.high))}".rstrip()


def _nats(nll: Estimate) -> str:
    ends = interval(number(nll.low, 3), number(nll.high, 3))
    return f"{number(nll.value, 3)} {ends}".rstrip()
