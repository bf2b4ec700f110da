"""Scorers: is a generated answer right? One registered function per kind of task.

To add one: a file with a registered function, imported below; see ``docs/extending.md``.
"""

from tclora.evaluate.scorers import code, extraction, gym, overlap, text
from tclora.evaluate.scorers.choosing import default_scorer
from tclora.evaluate.scorers.registry import (
    CHOICES,
    LEAVE,
    Expected,
    check_leave,
    check_scorer,
    register,
    score,
    scorers,
)

__all__ = [
    "CHOICES",
    "LEAVE",
    "Expected",
    "check_leave",
    "check_scorer",
    "code",
    "default_scorer",
    "extraction",
    "gym",
    "overlap",
    "register",
    "score",
    "scorers",
    "text",
]
