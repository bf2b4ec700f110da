"""The scorer of a row that names none."""

from collections.abc import Collection

from tclora.evaluate.scorers.registry import CHOICES
from tclora.evaluate.scorers.text import NUMBER

_FINAL = "####"  # what sets the answer off from the reasoning before it, as in GSM8K


def default_scorer(answer: str, response: str = "", choices: Collection[str] | None = None) -> str:
    """Choose a scorer for a row that names none.

    Parameters
    ----------
    answer, response : str
        What is expected, and the whole response to learn from.
    choices : collection of str, optional
        The row's options.

    Returns
    -------
    str
        ``choices`` where the answer is one of the options, ``number`` for a numeric answer,
        ``after:####`` where the response ends in such a line with the answer, else ``exact``.
    """
    if choices is not None and answer in choices:
        return CHOICES
    if NUMBER.fullmatch(answer.strip()):
        return "number"
    _, mark, final = response.rpartition(_FINAL)
    return f"after:{_FINAL}" if mark and final.strip() == answer.strip() else "exact"
