"""Scorers: is a generated answer right? One function per kind of task, chosen by name.

``exact`` compares normalised text, ``number`` the last number in it, and ``reasoning-gym:NAME``
asks that dataset's own verifier. A row without a scorer gets one by `default_scorer`.
"""

import json
import re
from functools import cache
from typing import Any

_NUMBER = re.compile(
    r"""
    (?: (?<! [\w)] ) - )?                                # a sign, not the minus of "10-7"
    (?: (?<! \d ) (?<! \d, ) \d{1,3} (?: ,\d{3} )+ (?! ,?\d ) (?: \.\d+ )?  # thousands, by threes
      | \d+ (?: \.\d+ )?
      | (?<! \d ) \.\d+
    )""",
    re.VERBOSE,
)
_GYM = "reasoning-gym:"


def score(scorer: str, generated: str, answer: str, metadata: str | None = None) -> float:
    """Return 1.0 if a generated answer is right, else 0.0.

    Parameters
    ----------
    scorer : str
        ``"exact"``, ``"number"`` or ``"reasoning-gym:NAME"``.
    generated : str
        What the model wrote after the prompt.
    answer : str
        The expected answer.
    metadata : str, optional
        JSON the reasoning-gym verifier needs.

    Raises
    ------
    ValueError
        If the scorer is unknown.
    """
    if scorer == "exact":
        return float(_normalise(generated) == _normalise(answer))
    if scorer == "number":
        wanted = last_number(answer)
        return float(wanted is not None and last_number(generated) == wanted)
    if scorer.startswith(_GYM):
        entry = {"question": "", "answer": answer, "metadata": json.loads(metadata or "{}")}
        verifier = _gym_dataset(scorer.removeprefix(_GYM))
        # Partial credit is for learning by reinforcement; here an answer is right or it is not.
        return float(verifier.score_answer(generated.strip(), entry) >= 1)
    raise ValueError(f"scorer must be 'exact', 'number' or 'reasoning-gym:NAME', got {scorer!r}")


def check_scorer(scorer: str, metadata: str | None) -> None:
    """Raise ValueError if a row's scorer is unknown or its metadata is not JSON."""
    if scorer in {"exact", "number"}:
        return
    if not scorer.startswith(_GYM):
        raise ValueError(
            f"scorer must be 'exact', 'number' or 'reasoning-gym:NAME', got {scorer!r}"
        )
    _gym_dataset(scorer.removeprefix(_GYM))
    json.loads(metadata or "{}")


def default_scorer(answer: str) -> str:
    """Choose a scorer for a row that names none: ``number`` for numeric answers, else ``exact``."""
    return "number" if _NUMBER.fullmatch(answer.strip()) else "exact"


def last_number(text: str) -> float | None:
    """Return the last decimal number in a text, or None.

    Commas that set off thousands belong to it; those of a list ("1,2,3") part its elements.
    """
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


@cache
def _gym_dataset(name: str) -> Any:  # noqa: ANN401
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)
