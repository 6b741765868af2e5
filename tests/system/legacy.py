"""What the kernel says about a host with the legacy cgroup hierarchy: system.host's answers, read from v1 cpusets.

On such a host the scopes of VMs are in systemd's own hierarchy, and where threads may run is in that of the cpusets.
"""

from __future__ import annotations

import os
from pathlib import Path

# What mounts them at boot, as qemu-launcher-helper(8) has it.
FSTAB = "cpuset /run/cpuset cgroup cpuset,nosuid,nodev,noexec,X-mount.mkdir"
CPUSETS = Path("/sys/fs/cgroup/cpuset")
# Where groups of processes are: systemd's own hierarchy; without systemd, cgroup v2 beside v1.
UNITS, UNIFIED = Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified")
MEMORY = Path("/sys/fs/cgroup/memory")
OURS = CPUSETS / "qemu-launcher"
POOL = OURS / "pool"


def is_legacy() -> bool:
    """Whether this host has cpusets of v1."""
    return (CPUSETS / "cpuset.cpus").exists()


def units() -> Path:
    """The hierarchy in which the scopes of VMs are."""
    return UNITS if UNITS.exists() else UNIFIED


def memory(group: Path) -> Path:
    """The same group in the hierarchy that limits memory."""
    return MEMORY / group.relative_to(units())


def said(group: Path) -> str:
    """The CPUs of a cpuset, as the kernel lists them; "" of one that has none, or that is gone."""
    try:
        return (group / "cpuset.cpus").read_text().strip()
    except OSError:
        return ""


def others() -> list[Path]:
    """Every cpuset that is not ours, but the root."""
    # Not by Path.glob: in Python 3.11 one that ends meanwhile ends it all.
    found = [Path(folder) for folder, _, _ in os.walk(CPUSETS)]
    return [path for path in found if path not in (CPUSETS, OURS) and OURS not in path.parents]


def shared() -> list[str]:
    """The CPUs of each cpuset that is no shield: none of a host without one."""
    return [said(group) for group in (POOL, *others())] if OURS.exists() else []


def claims() -> dict[str, str]:
    """Each cpuset of a shield, with its CPUs."""
    return {str(path.relative_to(CPUSETS)): said(path) for path in OURS.glob("[0-9]*/")}


def cpuset_of(pid: int, tid: int) -> str:
    """Where a thread is, without the leading slash."""
    return Path(f"/proc/{pid}/task/{tid}/cpuset").read_text().strip().lstrip("/")
