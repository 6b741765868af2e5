"""Which way of keeping CPUs for a VM this host has: chosen at run time, best first."""

from .mechanism import CGROUP, Mechanism
from .partition import Partition


def choose() -> tuple[Mechanism | None, str]:
    """Return this host's mechanism and the reason for the choice; None when there is none."""
    if (CGROUP / "cpuset.cpus.isolated").exists():
        return Partition(CGROUP), "cgroup v2 with remote cpuset partitions (Linux 6.7 or newer)"
    return None, "shielding needs the cgroup v2 hierarchy and Linux 6.7 or newer (no cpuset.cpus.isolated)"
