"""The registry of merge methods: one decorated function per method, with its paper and its needs.

Symbols: K adapters, d_out × d_in a module, r_k the LoRA ranks, R the rank of the result.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from tclora.adapter import LoraFactors
from tclora.merge.stack import ModuleStack
from tclora.merge.truncate import Truncated, truncate
from tclora.registry import Registry, closest

NEEDS = ("", "factors", "statistics", "statistics if any")


# Merges one module's K updates, (stack, *, options) → factors, or a dense update where no factored
# form exists; a dense one is truncated before it leaves the engine.
MergeFunction = Callable[..., LoraFactors | Tensor]

# Brings a merged update to rank R, or to the method's own rank for None.
Truncation = Callable[[LoraFactors | Tensor, int | None, ModuleStack], Truncated]


@dataclass(frozen=True)
class MethodInfo:
    """What a merge method is and what it needs.

    Attributes
    ----------
    name : str
        What `merge` and configurations call it.
    summary : str
        One line.
    paper : str
        Where it was published.
    exact : bool
        Whether it is computed exactly from the factors; otherwise a dense result is truncated.
    needs : str
        "" for adapters alone, "factors" for joint CP factors, "statistics" for activations,
        "statistics if any" where it does without too.
    weighted : bool
        Whether it takes weights of the adapters.
    options : Mapping[str, Any]
        Its own options and their defaults.
    """

    name: str
    summary: str
    paper: str
    exact: bool
    needs: str
    weighted: bool
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method: its description, its function and how it is truncated."""

    info: MethodInfo
    function: MergeFunction
    truncation: Truncation


Function = TypeVar("Function", bound=MergeFunction)

merge_methods: Registry[Method] = Registry("merge method", lambda method: method.info.summary)


def register(
    name: str,
    *,
    summary: str,
    paper: str,
    exact: bool = True,
    needs: str = "",
    weighted: bool = False,
    truncation: Truncation = truncate,
) -> Callable[[Function], Function]:
    """Register a function as a merge method; its keyword-only parameters become its options.

    Parameters
    ----------
    name, summary, paper, exact, needs, weighted
        See `MethodInfo`.
    truncation : Truncation
        How to truncate the result; best in the Frobenius norm by default.

    Raises
    ------
    ValueError
        If the name is taken or `needs` is unknown.
    """
    if needs not in NEEDS:
        raise ValueError(f"needs must be one of {NEEDS}, got {needs!r}")
    enter = merge_methods.register(name)

    def add(function: Function) -> Function:
        options = {
            p.name: p.default
            for p in inspect.signature(function).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        }
        info = MethodInfo(name, summary, paper, exact, needs, weighted, options)
        enter(Method(info, function, truncation))
        return function

    return add


def methods() -> list[MethodInfo]:
    """Return every registered method, in alphabetical order."""
    return [method.info for method in merge_methods.values()]


def get(name: str) -> Method:
    """Return a method by name.

    Raises
    ------
    ValueError
        If it does not exist; names the closest ones.
    """
    return merge_methods[name]


def check_options(info: MethodInfo, options: Mapping[str, Any]) -> None:
    """Refuse options that a method does not have.

    Raises
    ------
    ValueError
        Naming the closest option.
    """
    for option in options:
        if option not in info.options:
            hint = closest(option, info.options) if info.options else "it takes no options"
            raise ValueError(f"option of {info.name} must be its own, got {option!r}; {hint}")
