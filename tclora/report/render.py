"""Fill the report's template from a library's contents and write it."""

import base64
import hashlib
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tclora.files import write_text
from tclora.library.contents import Contents, read_contents
from tclora.library.layout import Layout
from tclora.report import notation
from tclora.report.clusters import (
    cluster_ids,
    clustering_quality,
    summarise_clusters,
    tasks_by_cluster,
)
from tclora.report.comparison import compare_recovery, compare_splits
from tclora.report.examples import MAX_TASKS, choose_examples, judge
from tclora.report.figures import draw_figures
from tclora.report.interference import (
    correlations,
    most_conflict,
    rows_of_harm,
    shared_facts,
)
from tclora.report.methods import merges, recoveries, training_seeds
from tclora.report.overview import (
    data_profile,
    explained_variance_points,
    key_facts,
    no_recovery,
    verdict,
)
from tclora.report.palette import DARK, LIGHT, cluster_name
from tclora.report.routing import routed_prompts, router_quality, short_destinations
from tclora.report.scatter import MAP_POINTS, task_markers
from tclora.report.svg import inline_svg

_log = logging.getLogger(__name__)

_TITLES = {
    "cluster_map": "Training rows on the first two principal axes, coloured by cluster",
    "cluster_sizes": "Training rows per cluster",
    "loss_curves": "Training loss per adapter",
    "explained_variance": "Explained variance against the CP rank",
    "recovery": "Mean recovery per method with its interval and worst cluster",
    "storage": "Bytes of the separate adapters, the shared factors and each merge",
    "routing": "Mean routing weights of the held-out prompts of every task",
    "interference": "Share of every two adapters' interaction that cancels, cluster by cluster",
    "harm": "Rise of the loss of every cluster's rows when another adapter is added to its own",
    "layer_map": "Share of the adapters' interaction that cancels, by layer and kind of module",
    "shared_energy": "Share of the joint factors' energy that clusters share, by layer",
}


def write_report(library: Path) -> Path:
    """Write a library's report, one self-contained HTML file.

    Parameters
    ----------
    library : Path
        Library directory; nothing else is read.

    Returns
    -------
    Path
        ``report.html`` in the library; the same contents give the same bytes.

    Raises
    ------
    LibraryError
        If a mandatory file is missing or unreadable.
    """
    contents = read_contents(library)
    path = Layout(library).report
    write_text(path, render(contents, draw_figures(contents)))
    _log.info("wrote %s", path)
    return path


def render(contents: Contents, drawn: Mapping[str, Figure]) -> str:
    """Return the report of a library's contents and figures as HTML."""
    environment = _environment()
    script = environment.get_template("sorting.html").render()
    return environment.get_template("template.html").render(
        library=contents.manifest,
        settings=contents.manifest.settings,
        script=Markup(script),  # noqa: S704
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        palettes={"light": LIGHT, "dark": DARK},
        figures=_inline(drawn),
        verdict=verdict(contents),
        facts=key_facts(contents),
        data_profile=data_profile(contents),
        quality=clustering_quality(contents.manifest.clustering),
        cluster_ids=cluster_ids(contents),
        clusters=summarise_clusters(contents),
        tasks=tasks_by_cluster(contents),
        no_recovery=no_recovery(contents),
        curve=explained_variance_points(contents),
        marked=bool(task_markers(contents)),
        map_points=MAP_POINTS,
        seeds=training_seeds(contents),
        comparisons=compare_splits(contents),
        recovery=compare_recovery(contents),
        mean_recovery={m: v.value for m, v in recoveries(contents, "mean").items()},
        ordered_merges=[m for m in merges(contents) if m in contents.manifest.merges],
        lm_eval=contents.lm_eval.to_dict("records"),
        destinations=short_destinations(contents),
        routed_prompts=routed_prompts(contents),
        router_quality=router_quality(contents),
        correlations=correlations(contents),
        harm_rows=rows_of_harm(contents),
        most_conflict=most_conflict(contents),
        shared_facts=shared_facts(contents),
        examples=choose_examples(contents),
        judge=judge(contents),
        max_tasks=MAX_TASKS,
        config_yaml=yaml.safe_dump(contents.manifest.config, sort_keys=False, allow_unicode=True),
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tclora", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": notation.number,
        "percent": notation.percent,
        "interval": notation.interval,
        "size": notation.size,
        "duration": notation.duration,
        "cluster_name": cluster_name,
    }
    return environment


def _inline(drawn: Mapping[str, Figure]) -> dict[str, str]:
    """Return each figure as SVG, empty where there is none; matplotlib escapes its texts."""
    svgs = {name: inline_svg(figure, name, _TITLES[name]) for name, figure in drawn.items()}
    return {name: Markup(svgs.get(name, "")) for name in _TITLES}  # noqa: S704
