"""The kernel's way of writing a set of CPUs, `0-3,8`, read and written.

Why it exists: affinities, cpusets and our own messages all use this form (cpuset(7), "List format").
It refuses anything that the kernel would not print with a ValueError, and has no effects.
"""

from collections.abc import Iterable

# The largest CONFIG_NR_CPUS of any architecture is 8192 (x86 with MAXSMP): a larger number names no CPU.
MAX_CPU = 8191


def parse_cpulist(text: str) -> frozenset[int]:
    """CPUs named by `text`; the empty list is the empty set. ValueError if it is no cpulist."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, dash, last = part.partition("-")
        low = _number(first)
        high = _number(last) if dash else low
        if high < low:
            raise ValueError(f"{part!r} counts backwards")
        cpus.update(range(low, high + 1))
    return frozenset(cpus)


def format_cpulist(cpus: Iterable[int]) -> str:
    """`{0, 1, 2, 8}` as `0-2,8`; the empty set as the empty string."""
    runs: list[tuple[int, int]] = []
    for cpu in sorted(set(cpus)):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1] = (runs[-1][0], cpu)
        else:
            runs.append((cpu, cpu))
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def named(cpus: Iterable[int]) -> str:
    """`CPU 2` or `CPUs 2-3`."""
    cpus = frozenset(cpus)
    return f"CPU{'s' * (len(cpus) != 1)} {format_cpulist(cpus)}"


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 4 or int(text) > MAX_CPU:
        raise ValueError(f"{text!r} is no CPU number")
    return int(text)
