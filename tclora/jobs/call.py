"""A function call as JSON: the import path of the function and its arguments, checked by its types.

The parameter ``on_event`` of a function does not travel: it is where the function reports progress,
and whoever runs the call elsewhere brings the events back.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, create_model

Event = Mapping[str, Any]
EventCallback = Callable[[Event], None]
EVENTS = "on_event"


class Call(BaseModel):
    """A call on its way to another process.

    Attributes
    ----------
    function : str
        ``"package.module:function"``.
    arguments : dict
        Keyword arguments as JSON values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    function: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., object], arguments: Mapping[str, object]) -> "Call":
        """Describe a call of a function at the top level of its module.

        Raises
        ------
        TypeError
            If the function cannot be imported by its name, or an argument is missing or unknown.
        ValidationError
            If an argument is not of its parameter's type.
        """
        checked = checked_arguments(function, arguments)
        return cls(
            function=import_path(function),
            arguments=checked.model_dump(mode="json", exclude_unset=True),
        )

    @property
    def module(self) -> str:
        """The function's module."""
        return self.function.partition(":")[0]

    def load(self) -> Callable[..., object]:
        """Import the function."""
        name = self.function.partition(":")[2]
        function: Callable[..., object] = getattr(importlib.import_module(self.module), name)
        return function

    def run(self, on_event: EventCallback) -> Any:  # noqa: ANN401
        """Call the function with arguments of its parameters' types; return its result as JSON."""
        function = self.load()
        model = _parameters(function).model_validate(self.arguments)
        arguments = {name: getattr(model, name) for name in model.model_fields_set}
        if EVENTS in inspect.signature(function).parameters:
            arguments[EVENTS] = on_event
        return result_type(function).dump_python(function(**arguments), mode="json")


def import_path(function: Callable[..., object]) -> str:
    """Return ``"package.module:function"``.

    Raises
    ------
    TypeError
        If the function is not at the top level of its module.
    """
    path = f"{function.__module__}:{function.__qualname__}"
    if "." in function.__qualname__ or function.__qualname__ == "<lambda>":
        raise TypeError(f"function must be at the top level of its module, got {path}")
    return path


def checked_arguments(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> BaseModel:
    """Return the arguments but `on_event` as a model, of their parameters' types; see `Call.of`."""
    inspect.signature(function).bind(**arguments)
    sent = {name: value for name, value in arguments.items() if name != EVENTS}
    return _parameters(function)(**sent)


def result_type(function: Callable[..., object]) -> TypeAdapter[Any]:
    """Return what turns a function's result into JSON and back."""
    return TypeAdapter(get_type_hints(function)["return"])


def _parameters(function: Callable[..., object]) -> type[BaseModel]:
    """Return a model with one field per parameter but `on_event`."""
    hints = get_type_hints(function)
    fields: dict[str, Any] = {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != EVENTS
    }
    config = ConfigDict(extra="forbid", protected_namespaces=())
    return create_model(function.__name__, __config__=config, **fields)
