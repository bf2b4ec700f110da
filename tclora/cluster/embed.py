"""Prompt embeddings: unit-norm vectors by a sentence-transformers model, cached by content."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tclora.cluster.vectors import Embeddings, VectorFile, row_blocks
from tclora.errors import ModelError
from tclora.files import atomic_path

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Texts = Sequence[str] | pd.Series
Pool = dict[Any, Any]  # of processes, as sentence-transformers starts them
_ENCODED = 16_384  # texts that a model is given at once
_SHARE = 2048  # texts that are worth a further process, which starts in seconds


def embed_texts(
    texts: Texts,
    location: str,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    cache: Path | None = None,
    model_digest: str = "",
) -> Embeddings:
    """Embed texts that fit in memory; see `embed_file`."""
    with TemporaryDirectory() as scratch:
        file = embed_file(
            texts,
            location,
            Path(scratch) / "vectors",
            batch_size=batch_size,
            devices=(device,),
            cache=cache,
            model_digest=model_digest,
        )
        return file[:]


def embed_file(
    texts: Texts,
    location: str,
    target: Path,
    *,
    batch_size: int = 64,
    devices: Sequence[str] = ("cpu",),
    cache: Path | None = None,
    model_digest: str = "",
) -> VectorFile:
    """Embed texts with a sentence-transformers model.

    Parameters
    ----------
    texts : sequence or Series of str
        Repeated texts are embedded once.
    location : str
        Local folder or id of the model.
    target : Path
        File to write: rows of unit Euclidean norm in the order of the texts, shape (N, D), so that
        a dot product is the cosine similarity.
    batch_size : int
        Texts per forward pass; they are ordered by length, so little is padding.
    devices : sequence of str
        Where to compute; more than one get a process each, where there are texts enough.
    cache : Path, optional
        Folder of results, keyed by the texts and `model_digest`.
    model_digest : str
        Identity of the model for the cache.

    Raises
    ------
    ModelError
        If the model cannot be loaded or gives a vector that is not finite.
    """
    place, distinct = distinct_texts(texts)

    def compute(file: Path) -> VectorFile:
        used = devices[: max(1, len(distinct) // _SHARE)]
        model = load_embedder(location, used[0])
        with _processes(model, used) as pool:
            embed = partial(embed_prompts, model, batch_size=batch_size, pool=pool)
            return _embed_into(file, distinct, embed)

    if cache is None:
        with TemporaryDirectory(dir=target.parent) as scratch:
            return spread(compute(Path(scratch) / "distinct"), place, target)
    file = cache / f"{_digest(model_digest, distinct)}.safetensors"
    if not file.is_file():
        with atomic_path(file) as fresh:
            compute(fresh)
    return spread(VectorFile.open(file), place, target)


def distinct_texts(texts: Texts) -> tuple[NDArray[np.int64], pd.Index]:
    """Return each text's place among the distinct texts, and those in order."""
    place, distinct = pd.factorize(pd.Series(texts, dtype="str"), sort=True)
    return place, pd.Index(distinct)


def _embed_into(
    file: Path, texts: pd.Index, embed: Callable[[Sequence[str]], Embeddings]
) -> VectorFile:
    """Embed texts, some at a time, into a new file."""
    written: VectorFile | None = None
    for start in range(0, len(texts), _ENCODED):
        vectors = embed(texts[start : start + _ENCODED].tolist())
        written = written or VectorFile.create(file, len(texts), vectors.shape[1])
        written[start : start + len(vectors)] = vectors
    if written is None:
        raise ValueError("texts must be at least one, got none")
    return written


def spread(distinct: VectorFile, place: NDArray[np.int64], target: Path) -> VectorFile:
    """Write the vectors of all texts, equal ones for equal texts."""
    with atomic_path(target) as fresh:
        whole = VectorFile.create(fresh, len(place), distinct.shape[1])
        for rows in row_blocks(len(place)):
            whole[rows] = distinct[place[rows]]
    return VectorFile.open(target)


def _digest(model: str, texts: pd.Index) -> str:
    digest = hashlib.sha256()
    for text in chain([model], texts):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def load_embedder(location: str, device: str = "cpu") -> "SentenceTransformer":
    """Load a sentence-transformers model from a folder or an id.

    Raises
    ------
    ModelError
        If it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(location, device=device)
    except (OSError, ValueError) as error:
        raise ModelError(f"embed.model {location!r} cannot be loaded: {error}") from error


@contextmanager
def _processes(model: "SentenceTransformer", devices: Sequence[str]) -> Iterator[Pool | None]:
    """Start a process per device where there are several; end them at the end."""
    if len(devices) == 1:
        yield None
        return
    pool = model.start_multi_process_pool(list(devices))
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)


def embed_prompts(
    model: "SentenceTransformer",
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    pool: Pool | None = None,
) -> Embeddings:
    """Embed texts with a loaded model, or in its pool; rows of unit norm, shape (N, D).

    Raises
    ------
    ModelError
        If a vector is not finite.
    """
    vectors = model.encode(
        list(texts),
        batch_size=batch_size,
        normalize_embeddings=True,
        show_progress_bar=False,
        pool=pool,
    ).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ModelError("embed.model gave vectors that are not finite")
    return np.ascontiguousarray(vectors)
