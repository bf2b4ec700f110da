"""How numbers and texts are written in the report; a missing value is a dash."""

import math

MISSING = "\N{EN DASH}"
_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 0) -> str:
    """Write a number with thin thousands separators and a true minus."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", _MINUS)


def percent(fraction: float | None, digits: int = 0) -> str:
    """Write a fraction as a percentage, without the sign of percent."""
    return MISSING if fraction is None else number(100 * fraction, digits)


def interval(low: str, high: str) -> str:
    """Write an interval, or nothing if an end is missing."""
    return "" if MISSING in (low, high) else f"[{low}, {high}]"


def size(n_bytes: float) -> str:
    """Write a number of bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.{0 if unit == 'B' else 1}f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def duration(seconds: float | None) -> str:
    """Write a time as seconds, minutes or hours."""
    if seconds is None or is_missing(seconds):
        return MISSING
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shorten(text: str, length: int) -> str:
    """Put a text on one line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def is_missing(value: float | None) -> bool:
    """Return whether a value is None, NaN or infinite."""
    return value is None or not math.isfinite(value)
