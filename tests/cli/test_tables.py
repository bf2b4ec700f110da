"""Tables on the terminal."""

from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from tclora_cli.tables import print_whole


@pytest.mark.parametrize("width", [20, 80, 300])
def test_no_figure_is_cut_whatever_the_terminals_width(width):
    table = Table("task", *(f"column {number}" for number in range(12)), title="A title")
    for row in ("colours", "shapes"):
        table.add_row(row, *(f"0.{number:02d}34 [0.1, 0.2]" for number in range(12)))
    stream = StringIO()
    print_whole(table, Console(file=stream, width=width))
    lines = stream.getvalue().splitlines()
    assert "…" not in stream.getvalue()
    (row,) = (line for line in lines if "colours" in line)
    assert all(f"0.{number:02d}34 [0.1, 0.2]" in row for number in range(12))
    assert len({len(line.rstrip()) for line in lines if "0.0034" in line}) == 1
