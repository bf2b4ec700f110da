"""The routed library: K specialists at the cost of one adapter, chosen by the prompt's text."""

from typing import TYPE_CHECKING, Any

import tclora.route.routers  # noqa: F401  (registers them)
from tclora.library.identity import ModelIdentity
from tclora.route.equations import Fallback
from tclora.route.gates import GatedAdapter, fit_gates
from tclora.route.nearness import Abstention
from tclora.route.router import Router, RouterState, derive, fit_router, routers
from tclora.route.routing import Routing, TokenRule, routing_from_table, together
from tclora.route.storage import (
    RoutedInfo,
    RoutedLibrary,
    read_library,
    write_library,
)

if TYPE_CHECKING:
    from tclora.route.gating import Gating

__all__ = [
    "Abstention",
    "Fallback",
    "GatedAdapter",
    "Gating",
    "ModelIdentity",
    "RoutedInfo",
    "RoutedLibrary",
    "Router",
    "RouterState",
    "Routing",
    "TokenRule",
    "derive",
    "fit_gates",
    "fit_router",
    "read_library",
    "routers",
    "routing_from_table",
    "together",
    "write_library",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `Gating` when it is asked for: it needs PEFT."""
    if name == "Gating":
        from tclora.route.gating import Gating

        return Gating
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
