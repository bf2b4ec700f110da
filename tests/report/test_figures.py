import io

import pandas as pd
import pytest

from tclora.errors import LibraryError
from tclora.report import figures
from tclora.report.palette import DARK, LIGHT, css_variables
from tclora.report.svg import inline_svg

NAMES = [
    "cluster_map",
    "cluster_sizes",
    "loss_curves",
    "explained_variance",
    "recovery",
    "storage",
]


def test_every_figure_is_drawn_and_saves_as_png(library):
    drawn = figures(library)
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
    assert list(figures(library)) == ["cluster_map", "cluster_sizes", "storage"]


def test_figures_need_a_library(tmp_path):
    with pytest.raises(LibraryError, match=r"library\.json does not exist"):
        figures(tmp_path)


def test_inline_svg_has_own_ids_and_takes_its_colours_from_the_page(library):
    svg = inline_svg(figures(library)["storage"], "storage", "Bytes")
    assert svg.startswith("<svg")
    assert "<metadata" not in svg
    assert svg.count(' id="') == svg.count(' id="storage-')
    assert "var(--accent)" in svg
    assert not any(colour in svg for colour in LIGHT.values())


def test_every_colour_has_a_dark_form_and_a_variable():
    assert list(LIGHT) == list(DARK)
    assert css_variables(" ".join(LIGHT.values())) == " ".join(f"var(--{name})" for name in LIGHT)
