"""Manifests of the previous version, brought to the present one in memory."""

from collections.abc import Mapping
from typing import Any

from tclora.library.records import SCHEMA


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of schema 1 as one of schema 2.

    Notes
    -----
    Schema 1 keeps one digest per folder, and so does the result: which file of a folder differs
    cannot be told. The bytes of a merge stood in its own record too.
    """
    stored = values.get("storage") or {}
    storage = {
        "separate_adapters": stored.get("separate adapters"),
        "factors": stored.get("factors"),
        "routed": stored.get("routed"),
    }
    return {**values, "schema": SCHEMA, "storage": storage}
