"""The kernel's cpulist notation ("0-3,8"), both ways.

Pure. Refuses anything that is not a strictly well-formed list (ValueError); see "List format" in cpuset(7).
"""

from collections.abc import Iterable


def parse_cpulist(text: str) -> frozenset[int]:
    """Return the CPUs that `text` names; an empty or blank text is the empty set."""
    cpus: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        ends = [int(word) for word in part.split("-") if word.isascii() and word.isdigit()]
        if len(ends) != part.count("-") + 1 or len(ends) > 2 or ends[0] > ends[-1]:
            raise ValueError(f"not a cpulist: {text!r}")
        cpus.update(range(ends[0], ends[-1] + 1))
    return frozenset(cpus)


def format_cpulist(cpus: Iterable[int]) -> str:
    """Return `cpus` in cpulist notation, ascending; the empty set is the empty string."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
