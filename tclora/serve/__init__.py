"""Serving a routed library: batched generation behind an OpenAI-compatible endpoint."""

from tclora.serve.answer import Served
from tclora.serve.app import Limits, create_app
from tclora.serve.engine import Engine
from tclora.serve.request import Piece, Request

__all__ = ["Engine", "Limits", "Piece", "Request", "Served", "create_app"]
