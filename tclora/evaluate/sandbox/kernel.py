"""Calls of the C library that Python 3.11 has no function for."""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library; its result, never negative.

    Raises
    ------
    OSError
        If the call fails; the message names it.
    """
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result: int = getattr(_LIBC, name)(*words)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
