"""The report of a run: one self-contained HTML file, and the same figures for experiment trackers.

Reads only the library directory; links to nothing outside the file.
"""

from tclora.report.figures import figures
from tclora.report.render import write_report

__all__ = ["figures", "write_report"]
