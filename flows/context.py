"""What all flows of a run share, and what each of them hands on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.artifact import Artifact, Artifacts
from tasks.merging import Rows
from tasks.where import Where
from tclora.config import Config
from tclora.model.base import Base
from tclora.preflight import Models


@dataclass(frozen=True)
class Context:
    """A run: its configuration, its models, and where its stages work.

    `records` is the folder of records of what it has in common with other runs, if it shares.
    """

    config: Config
    models: Models
    where: Where
    records: Path | None = None

    @property
    def base(self) -> Base:
        """The base model as the stages see it."""
        train = self.config.train
        return Base(
            location=self.models.base,
            digest=self.models.base_digest,
            dtype=train.dtype,
            template=train.template,
            max_tokens=train.max_tokens,
        )

    def rows(self, rows: Mapping[str, Artifact], count: int) -> Rows:
        """Return so many rows of every cluster, to look at the base model's behaviour on."""
        budget = self.config.train.tokens_at_once()
        return Rows(self.base, dict(rows), count, budget, self.config.of_training)


@dataclass(frozen=True)
class Prepared:
    """Examples, their clusters, and the rows of each cluster, of all, and held out."""

    examples: Artifact
    embeddings: Artifact
    clusters: Artifact
    rows: Artifacts
    joint_rows: Artifact | None
    held_out: Artifact | None

    def linked(self, root: Path) -> "Prepared":
        """Return the same in another library's folder."""
        return Prepared(
            self.examples.linked(root),
            self.embeddings.linked(root),
            self.clusters.linked(root),
            {name: part.linked(root) for name, part in self.rows.items()},
            self.joint_rows and self.joint_rows.linked(root),
            self.held_out and self.held_out.linked(root),
        )


@dataclass(frozen=True)
class Trained:
    """The clusters' adapters and, where asked for, one on all rows.

    `planned` is how long they should take to train on this machine (s), where that is done on it.
    """

    adapters: Artifacts
    joint: Artifact | None
    planned: dict[str, float]


@dataclass(frozen=True)
class Merged:
    """Joint factors and what they tell, merges, and the routed library, where there is one."""

    factors: Artifact
    explained_variance: Artifact
    diagnosis: Artifact
    merges: Artifacts
    routed: Artifact | None
