"""What a merge is given, as files: for stages and jobs, which pass no tensors."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tclora.activations.collect import ActivationStatistics
from tclora.adapter import Adapter, read_adapter
from tclora.tensor.library import LibraryFactors


class MergeInputs(BaseModel):
    """The adapters of a merge, and what its method may use beside them.

    Attributes
    ----------
    adapters : dict of str to Path
        Adapter name → PEFT directory.
    factors : Path or None
        File of their joint CP factors.
    statistics : tuple of Path
        Files of their activation statistics; none for merges without.
    rank : int or None
        Rank of the result; None leaves it to the method.
    seed : int
        Seed of anything random.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapters: dict[str, Path]
    factors: Path | None = None
    statistics: tuple[Path, ...] = ()
    rank: int | None = None
    seed: int = 0

    def read_adapters(self) -> list[Adapter]:
        """Open the adapters; their factors are read module by module."""
        return [read_adapter(path, name) for name, path in self.adapters.items()]

    def adapters_in_memory(self) -> list[Adapter]:
        """Read the adapters, for merging more than once."""
        return [Adapter(a.name, dict(a.modules), a.base_model) for a in self.read_adapters()]

    def read_factors(self) -> LibraryFactors | None:
        """Read the joint factors, where there are any."""
        return LibraryFactors.load(self.factors) if self.factors else None

    def read_statistics(self) -> ActivationStatistics | None:
        """Open the activation statistics, where there are any."""
        return ActivationStatistics.load(*self.statistics) if self.statistics else None
