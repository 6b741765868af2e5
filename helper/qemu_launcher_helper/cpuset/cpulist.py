"""The kernel's notation for sets of CPUs, "0-3,8": "List format" in cpuset(7). Pure."""

import itertools
import re
from collections.abc import Iterable


def parse_cpulist(text: str) -> frozenset[int]:
    """Return the CPUs that `text` names; an empty or blank text is the empty set."""
    ranges = [(int(first), int(last or first)) for first, last in re.findall(r"([0-9]+)-?([0-9]*)", text)]
    if not re.fullmatch(r"([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?", text.strip()) or any(a > b for a, b in ranges):
        raise ValueError(f"not a cpulist: {text!r}")
    return frozenset(cpu for first, last in ranges for cpu in range(first, last + 1))


def cpulist(cpus: Iterable[int]) -> str:
    """Return `cpus` in cpulist notation, ascending; the empty set is the empty string."""
    # Within a run of successive CPUs, number less place is always the same.
    groups = itertools.groupby(enumerate(sorted(cpus)), lambda pair: pair[1] - pair[0])
    runs = [[cpu for _, cpu in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in runs)
