"""The figures of a library, as matplotlib figures in the report's colours.

They are drawn without pyplot, so nothing is shown or kept open; save them as PNG, or see
`tclora.report.svg` for the report's form. A figure whose data is missing is left out.
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tclora.library.contents import Contents, read_contents
from tclora.report.bars import cluster_sizes, recovery, storage
from tclora.report.canvas import STYLE
from tclora.report.curves import explained_variance, loss_curves
from tclora.report.interference import harm, interference, layer_map, shared_energy
from tclora.report.routing import routing
from tclora.report.scatter import cluster_map

_DRAWINGS = {
    "cluster_map": cluster_map,
    "cluster_sizes": cluster_sizes,
    "loss_curves": loss_curves,
    "explained_variance": explained_variance,
    "recovery": recovery,
    "storage": storage,
    "routing": routing,
    "interference": interference,
    "shared_energy": shared_energy,
    "harm": harm,
    "layer_map": layer_map,
}


def figures(library: Path) -> dict[str, Figure]:
    """Draw every figure a library has the data for.

    Parameters
    ----------
    library : Path
        Library directory.

    Returns
    -------
    dict of str to Figure
        Of ``cluster_map``, ``cluster_sizes``, ``loss_curves``, ``explained_variance``,
        ``recovery``, ``storage``, ``routing``, ``interference``, ``shared_energy``,
        ``harm``, ``layer_map``.

    Raises
    ------
    LibraryError
        If a mandatory file is missing or unreadable.
    """
    return draw_figures(read_contents(library))


def draw_figures(contents: Contents) -> dict[str, Figure]:
    """Draw every figure the contents of a library allow; see `figures`."""
    with mpl.rc_context(STYLE):
        drawn = {name: draw(contents) for name, draw in _DRAWINGS.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
