"""Scorers that first look for the answer in the text: by a mark, a pattern, or a letter."""

import re
import string

from tclora.evaluate.scorers.registry import Expected, register
from tclora.evaluate.scorers.text import normalise

# "(B)", "B)", "B.", "B:" or a B that stands alone; capitals only, or "a" would be an article.
_LETTER = re.compile(r"\(([A-Z])\)|\b([A-Z])(?=[).:](?:\s|$))|(?<![\w'])([A-Z])(?![\w'])")
_LABEL = re.compile(r"\(?([A-Z])[).:]\s")  # at the start of an option that carries its letter
# "Answer: C", "the answer is **(C)**", "ANSWER: option C"; the letter itself is a capital.
_ANNOUNCED = re.compile(
    r"(?i:\banswer\b(?:[\s*]*\bis\b)?(?:[\s*]*:)?(?:[\s*]*\boption\b)?)[\s*]*\(?([A-Z])\b(?!')"
)


def _check_mark(expected: Expected) -> None:
    if not expected.argument:
        raise ValueError("scorer 'after' must be given a mark, as in 'after:####'")


@register("after", check=_check_mark)
def after(generated: str, expected: Expected) -> float:
    """Compare what follows the last mark, up to the end of its line: ``after:####``."""
    _, mark, rest = generated.rpartition(expected.argument)
    lines = rest.strip().splitlines()
    found = lines[0] if mark and lines else ""
    return float(normalise(found) == normalise(expected.answer))


def _check_pattern(expected: Expected) -> None:
    try:
        groups = re.compile(expected.argument).groups
    except re.error as error:
        raise ValueError(
            f"scorer 'regex' must be given a pattern, got {expected.argument!r}: {error}"
        ) from error
    if not expected.argument or groups > 1:
        raise ValueError(
            "scorer 'regex' must be given a pattern with at most one group, "
            f"got {expected.argument!r}"
        )


@register("regex", check=_check_pattern)
def regex(generated: str, expected: Expected) -> float:
    r"""Compare the last match of a pattern, or of its group: ``regex:####\s*(.+)``."""
    found = re.findall(expected.argument, generated)
    return float(bool(found) and normalise(found[-1]) == normalise(expected.answer))


def _check_letter(expected: Expected) -> None:
    if letter_of(expected) is None:
        raise ValueError(
            f"scorer 'letter' needs an answer that is one of the choices or a capital letter, "
            f"got {expected.answer!r}"
        )


@register("letter", check=_check_letter)
def letter(generated: str, expected: Expected) -> float:
    """Compare the option letter: the one announced by "answer", else the first in the text."""
    known = {_label(option, place) for place, option in enumerate(expected.choices)}
    known = known or set(string.ascii_uppercase)
    announced = [found for found in _ANNOUNCED.findall(generated) if found in known]
    alone = ("".join(found) for found in _LETTER.findall(generated))
    found = announced[-1] if announced else next(filter(known.__contains__, alone), None)
    return float(found is not None and found == letter_of(expected))


def letter_of(expected: Expected) -> str | None:
    """Return the letter of the right option: of its place among the choices, or the answer's own.

    None where there is neither.
    """
    if expected.answer in expected.choices:
        return _label(expected.answer, expected.choices.index(expected.answer))
    answer = expected.answer.strip("() .")
    return answer if len(answer) == 1 and answer in string.ascii_uppercase else None


def _label(option: str, place: int) -> str:
    own = _LABEL.match(option)
    return own[1] if own else string.ascii_uppercase[place]
