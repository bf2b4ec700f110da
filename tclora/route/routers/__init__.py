"""The routers that are registered here; one file each."""

from tclora.route.routers import membership, nearest, per_token, softmax  # noqa: F401
