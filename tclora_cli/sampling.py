"""Sample rows for ``tclora merge``: activation statistics, and a scale if one is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tclora.adapter import Adapter
from tclora.errors import AdapterError


@dataclass(frozen=True)
class SampleSource:
    """Where `merge_directories` takes activation statistics from.

    Attributes
    ----------
    sources : sequence of str
        ``NAME=FILE``, or files with a column ``adapter``.
    base : str or None
        Base model; what the adapters name if None.
    template : str
        "chat" or "plain".
    rows : int
        At most this many rows per adapter.
    scales : sequence of float
        Grid from which the method's scale is taken; empty: the method's own.
    """

    sources: Sequence[str]
    base: str | None
    template: str
    rows: int
    scales: Sequence[float] = ()


def settings_from_sample(
    sample: SampleSource,
    adapters: Sequence[Adapter],
    folder: Path,
    method: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Run the adapters' base model on the sample rows: statistics, and a scale if asked for.

    Returns what `merge` is to be given beside its settings.
    """
    from tclora.model.locate import (
        choose_dtype,
        default_device,
        load_base_model,
        load_tokenizer,
        locate_base_model,
    )
    from tclora.tune.rows import collect_all, encode_all, read_sample_files
    from tclora.tune.scale import is_scaled, tune_scale

    if sample.scales and "scale" in settings:
        raise AdapterError("--scales and --option scale=… exclude each other")
    if sample.scales and not is_scaled(method):
        raise AdapterError(f"--scales needs a method with a scale, {method} has none")
    rows = read_sample_files(sample.sources, [adapter.name for adapter in adapters], sample.rows)
    base = sample.base or next((a.base_model for a in adapters if a.base_model), None)
    if base is None:
        raise AdapterError("--sample needs --base: the adapters do not name their base model")
    location = locate_base_model(base)
    device = default_device()
    model = load_base_model(location, choose_dtype("auto", device), device)
    tokenizer = load_tokenizer(location)
    template = sample.template
    statistics = collect_all(model, tokenizer, rows, adapters, folder, template=template)
    if not sample.scales:
        return {"statistics": statistics}
    found = tune_scale(
        model,
        adapters,
        method,
        encode_all(tokenizer, rows, template=template),
        sample.scales,
        statistics=statistics,
        **settings,
    )
    return {"statistics": statistics, **found.options}
