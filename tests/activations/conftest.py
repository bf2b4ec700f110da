"""The fixtures of the merge tests serve here too."""

from tests.merge.conftest import *  # noqa: F403
