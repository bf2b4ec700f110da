"""The registry of scorers, and what a scorer is told of a row.

A row names its scorer as ``NAME`` or ``NAME:ARGUMENT``. The name ``choices`` is no scorer of text:
such a row is answered by the log-likelihood of its options (`tclora.evaluate.choices`).
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tclora.errors import ConfigError
from tclora.registry import Registry

LEAVE = "set evaluate.allow_code_execution: true to let it"
CHOICES = "choices"  # by log-likelihood of the options; nothing is generated


@dataclass(frozen=True)
class Expected:
    """What is expected of an answer: the row, as far as a scorer may look at it.

    Attributes
    ----------
    answer : str
        The expected answer; of code, its unit tests.
    prompt, response : str
        What was asked, and the whole response to learn from.
    choices : tuple of str
        The options, where the row has some.
    metadata : str or None
        JSON for the scorer.
    argument : str
        What follows the colon in the row's ``scorer``.
    """

    answer: str
    prompt: str = ""
    response: str = ""
    choices: tuple[str, ...] = ()
    metadata: str | None = None
    argument: str = ""


Function = Callable[[str, Expected], float]
Check = Callable[[Expected], None]


def nothing_to_check(_: Expected) -> None:
    """Accept every row."""


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Attributes
    ----------
    function : callable
        From the generated text and what is expected to a score, 0 (wrong) to 1 (right).
    check : callable
        Raises ValueError if a row cannot be scored, before anything is measured.
    executes_code : bool
        Whether it runs what the model wrote, which only happens with leave.
    ready : callable
        Raises a domain error if this machine cannot do it, before anything is measured.
    """

    function: Function
    check: Check = nothing_to_check
    executes_code: bool = False
    ready: Callable[[], None] = lambda: None


scorers: Registry[Scorer] = Registry(
    "scorer",
    lambda scorer: (inspect.getdoc(scorer.function) or "").partition("\n")[0],
    named_by_rows=True,
)


def register(
    name: str,
    *,
    check: Check = nothing_to_check,
    executes_code: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> Callable[[Function], Function]:
    """Return a decorator that enters a scoring function under a name; see `Scorer`.

    Raises
    ------
    ValueError
        If the name is taken.
    """

    def enter(function: Function) -> Function:
        scorers.register(name)(Scorer(function, check, executes_code, ready))
        return function

    return enter


def score(name: str, generated: str, expected: Expected) -> float:
    """Score a generated answer.

    Parameters
    ----------
    name : str
        ``NAME`` or ``NAME:ARGUMENT``.
    generated : str
        What the model wrote after the prompt.
    expected : Expected
        The row; its argument is replaced by the name's.

    Returns
    -------
    float
        0 to 1.

    Raises
    ------
    ValueError
        If there is no such scorer.
    """
    scorer, expected = _resolve(name, expected)
    return scorer.function(generated, expected)


def check_scorer(name: str, expected: Expected) -> None:
    """Raise ValueError if a row's scorer is unknown or cannot score the row."""
    if name == CHOICES:
        if not expected.choices:
            raise ValueError("scorer 'choices' needs a row with choices; give them or another one")
        return
    scorer, expected = _resolve(name, expected)
    scorer.check(expected)


def check_leave(names: Iterable[str], *, allowed: bool, remedy: str) -> None:
    """Refuse scorers that run what the model wrote, unless that is allowed and can be done safely.

    Parameters
    ----------
    names : iterable of str
        The scorers of all rows.
    allowed : bool
        Whether code may run.
    remedy : str
        How to allow it, for the message.

    Raises
    ------
    ConfigError
        If one runs code without leave.
    SandboxError
        If one cannot shut in on this machine what it runs.
    """
    kinds = {name.partition(":")[0] for name in names} - {CHOICES}
    running = sorted(kind for kind in kinds if scorers[kind].executes_code)
    if running and not allowed:
        raise ConfigError(f"scorer {running[0]!r} runs code written by the model; {remedy}")
    for kind in running:
        scorers[kind].ready()


def _resolve(name: str, expected: Expected) -> tuple[Scorer, Expected]:
    kind, _, argument = name.partition(":")
    return scorers[kind], replace(expected, argument=argument)
