"""Prompt embeddings: unit-norm vectors by a sentence-transformers model, cached by content."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tclora.errors import ModelError
from tclora.files import atomic_path, sha256_json

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
        vectors = _encode(distinct, location, batch_size, device)
        if file:
            with atomic_path(file) as fresh:
                save_file({"embeddings": vectors}, fresh)
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[[place[text] for text in texts]]


def _encode(texts: list[str], location: str, batch_size: int, device: str) -> Embeddings:
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(location, device=device)
    except (OSError, ValueError) as error:
        raise ModelError(f"embed.model {location!r} cannot be loaded: {error}") from error
    vectors = model.encode(
        texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
    ).astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ModelError(f"embed.model {location!r} gave vectors that are not finite")
    return np.ascontiguousarray(vectors)
