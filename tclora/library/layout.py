"""Where everything lies in a library directory: the only place that knows a file name.

::

    library.json                  manifest, written last       report.html
    clusters.parquet              centroids.safetensors        routing.parquet
    factors.safetensors           explained_variance.parquet
    adapters/NAME/                training/NAME.json           merged/METHOD/
    routed/                       evaluation/TABLE.parquet
    work/                         what later stages of a run read; not part of the product

What lies inside an adapter's folder is PEFT's format; see `tclora.adapter`.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The paths of one library directory.

    Attributes
    ----------
    root : Path
        The library directory, or the staging area of one; made absolute.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).absolute())

    def name(self, path: Path) -> str:
        """Return the name of a path below the root, with slashes.

        Raises
        ------
        ValueError
            If the path is not below the root.
        """
        return path.absolute().relative_to(self.root).as_posix()

    def path(self, name: str) -> Path:
        """Return the path of a name below the root; the inverse of `name`."""
        return self.root / name

    @property
    def manifest(self) -> Path:
        """What is in the library, from what it was made, with digests; JSON."""
        return self.root / "library.json"

    @property
    def report(self) -> Path:
        """The report; HTML."""
        return self.root / "report.html"

    @property
    def clusters(self) -> Path:
        """One row per example: its cluster, split, task and place on the 2-D map."""
        return self.root / "clusters.parquet"

    @property
    def centroids(self) -> Path:
        """Centroid of every cluster, (K, dimensions)."""
        return self.root / "centroids.safetensors"

    @property
    def factors(self) -> Path:
        """Joint CP factors of the cluster adapters."""
        return self.root / "factors.safetensors"

    @property
    def explained_variance(self) -> Path:
        """Explained variance (fraction) per module and rank."""
        return self.root / "explained_variance.parquet"

    @property
    def interference(self) -> Path:
        """How much every two cluster adapters get in each other's way."""
        return self.root / "interference.parquet"

    @property
    def module_interference(self) -> Path:
        """The same in every module."""
        return self.root / "interference_modules.parquet"

    @property
    def shared_structure(self) -> Path:
        """Shared and cluster-specific energy of the joint factors, per module."""
        return self.root / "shared_structure.parquet"

    @property
    def routing(self) -> Path:
        """Where the held-out prompts are routed."""
        return self.root / "routing.parquet"

    @property
    def adapters(self) -> Path:
        """Folder of the trained adapters."""
        return self.root / "adapters"

    def adapter(self, name: str) -> Path:
        """PEFT directory of a trained adapter."""
        return self.adapters / name

    def training(self, name: str) -> Path:
        """Training log of an adapter; JSON, one record per logged step."""
        return self.root / "training" / f"{name}.json"

    @property
    def merges(self) -> Path:
        """Folder of the merged adapters."""
        return self.root / "merged"

    def merged(self, method: str) -> Path:
        """PEFT directory of a merge."""
        return self.merges / method

    @property
    def routed(self) -> "RoutedLayout":
        """The routed library."""
        return RoutedLayout(self.root / "routed")

    @property
    def evaluation(self) -> "EvaluationLayout":
        """Tables of the evaluation."""
        return EvaluationLayout(self.root / "evaluation")

    @property
    def work(self) -> Path:
        """Folder of what later stages of a run read; not part of the product."""
        return self.root / "work"

    @property
    def examples(self) -> Path:
        """All examples, with their splits."""
        return self.work / "examples.parquet"

    @property
    def embeddings(self) -> Path:
        """Embeddings of all prompts, (N, dimensions)."""
        return self.work / "embeddings.safetensors"

    @property
    def features(self) -> Path:
        """What the base model says of the training rows, (rows, width)."""
        return self.work / "features.safetensors"

    @property
    def tokens(self) -> Path:
        """All training rows in tokens, in the order of the examples."""
        return self.work / "tokens.arrow"

    def rows(self, name: str) -> Path:
        """Training rows of an adapter."""
        return self.work / "rows" / f"{name}.parquet"

    def row_tokens(self, name: str) -> Path:
        """Training rows of an adapter in tokens."""
        return self.work / "rows" / f"{name}.arrow"

    @property
    def held_out(self) -> Path:
        """Rows that methods are measured on."""
        return self.rows("evaluation")

    @property
    def all_statistics(self) -> Path:
        """Folder of the activation statistics."""
        return self.work / "statistics"

    def statistics(self, name: str) -> Path:
        """Activation statistics of one cluster's rows."""
        return statistics_file(self.all_statistics, name)

    def scale(self, method: str) -> Path:
        """Scale chosen for a merge method; JSON."""
        return self.work / "scales" / f"{method}.json"

    def items(self, method: str) -> Path:
        """Measurements of one method, one row per held-out row."""
        return self.work / "items" / f"{method}.parquet"

    def lm_eval(self, method: str) -> Path:
        """Measurements of one method by lm-eval."""
        return self.work / "items" / f"{method}.lm_eval.parquet"

    @property
    def rank(self) -> Path:
        """Result of the search for the CP rank; JSON."""
        return self.work / "rank.json"

    @property
    def routing_calibration(self) -> Path:
        """What fallback gate and abstention were chosen on; JSON."""
        return self.work / "routing.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainings that are under way."""
        return self.work / "checkpoints"

    def checkpoint(self, key: str) -> Path:
        """Folder of one training that is under way."""
        return self.checkpoints / key


@dataclass(frozen=True)
class RoutedLayout:
    """The files of a routed library, beside those of the PEFT directory that it is as well.

    Attributes
    ----------
    folder : Path
        Its folder, in a library directory or on its own.
    """

    folder: Path

    @property
    def info(self) -> Path:
        """Which models it belongs to, and digests of its other files; JSON."""
        return self.folder / "routed.json"

    @property
    def gates(self) -> Path:
        """Gates of every cluster on the components."""
        return self.folder / "gates.safetensors"

    @property
    def router(self) -> Path:
        """The fitted router."""
        return self.folder / "router.safetensors"


@dataclass(frozen=True)
class EvaluationLayout:
    """The tables of an evaluation.

    Attributes
    ----------
    folder : Path
        Their folder.
    """

    folder: Path

    def table(self, kind: str) -> Path:
        """Table of a kind, such as "items", "cross" or "harm"."""
        return self.folder / f"{kind}.parquet"

    @property
    def items(self) -> Path:
        """One row per method and held-out row."""
        return self.table("items")

    @property
    def summary(self) -> Path:
        """NLL and accuracy with intervals per method and group of rows."""
        return self.table("summary")

    @property
    def recovery(self) -> Path:
        """Recovery with intervals per method and cluster."""
        return self.table("recovery")

    @property
    def winners(self) -> Path:
        """The best merge of every group of rows against the others."""
        return self.table("winners")

    @property
    def lm_eval(self) -> Path:
        """Measurements by lm-eval, per method."""
        return self.table("lm_eval")

    @property
    def former_lm_eval(self) -> Path:
        """The same in libraries of version 0.1.0."""
        return self.table("harness")


def statistics_file(folder: Path, name: str) -> Path:
    """Return the file of one adapter's activation statistics in a folder of such files."""
    return folder / f"{name}.safetensors"
