"""The host's NUMA nodes: which CPUs are next to which memory.

Documentation/ABI/stable/sysfs-devices-node has the files. A kernel without NUMA has none of them, and no nodes then.
"""

import re

from .tree import Tree, cpus_in

FOLDER = "/sys/devices/system/node"


def nodes(tree: Tree) -> dict[int, frozenset[int]]:
    """The CPUs of each node that has any, by its number. Others are memory alone."""
    numbers = sorted(int(found[1]) for name in tree.names(FOLDER) if (found := re.fullmatch(r"node([0-9]+)", name)))
    cpus = {number: cpus_in(tree.text(f"{FOLDER}/node{number}/cpulist")) for number in numbers}
    return {number: those for number, those in cpus.items() if those}
