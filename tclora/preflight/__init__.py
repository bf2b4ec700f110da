"""What can be checked before anything expensive starts: first the data, then the models."""

from typing import TYPE_CHECKING, Any

from tclora.config import Config
from tclora.preflight.data import check_data

if TYPE_CHECKING:
    from tclora.preflight.models import Models, check_models

__all__ = ["Models", "check", "check_data", "check_models"]


def check(config: Config) -> "Models":
    """Check the data, then find the models and check that the configuration fits them.

    Raises
    ------
    DataError
        See `check_data`.
    ConfigError
        See `check_models`.
    """
    check_data(config)
    from tclora.preflight.models import check_models

    return check_models(config)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what concerns models when it is asked for: it needs torch, transformers and PEFT."""
    if name in {"Models", "check_models"}:
        from tclora.preflight import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
