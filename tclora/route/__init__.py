"""The routed library: K specialists at the cost of one adapter, chosen by the prompt's text."""

from typing import TYPE_CHECKING, Any

from tclora.route.gates import GatedAdapter, fit_gates
from tclora.route.router import Router, Routing, calibrate_temperature, fit_router
from tclora.route.storage import (
    ModelIdentity,
    RoutedInfo,
    RoutedLibrary,
    read_library,
    write_library,
)

if TYPE_CHECKING:
    from tclora.route.gating import Gating

__all__ = [
    "GatedAdapter",
    "Gating",
    "ModelIdentity",
    "RoutedInfo",
    "RoutedLibrary",
    "Router",
    "Routing",
    "calibrate_temperature",
    "fit_gates",
    "fit_router",
    "read_library",
    "write_library",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `Gating` when it is asked for: it needs PEFT."""
    if name == "Gating":
        from tclora.route.gating import Gating

        return Gating
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
