"""Which models a library was made with, and the base of its records."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen values without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelIdentity(Record):
    """Which model something was made with.

    Attributes
    ----------
    id : str
        As configured: a built-in name, a folder or a hub id.
    digest : str
        Of its files, or of hub id and commit; see `tclora.model.locate.model_digest`.
    """

    id: str
    digest: str


class LocatedModel(ModelIdentity):
    """A model and where it was found.

    Attributes
    ----------
    location : str
        Folder or hub id on the machine of the run.
    """

    location: str
