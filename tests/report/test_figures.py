import io
import json

import pandas as pd
import pytest

from tclora.errors import LibraryError
from tclora.report import figures
from tclora.report.palette import DARK, LIGHT, css_variables
from tclora.report.svg import inline_svg
from tests.report.library import build_library, seal

NAMES = [
    "cluster_map",
    "cluster_sizes",
    "loss_curves",
    "explained_variance",
    "recovery",
    "storage",
    "routing",
    "interference",
    "shared_energy",
    "harm",
    "layer_map",
]


@pytest.fixture(scope="module")
def drawn(finished):
    return figures(finished)


def test_every_figure_is_drawn_and_saves_as_png(drawn):
    assert list(drawn) == NAMES
    for figure in drawn.values():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=40)
        assert png.getvalue().startswith(b"\x89PNG")


def test_figures_without_data_are_left_out(library):
    (library / "evaluation/recovery.parquet").unlink()
    for log in (library / "training").iterdir():
        log.unlink()
    path = library / "explained_variance.parquet"
    curve = pd.read_parquet(path)
    curve[curve["module"] != "overall"].to_parquet(path)
    for name in ("interference", "interference_modules", "shared_structure"):
        (library / f"{name}.parquet").unlink()
    seal(library)
    assert list(figures(library)) == ["cluster_map", "cluster_sizes", "storage", "routing"]


def test_rows_without_tasks_are_drawn(tmp_path):
    figure = figures(build_library(tmp_path, labelled=False))["cluster_map"]
    assert figure.legends == []


def test_a_single_step_of_training_is_drawn(library):
    log = [{"step": 0, "loss": 2.0, "lr": 0.0, "grad_norm": 1.0, "tokens": 9, "seconds": 0.1}]
    (library / "training/cluster-0.json").write_text(json.dumps(log))
    seal(library)
    assert "loss_curves" in figures(library)


def test_figures_need_a_library(tmp_path):
    with pytest.raises(LibraryError, match=r"library\.json"):
        figures(tmp_path)


def test_inline_svg_has_own_ids_and_takes_its_colours_from_the_page(drawn):
    svg = inline_svg(drawn["storage"], "storage", "Bytes")
    assert svg.startswith("<svg")
    assert "<metadata" not in svg
    assert svg.count(' id="') == svg.count(' id="storage-')
    assert "var(--accent-bar)" in svg
    assert not any(colour in svg for colour in LIGHT.values())


def test_every_colour_has_a_dark_form_and_a_variable():
    assert list(LIGHT) == list(DARK)
    assert css_variables(" ".join(LIGHT.values())) == " ".join(f"var(--{name})" for name in LIGHT)


def test_validation_losses_stand_on_the_curve(library):
    log = json.loads((library / "training/cluster-0.json").read_text())
    for place, nll in ((9, 1.5), (19, 1.25)):
        log[place]["validation_nll"] = nll
    (library / "training/cluster-0.json").write_text(json.dumps(log))
    seal(library)
    panel = figures(library)["loss_curves"].axes[0]
    (marks,) = [line for line in panel.lines if line.get_marker() == "D"]
    seen = [float(y) for y in marks.get_ydata() if y == y]
    assert seen == [1.5, 1.25]
    assert not any(
        line.get_marker() == "D" for line in figures(library)["loss_curves"].axes[1].lines
    )
