"""Imports of large libraries without a search for garbage among what they make."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Collect no garbage within the block, and never look again at what it leaves.

    For imports: they make objects by the hundred thousand, all of which stay, and going through
    them again and again takes a fifth of the time of importing torch and transformers.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
