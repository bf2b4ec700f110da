"""Where a model is on this machine: its location, or the copy that was fetched of it."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class ModelPlace(BaseModel):
    """A model by the location it has where a run started, and by what it is.

    Attributes
    ----------
    location : str
        Path or hub id.
    digest : str
        Its identity; see `tclora.model.locate.model_digest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    digest: str

    @property
    def here(self) -> str:
        """What to load: the copy that a job's worker has fetched, else the location."""
        copy = fetched_model(self.digest)
        return str(copy) if copy.is_dir() else self.location


def cache_dir() -> Path:
    """Folder of converted models and embeddings: ``$TCLORA_CACHE`` or ``~/.cache/tclora``."""
    return Path(os.environ.get("TCLORA_CACHE", Path.home() / ".cache" / "tclora")).absolute()


def fetched_model(digest: str) -> Path:
    """Return where a copy of another machine's model folder is, or would be."""
    return cache_dir() / "fetched" / digest
