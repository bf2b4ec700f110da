"""Scorers that compare whole texts: ``exact``, and ``number``, which takes the last number."""

import re

from tclora.evaluate.scorers.registry import Expected, register

NUMBER = re.compile(
    r"""
    (?: (?<! [\w)] ) - )?                                # a sign, not the minus of "10-7"
    (?: (?<! \d ) (?<! \d, ) \d{1,3} (?: ,\d{3} )+ (?! ,?\d ) (?: \.\d+ )?  # thousands, by threes
      | \d+ (?: \.\d+ )?
      | (?<! \d ) \.\d+
    )""",
    re.VERBOSE,
)


@register("exact")
def exact(generated: str, expected: Expected) -> float:
    """Compare the whole text, but for case, spaces and a full stop at the end."""
    return float(normalise(generated) == normalise(expected.answer))


@register("number")
def number(generated: str, expected: Expected) -> float:
    """Compare the last number in the text with the last one in the answer."""
    wanted = last_number(expected.answer)
    return float(wanted is not None and last_number(generated) == wanted)


def last_number(text: str) -> float | None:
    """Return the last decimal number in a text, or None.

    Commas that set off thousands belong to it; those of a list ("1,2,3") part its elements.
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def normalise(text: str) -> str:
    """Return a text in lower case, with single spaces and without full stops at its end."""
    return " ".join(text.casefold().split()).rstrip(".")
