"""What can be checked before anything expensive starts: first the data, then the models."""

from typing import TYPE_CHECKING, Any

from tclora.config import Config
from tclora.preflight.data import check_data
from tclora.store.objects import Store

if TYPE_CHECKING:
    from tclora.preflight.models import Models, check_models

__all__ = ["Models", "check", "check_data", "check_models"]


def check(config: Config) -> "Models":
    """Check data and stores, then find the models and check that the configuration fits them.

    Raises
    ------
    DataError
        See `check_data`.
    ConfigError
        See `check_models`.
    StoreError
        If the store that the library is to be put into cannot be written.
    """
    check_data(config)
    if config.publish_to:
        Store(config.publish_to).check()
    from tclora.preflight.models import check_models

    return check_models(config)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import what concerns models when it is asked for: it needs torch, transformers and PEFT."""
    if name in {"Models", "check_models"}:
        from tclora.preflight import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
