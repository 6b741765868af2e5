"""Hosts without systemd: who makes the group of a VM, where nobody else does. The rest is partition.py's and v1.py's.

    qemu-launcher-1000-win11.scope     in cgroup v2, at the top; or where elogind has made groups as systemd makes them,
                                       in its user's slice, whose limits go on to hold

All groups are root's, as with systemd: users can move nothing in or out. Nobody starts the helper when a VM ends, so it
stays as long as there is one (service.py), and `tidy` removes the groups in which nothing is left.

With v1 the group only says whose a process is, and kills what a VM has left behind; the cpusets are in the other
hierarchy. cgroup v2 can be mounted beside v1 with every kernel, there without a controller.

There is no pool: most tasks of a host without systemd are in the root's group, which cannot leave any CPU.
"""

import os
from pathlib import Path

from ..contract import Unsupported
from ..target import Target
from .partition import CGROUP, Partition
from .v1 import MOUNTS, V1, hierarchies

# Only what is mounted there can have a folder made in it.
BESIDE = "mkdir -p {0}; mount -t cgroup2 cgroup2 {0}".format(CGROUP / ("unified" if CGROUP.is_mount() else ""))


class Raw(Partition):
    """What is different where systemd makes no scopes."""

    resident = True
    slices: tuple[str, ...] = ("", "user.slice/user-*.slice/")

    def home(self, unit: str, uid: int) -> str:
        """Return the user's slice, or the top."""
        return above if (above := super().home(unit, uid)).startswith("/user.slice/") else ""

    def enclose(self, scope: str, target: Target) -> bool:
        """Make the VM's group, and move the process into it. Raises Unsupported where there is no cgroup v2."""
        if not (self.root / "cgroup.procs").exists():
            raise Unsupported(f"Without systemd, VMs need a group in cgroup v2: {BESIDE}")
        group = self._dir(scope)
        if "cpuset" in (self.root / "cgroup.controllers").read_text().split():
            for level in reversed([path for path in group.parents if path.is_relative_to(self.root)]):
                (level / "cgroup.subtree_control").write_text("+cpuset")
        group.parent.chmod(0o755)  # the root is read-only even to root without CAP_DAC_OVERRIDE, but it is root's
        group.mkdir(exist_ok=True)
        group.chmod(0o755)  # the umask would hide from its user whether the partition he was granted is valid
        (group / "cgroup.procs").write_text(str(target.pid))
        if not target.is_alive():
            self.give_back(target.pid, scope)
        return True


class RawPartition(Raw):
    """Partitions, in groups of the helper's own, wherever cgroup v2 is: OpenRC's "hybrid" mode has it beside v1."""

    def __init__(self, mounts: Path = MOUNTS) -> None:
        found = [Path(at) for at, kind, _ in hierarchies(mounts) if kind == "cgroup2"]
        super().__init__([*found, CGROUP][0])


class RawV1(Raw, V1):
    """cpusets of v1, and beside them groups of the helper's own."""

    units = "cgroup.controllers"

    def lacks(self) -> str:
        """Tell what this host lacks for it; "" when it can be used."""
        beside = (self.root / "cgroup.procs").exists()
        return super().lacks() or ("" if beside else f"Without systemd, cgroup v1 needs v2 beside it: {BESIDE}")

    def mount(self, where: str) -> None:
        """Mount cpusets there, if they are nowhere, and use them; "" for no place. Raises OSError.

        Before privileges.drop(): afterwards nobody has the right to. mount(2).
        """
        if where and super().lacks():
            from ctypes import CDLL, get_errno  # noqa: PLC0415  no other host needs the means to call what it likes

            Path(where).mkdir(exist_ok=True)
            # MS_NOSUID, MS_NODEV and MS_NOEXEC of linux/mount.h.
            if CDLL(None, use_errno=True).mount(b"cpuset", where.encode(), b"cgroup", 0b1110, b"cpuset"):
                raise OSError(get_errno(), os.strerror(get_errno()), where)
            RawV1.__init__(self)  # look again
