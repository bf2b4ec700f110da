"""``tclora gc``: what may be removed, listed, or removed."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from tclora_cli.commands.shared import console

_DAY = 86_400.0  # s


def gc(
    output: Annotated[Path, typer.Option(help="Folder of libraries.")] = Path("runs"),
    store: Annotated[
        str | None, typer.Option(help="URL of a store to sweep, such as execution.store.")
    ] = None,
    days: Annotated[
        float, typer.Option("--unused-for", min=0, help="What was used since then is kept (days).")
    ] = 7,
    delete: Annotated[bool, typer.Option("--delete", help="Remove; else only list.")] = False,
) -> None:
    """List checkpoints, caches and objects of a store that nothing needs; remove them if told to.

    A store must be swept with all libraries that use it in one folder; objects that their manifests
    name are kept.
    """
    from tclora.jobs.garbage import local_garbage, store_garbage
    from tclora.library.layout import Layout
    from tclora.model.place import cache_dir
    from tclora.store.objects import Store

    before = time.time() - days * _DAY
    found = list(local_garbage(output, cache_dir(), before))
    if store:
        libraries = [path for path in sorted(output.glob("*")) if Layout(path).manifest.exists()]
        found += store_garbage(Store(store), libraries, before)
    sizes, counts = Counter[str](), Counter(part.kind for part in found)
    for part in found:
        sizes[part.kind] += part.bytes
        console.print(
            f"{part.kind:<12}{part.bytes / 1e6:>10.1f} MB  {part.place}",
            highlight=False, soft_wrap=True, markup=False,
        )  # fmt: skip
        if delete:
            part.remove()
    verb = "removed" if delete else "may be removed (--delete does it)"
    for kind, count in counts.items():
        console.print(f"{count} of kind {kind}, {sizes[kind] / 1e6:.1f} MB, {verb}", markup=False)
    if not found:
        console.print("nothing to remove")
