"""A library of a few small files, and what its run says of it."""

from tclora.config import Config
from tclora.library.identity import LocatedModel, ModelIdentity
from tclora.library.records import (
    Clustering,
    Description,
    Factors,
    Merge,
    Storage,
    Training,
)

NAMES = ("adapters/cluster-0", "adapters/cluster-1", "clusters.parquet")


def write_files(root, mark=""):
    """Write the files of the library; `mark` makes those of one run differ from another's."""
    for name in ("cluster-0", "cluster-1"):
        folder = root / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "config", f"{name} config")
        replace(folder / "weights", name + mark)
    replace(root / "clusters.parquet", "rows" + mark)


def replace(path, text):
    """Write a file as the pipeline does: anew, then renamed."""
    fresh = path.with_name("fresh")
    fresh.write_text(text)
    fresh.replace(path)


def describe():
    config = Config.model_validate(
        {"name": "x", "merge": {"methods": ["uniform"], "primary": "uniform"}}
    )
    job = Training(rows=4, steps=2, supervised_tokens=9, final_loss=0.5, seconds=1.0)
    return Description(
        name="x",
        config=config.model_dump(mode="json"),
        base_model=LocatedModel(id="tiny", digest="ab", location="models/tiny"),
        embedding_model=ModelIdentity(id="small", digest="cd"),
        profile={"rows_train": 8.0},
        clustering=Clustering(method="kmeans", k=2, sizes=(4, 4)),
        training={"cluster-0": job, "cluster-1": job},
        factors=Factors(rank=2, explained_variance=0.9),
        merges={"uniform": Merge(rank=4, parameters=4, bytes=16, truncation_loss=0.0)},
        storage=Storage(separate_adapters=32, factors=20),
    )
