"""Prompt embeddings: unit-norm vectors by a sentence-transformers model, cached by content."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tclora.errors import ModelError
from tclora.files import atomic_path, sha256_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Embeddings = NDArray[np.float32]


def embed_texts(
    texts: Sequence[str],
    location: str,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    cache: Path | None = None,
    model_digest: str = "",
) -> Embeddings:
    """Embed texts with a sentence-transformers model.

    Parameters
    ----------
    texts : sequence of str
        Repeated texts are embedded once.
    location : str
        Local folder or id of the model.
    batch_size : int
        Texts per forward pass; they are ordered by length, so little is padding.
    device : str
        Where to compute.
    cache : Path, optional
        Folder of results, keyed by the texts and `model_digest`.
    model_digest : str
        Identity of the model for the cache.

    Returns
    -------
    ndarray of float32, shape (N, D)
        Rows of unit Euclidean norm, so that a dot product is the cosine similarity.

    Raises
    ------
    ModelError
        If the model cannot be loaded or gives a vector that is not finite.
    """
    distinct = sorted(set(texts))
    file = cache and cache / f"{sha256_json([model_digest, distinct])}.safetensors"
    if file and file.is_file():
        vectors = load_file(file)["embeddings"]
    else:
        model = load_embedder(location, device)
        vectors = embed_prompts(model, distinct, batch_size=batch_size)
        if file:
            with atomic_path(file) as fresh:
                save_file({"embeddings": vectors}, fresh)
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


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


def embed_prompts(
    model: "SentenceTransformer", texts: Sequence[str], *, batch_size: int = 64
) -> Embeddings:
    """Embed texts with a loaded model; rows of unit norm, shape (N, D).

    Raises
    ------
    ModelError
        If a vector is not finite.
    """
    vectors = model.encode(
        list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    ).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ModelError("embed.model gave vectors that are not finite")
    return np.ascontiguousarray(vectors)
