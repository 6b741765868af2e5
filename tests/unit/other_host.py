"""Another host, laid out in a folder: what `check` finds in /sys, /proc, /dev and /etc, and what one may do there."""

import os
from pathlib import Path

from qemu_launcher import host as cpu_host
from qemu_launcher.check.finding import Finding
from qemu_launcher.check.tree import Tree
from qemu_launcher.cpulist import parse_cpulist

INTEL = "processor : 0\nvendor_id : GenuineIntel\nflags : fpu vmx sse\n"
AMD = "processor : 0\nvendor_id : AuthenticAMD\nflags : fpu svm sse\n"


class OtherHost:
    """Made empty; a test writes down what it is about. Nothing in it is forbidden until `forbid` says so."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._forbidden: dict[Path, int] = {}

    @property
    def tree(self) -> Tree:
        return Tree(self.root, self._may)

    def write(self, path: str, text: str = "") -> None:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def folder(self, path: str) -> None:
        (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def link(self, path: str, target: str) -> None:
        """A symbolic link to `target`, a path of this host's, which need not exist."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(self.root / target.lstrip("/"), place.parent))

    def forbid(self, path: str, mode: int = os.R_OK | os.W_OK | os.X_OK) -> None:
        """The user may not do any of `mode` with it."""
        self._forbidden[self.root / path.lstrip("/")] = mode

    def pci(self, address: str, *, driver: str | None, group: int | None, kind: str = "0x030000") -> None:
        """A PCI device, bound to a driver, in an IOMMU group."""
        folder = f"/sys/devices/pci0000:00/{address}"
        for name, text in (("class", kind), ("vendor", "0x10de"), ("device", "0x2684")):
            self.write(f"{folder}/{name}", f"{text}\n")
        self.link(f"/sys/bus/pci/devices/{address}", folder)
        if driver is not None:
            self.link(f"{folder}/driver", f"/sys/bus/pci/drivers/{driver}")
        if group is not None:
            self.link(f"{folder}/iommu_group", f"/sys/kernel/iommu_groups/{group}")
            self.link(f"/sys/kernel/iommu_groups/{group}/devices/{address}", folder)

    def huge_pages(
        self, kilobytes: int, *, total: int, free: int, reserved: int = 0, overcommit: int = 0, node: int | None = None
    ) -> None:
        """The pool of one size, or a node's part of it."""
        place = "kernel/mm" if node is None else f"devices/system/node/node{node}"
        folder = f"/sys/{place}/hugepages/hugepages-{kilobytes}kB"
        numbers = {"nr": total, "free": free, "resv": reserved, "nr_overcommit": overcommit, "surplus": 0}
        for name, number in numbers.items():
            self.write(f"{folder}/{name}_hugepages", f"{number}\n")

    def cpus(self, online: str, *, siblings: int = 0, possible: str | None = None) -> cpu_host.Host:
        """CPUs; n and n + `siblings` are one core."""
        folder = f"/{cpu_host.CPU_FOLDER}"
        self.write(f"{folder}/online", online)
        self.write(f"{folder}/possible", possible or online)
        for cpu in parse_cpulist(online) if siblings else ():
            first = cpu % siblings
            self.write(f"{folder}/cpu{cpu}/topology/thread_siblings_list", f"{first},{first + siblings}")
        return cpu_host.read_host(self.root)

    def cache(self, cpus: str, size: str = "32768K") -> None:
        """CPUs that share one L3 cache."""
        for cpu in parse_cpulist(cpus):
            folder = f"/{cpu_host.CPU_FOLDER}/cpu{cpu}/cache/index3"
            self.write(f"{folder}/shared_cpu_list", f"{cpus}\n")
            self.write(f"{folder}/size", f"{size}\n")

    def node(self, number: int, cpus: str) -> None:
        """A NUMA node, with memory."""
        self.write(f"/sys/devices/system/node/node{number}/cpulist", f"{cpus}\n")
        self.write("/sys/devices/system/node/has_memory", f"0-{number}\n")

    def _may(self, path: Path, mode: int) -> bool:
        return path.exists() and not self._forbidden.get(path, 0) & mode


def told(findings: list[Finding]) -> list[str]:
    """`error: what` of each."""
    return [f"{finding.severity}: {finding.text}" for finding in findings]


def the_only(findings: list[Finding]) -> tuple[str, str, str]:
    """Severity, text and fix of the one finding there is."""
    [one] = findings
    return one.severity, one.text, one.fix or ""


MOUNTS = (
    "22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw\n"
    "30 22 0:27 / /dev/hugepages rw,relatime shared:11 - hugetlbfs hugetlbfs rw,pagesize=2M\n"
    "31 22 0:28 / /mnt/huge\\040pages rw - hugetlbfs none rw,pagesize=1024M\n"
    "32 22 0:29 / /dev/shm rw,nosuid - tmpfs tmpfs rw\n"
)


def with_memory(tmp_path: Path) -> OtherHost:
    """16 GiB to spare; 4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    host = OtherHost(tmp_path)
    host.write("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nHugepagesize:       2048 kB\n")
    host.write("/proc/self/mountinfo", MOUNTS)
    host.huge_pages(2048, total=2048, free=2048)
    host.huge_pages(1048576, total=0, free=0)
    host.folder("/dev/hugepages")
    host.folder("/dev/shm")
    return host


def with_nodes(host: OtherHost) -> OtherHost:
    """The same in two nodes of 8 CPUs, with half of the huge pages each."""
    for number, cpus in enumerate(("0-7", "8-15")):
        host.node(number, cpus)
        host.huge_pages(2048, total=1024, free=1024, node=number)
    return host
