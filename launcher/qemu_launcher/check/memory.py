"""Whether there is memory enough for the guest's RAM. Pure, over a Tree."""

import re
from collections.abc import Iterator

from ..sizes import format_size
from .finding import Finding
from .tree import Tree


def enough(tree: Tree, ram: int | None, in_huge_pages: int) -> Iterator[Finding]:
    """Whether the guest's RAM, less what lies in huge pages, is there now. Bytes."""
    found = re.search(r"^MemAvailable:\s+([0-9]+) kB", tree.text("/proc/meminfo") or "", re.MULTILINE)
    if ram is None or found is None:
        return
    wanted, available = max(0, ram - in_huge_pages), int(found[1]) << 10
    if wanted > available:
        text = f"the guest's RAM is {format_size(wanted)}, and the host has {format_size(available)} to spare now"
        yield Finding("warning", "memory", text, "give the guest less (-m), or end something else first")
