"""What every section of a configuration is; every field carries its unit and meaning."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Frozen values without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def only(self, part: type[S]) -> S:
        """Return the values of one of the sections this one is made of."""
        return part(**{name: getattr(self, name) for name in part.model_fields})
