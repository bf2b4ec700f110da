"""Other wordings of a cluster's prompts, made from their own text by fixed rules.

They stand in for how people will ask: politely, tersely, or without the instructions that all
prompts of a cluster begin or end with. Most of what distinguishes a prompt from the others stays,
and with it, mostly, the answer. Where case, line breaks or a common word belong to what is asked
about, as in code or in a list of words, the terse wording may have another answer, and a bare one
has lost what all prompts say.
"""

import re
from collections.abc import Callable, Iterable, Sequence

_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an are as be by do following for from given here i in is it its of on please should "
        "that the then there these this to was we with would you your",
    )
)
_STOCK = 0.5  # what more than this share of a cluster's prompts begin or end with is its wording

Rule = Callable[[str, Sequence[str]], str]


def _polite(prompt: str, _: Sequence[str]) -> str:
    return f"Hi, could you help me with this? {prompt} Thanks a lot!"


def _terse(prompt: str, _: Sequence[str]) -> str:
    """Drop what carries nothing, in lower case."""
    return " ".join(word for word in prompt.lower().split() if word not in _FILLERS)


def _bare(prompt: str, others: Sequence[str]) -> str:
    """Drop what the cluster's prompts begin and end with."""
    words = prompt.split()
    start = _shared(words, [other.split() for other in others])
    end = _shared(words[::-1], [other.split()[::-1] for other in others])
    return " ".join(words[start : len(words) - end])


def _shared(words: Sequence[str], others: Iterable[Sequence[str]]) -> int:
    """Return how many of the first words more than half of the others begin with too."""
    kept = list(others)
    least = _STOCK * len(kept)
    for count, word in enumerate(words):
        kept = [other for other in kept if len(other) > count and other[count] == word]
        if len(kept) <= least:
            return count
    return len(words)


RULES: tuple[Rule, ...] = (_polite, _terse, _bare)


def rewordings(prompts: Sequence[str]) -> list[list[str]]:
    """Return the distinct rewordings of every prompt.

    Parameters
    ----------
    prompts : sequence of str
        Of one cluster; the more, the better its own wording is known.

    Returns
    -------
    list of list of str
        At most one per rule, never the prompt itself or without a letter or digit.
    """
    made = [dict.fromkeys(rule(prompt, prompts) for rule in RULES) for prompt in prompts]
    return [
        [text for text in texts if text != prompt and re.search(r"\w", text)]
        for prompt, texts in zip(prompts, made, strict=True)
    ]
