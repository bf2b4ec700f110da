"""Studies: one configuration run with a grid of overrides, and what the runs tell together."""

from tclora.study import agreement, methods  # noqa: F401  (register their studies)
