"""Figures as inline SVG: in the page's font and colours, the same bytes for the same figure."""

import io
import re
import warnings

import matplotlib as mpl
from matplotlib.figure import Figure

from tclora.report.palette import css_variables

_DPI = 96  # CSS pixels per inch


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an ``<svg>`` element to put into HTML.

    Parameters
    ----------
    figure : Figure
        Drawn in the palette's light colours, which become CSS variables.
    name : str
        Prefix of the element's ids, unique within the page.
    title : str
        What the figure shows, for readers who do not see it; plain text.

    Returns
    -------
    str
        Markup without metadata, dates or references outside itself; texts stay texts.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser draws the texts; matplotlib only measures them.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font-family: [^;"]*', "font-family: inherit", svg)
    svg = re.sub(r'(\sid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    return css_variables(re.sub(r"<svg [^>]*>", _opening_tag(figure, title), svg, count=1))


def _opening_tag(figure: Figure, title: str) -> str:
    width, height = figure.get_size_inches()
    return (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{title}" '
        f'viewBox="0 0 {72 * width:g} {72 * height:g}" style="max-width:{_DPI * width:.0f}px">'
    )
