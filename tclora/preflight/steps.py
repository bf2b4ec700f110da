"""The steps of a run, by which it can be stopped early (``until``)."""

import logging

from tclora.errors import ConfigError

logger = logging.getLogger(__name__)

STEPS = ("prepare", "train", "merge", "evaluate", "publish")
LAST = STEPS[-1]
_FORMER = {
    "read": "prepare", "embed": "prepare", "cluster": "prepare", "factorise": "merge",
    "report": "publish",
}  # fmt: skip


def step_named(until: str) -> str:
    """Return the step of a name; those of the previous version are taken with a notice.

    Raises
    ------
    ConfigError
        If there is no such step.
    """
    if until in STEPS:
        return until
    if until in _FORMER:
        logger.warning("until=%s is now until=%s", until, _FORMER[until])
        return _FORMER[until]
    raise ConfigError(f"until must be one of {', '.join(STEPS)}, got {until!r}")
