"""``tclora export``: one cluster of a routed library, or a mixture, as a plain adapter."""

from collections.abc import Sequence
from pathlib import Path

from tclora.errors import LibraryError
from tclora.library.published import library_folder
from tclora.route import read_library
from tclora_cli.folders import check_target


def export_adapter(
    library: str,
    output: Path,
    cluster: str | None,
    weights: Sequence[str],
    share: float | None = None,
) -> Path:
    """Write a cluster, a mixture (NAME=WEIGHT) or the static merge as a plain PEFT directory."""
    check_target(output)
    pairs = [text.rpartition("=") for text in weights]
    try:
        mixture = {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise LibraryError(f"--weight must be NAME=NUMBER, got {', '.join(weights)}") from None
    if len(mixture) < len(pairs):
        raise LibraryError(f"--weight must name a cluster once, got {', '.join(weights)}")
    try:
        chosen = int(cluster) if cluster and cluster.isdigit() else cluster
        read = read_library(library_folder(library))
        return read.to_peft(output, chosen, weights=mixture or None, share=share)
    except ValueError as error:
        raise LibraryError(str(error)) from error
