"""The routed library: K specialists at the cost of one adapter, chosen by the prompt's text."""

from tclora.library.records import ModelIdentity
from tclora.route.gates import GatedAdapter, fit_gates
from tclora.route.gating import Gating
from tclora.route.router import Router, Routing, calibrate_temperature, fit_router
from tclora.route.storage import (
    RoutedInfo,
    RoutedLibrary,
    read_library,
    write_library,
)

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
