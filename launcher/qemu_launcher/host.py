"""Facts about the host's CPUs, from /sys.

Reads only. Everything takes the root of the file system as an argument, so that tests can show it another host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cpulist import parse_cpulist
from .errors import LauncherError

CPU_FOLDER = "sys/devices/system/cpu"  # Documentation/admin-guide/cputopology.rst


@dataclass(frozen=True, slots=True)
class Host:
    """The host's CPUs. `possible` may come online, `online` can run a vCPU now.

    `siblings`: for each online CPU the CPUs of its core, itself included.
    """

    possible: frozenset[int]
    online: frozenset[int]
    siblings: Mapping[int, frozenset[int]]


def read_host(root: Path = Path("/")) -> Host:
    """The host as it is now. Raises LauncherError where /sys is missing or makes no sense."""
    folder = root / CPU_FOLDER
    online = _cpulist(folder / "online")
    siblings = {cpu: _siblings(folder, cpu) for cpu in online}
    return Host(_cpulist(folder / "possible"), online, siblings)


def online_cpus(root: Path = Path("/")) -> frozenset[int] | None:
    """CPUs that can run anything now; None where /sys does not tell."""
    try:
        return _cpulist(root / CPU_FOLDER / "online")
    except LauncherError:
        return None


def _siblings(folder: Path, cpu: int) -> frozenset[int]:
    try:
        return _cpulist(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    except LauncherError:  # no topology: some virtual machines and architectures. Then each CPU is a core.
        return frozenset((cpu,))


def _cpulist(path: Path) -> frozenset[int]:
    try:
        return parse_cpulist(path.read_text("ascii"))
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) else err  # str(err) would name the path once more
        raise LauncherError(
            f"cannot read the host's CPUs from {path}: {why}",
            "vcpu_pinning is checked against /sys: mount sysfs there if it is missing",
        ) from err
