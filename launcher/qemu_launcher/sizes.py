"""Sizes in bytes: no limit as a number, their units as a user writes them, and how they are told.

Why it exists: what decides about sizes needs neither /proc nor stderr, and all say a size in the same words.
"""

INFINITY = 2**64 - 1  # RLIM_INFINITY of prlimit(2), and "unlimited" on our wire
UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}  # in definitions, and in helper.toml: powers of two


def format_size(size: int) -> str:
    """Bytes in the largest fitting unit, with one decimal where it is not whole: `25 GiB`, `1.5 MiB`."""
    for unit, shift in reversed(UNITS.items()):
        if size >= 1 << shift:
            return f"{round(size / (1 << shift), 1):g} {unit}iB"
    return f"{size} bytes"


def format_limit(size: int, unlimited: str = "unlimited") -> str:
    """A limit in bytes, or what it is called that there is none."""
    return unlimited if size == INFINITY else format_size(size)
