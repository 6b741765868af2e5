"""Shielding with remote cpuset partitions: cgroup v2, Linux 6.11 and newer (cgroup-v2.rst, "Cpuset").

    user.slice/user-1000.slice/qemu-launcher-1000-win11.scope     (slices: the union of what is below)
        emulator/        all threads that nobody named
        pinned/TID/      threads pinned to CPUs that others may use too
        vcpus/           the partition: these CPUs leave every other task of the host, PID 1 included
            TID/         one thread, its CPUs

Enabling a partition below the top level is the one write that needs CAP_SYS_ADMIN.

Linux 6.8 to 6.10 have the files, but there exclusive CPUs are a part of cpuset.cpus, which all levels would need, too;
and then no other group could have a list with one of them. They have no file of which newer ones can be told, hence the
version. A distribution's kernel that is newer than it says gets pool.py, which works there as well.
"""

import errno
import fnmatch
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .. import privileges
from ..contract import Conflict, Failed, Pin, TargetRefused
from ..target import Ended, Target
from .cpulist import cpulist, parse_cpulist

# New threads may be born while the old ones move; a fork bomb must not keep us here, and everybody else waiting.
# A look that comes late moves a few threads of a group all the same: those that QEMU's own vCPU threads have made.
SWEEP_SECONDS, SWEEP_THREADS = 2.0, 16
# A thread that is about to end is moved no more; one that never does, as in a file system of its own, must not keep us
# either. So many looks, each after one millisecond more, are half a second.
STUCK_LOOKS = 30
CGROUP, OSRELEASE = Path("/sys/fs/cgroup"), Path("/proc/sys/kernel/osrelease")
# Where systemd has a link for each unit that is not dead.
UNITS = Path("/run/systemd/units")


class Partition:
    """The mechanism, on the cgroup v2 hierarchy mounted at `root`."""

    name = "partition"
    reason = "The kernel has remote cpuset partitions"
    # Where scopes of VMs may be.
    slices: tuple[str, ...] = ("user.slice/user-*.slice/", "system.slice/")
    # Whether the helper has to stay while there are VMs, as nobody starts it when one ends.
    resident = False
    # What to write into cpuset.cpus for no restriction: nothing, and the group gets its parent's CPUs.
    everything: frozenset[int] = frozenset()

    def __init__(self, root: Path = CGROUP) -> None:
        self.root, self.linux = root, [*map(int, re.findall("[0-9]+", text(OSRELEASE) or "")[:2])]

    def lacks(self) -> str:
        """Tell what this host lacks for it; "" when it can be used."""
        usable = (self.root / "cpuset.cpus.isolated").exists() and self.linux >= [6, 11]
        return "" if usable else "Shielding needs the cgroup v2 hierarchy and Linux 6.11 or newer"

    def home(self, unit: str, uid: int) -> str:
        """Return the group that a VM's scope goes to, which is of this user and lives in `unit`."""
        del uid
        return unit.rpartition("/")[0]

    def enclose(self, scope: str, target: Target) -> bool:
        """Move the process into the scope, and tell whether that is done: not where systemd has to be asked for it."""
        del scope, target
        return False

    def give_back(self, pid: int, scope: str) -> None:
        """Put a process that inherited a target's number, and was moved in its place, back beside its parent.

        One of the VM's own user stays, and ends with the scope: he can have it adopted by PID 1, where no limit of his
        holds. So does one in a user namespace that PID 1 has adopted: its user ID does not say whose it is.
        """
        with suppress(OSError, TargetRefused), Target(pid) as other, Target(int(other.status()["PPid"])) as parent:
            own = f"/qemu-launcher-{other.status()['Uid'].split()[0]}-" in scope
            alien = parent.pid == 1 and other.read("uid_map") != parent.read("uid_map")
            if other.cgroup() == scope and not own and not alien:
                (self._dir(parent.cgroup()) / "cgroup.procs").write_text(str(pid))

    def take_realtime(self, scope: str) -> None:
        """Put every real-time thread in the scope back to SCHED_OTHER."""
        for pid in self.processes(scope):
            with suppress(TargetRefused, FileNotFoundError, ProcessLookupError), Target(pid) as process:
                process.take_realtime()

    def processes(self, scope: str) -> list[int]:
        """Return the PIDs of all processes in the scope."""
        return [int(pid) for pid in (self._dir(scope) / "cgroup.procs").read_text().split()]

    def kill(self, scope: str) -> None:
        """End at once what an ended VM left in its scope; harmless when there is no scope any more."""
        with suppress(FileNotFoundError):
            (self._dir(scope) / "cgroup.kill").write_text("1")

    def tidy(self, known: frozenset[str]) -> None:
        """Remove groups of VMs that have ended, not in `known`, where nobody else does it any more.

        Without systemd that is everywhere. systemd does it once, as soon as nobody is left in a scope: it cannot when
        groups are made in it at that moment, for a VM that ends while its threads are pinned.
        """
        for group in map(self._dir, {*self._scopes()} - known):
            with suppress(OSError):  # what was killed may take a moment to end: next time
                dead = not (UNITS / f"invocation:{group.name}").is_symlink()
                if dead and "populated 0" in (group / "cgroup.events").read_text():
                    for path in sorted(group.glob("**/"), reverse=True):
                        path.rmdir()

    def settle(self, live: Mapping[str, frozenset[int]]) -> None:
        """Make the levels above the scopes hold exactly what `live` (scope path -> reserved CPUs) needs."""
        wanted = dict.fromkeys([path for slices in self.slices for path in find(self.root, slices)], frozenset[int]())
        for scope, cpus in live.items():
            for path in self._dir(scope).parents:
                if path == self.root:
                    break
                wanted[path] = wanted.get(path, frozenset()) | cpus
        wanted.setdefault(self.root / "user.slice", frozenset())
        present = {path: cpus for path, cpus in wanted.items() if (path / "cpuset.cpus.exclusive").exists()}
        # Shrink from the leaves up, then grow from the top down: no level ever holds less than its children.
        for path in sorted(present, key=lambda path: -len(path.parts)):
            _exclusive(path, present[path], shrink=True)
        for path in sorted(present, key=lambda path: len(path.parts)):
            _exclusive(path, present[path])

    def apply(self, scope: str, pins: Sequence[Pin], reserved: frozenset[int], others: frozenset[int]) -> None:
        """Put every thread of the scope where `pins` and `others` (empty: all unshielded CPUs) want it. Idempotent.

        `reserved`: whole cores, at least the shielded pins' CPUs. Failed or Conflict when the kernel does otherwise.
        """
        base, outside = self._dir(scope), self._outside(scope)
        emulator = threaded(outside / "emulator")
        (outside / "cgroup.subtree_control").write_text("+cpuset")
        write(emulator / "cpuset.cpus", others or self.everything)
        places = {pin.tid: (base / "vcpus" if pin.shielded else outside / "pinned") / str(pin.tid) for pin in pins}
        if self._reserved(base / "vcpus") != reserved:
            self.withdraw(scope, time.monotonic() + SWEEP_SECONDS)
        kinds = {len(pin.cpus) for pin in pins if pin.shielded}
        # isolated switches load balancing off: right for one CPU per thread, wrong as soon as a thread may choose.
        self._reserve(base, reserved, "isolated" if kinds == {1} else "root")
        for pin in pins:
            place = places[pin.tid]
            if not pin.shielded:
                threaded(place.parent)
            (place.parent / "cgroup.subtree_control").write_text("+cpuset")
            write(threaded(place) / "cpuset.cpus", pin.cpus)
            (place / "cgroup.threads").write_text(str(pin.tid))
        self._sweep(base, outside, places)
        for pin in pins:
            effective = read(places[pin.tid] / "cpuset.cpus.effective")
            if effective != pin.cpus:
                raise Failed(f"Thread {pin.tid} got CPUs {cpulist(effective)}, not {cpulist(pin.cpus)}")
        effective = read(emulator / "cpuset.cpus.effective")
        if others and effective != others:
            raise Failed(f"The emulator threads got CPUs {cpulist(effective)}, not {cpulist(others)}")

    def withdraw(self, scope: str, end: float) -> None:
        """Give the scope's CPUs back; its threads then run wherever the host's other tasks do. Idempotent.

        `end`, of time.monotonic(): Failed when they are not all moved by then.
        """
        base = self._dir(scope)
        # The CPUs first: this works also while somebody makes threads faster than they can be moved.
        self._open(base)
        for group in (base / "vcpus", self._outside(scope) / "pinned"):
            for place in find(group, "*/"):
                _drain(place, self._outside(scope) / "emulator", end)
                place.rmdir()
            if group.is_dir():
                group.rmdir()

    def shielded_threads(self, scope: str) -> dict[int, frozenset[int]] | None:
        """Return the threads pinned inside the shield with the CPUs they have; None when there is no valid shield."""
        vcpus = self._dir(scope) / "vcpus"
        if not self._reserved(vcpus):
            return None
        threads: dict[int, frozenset[int]] = {}
        with Ended(OSError):  # it ends while we look
            for place in find(vcpus, "*/"):
                effective = read(place / "cpuset.cpus.effective")
                if effective != read(place / "cpuset.cpus"):
                    return None  # a CPU went offline, and its thread runs on its neighbours'
                if place.name in (place / "cgroup.threads").read_text().split():
                    threads[int(place.name)] = effective
            return threads
        return None

    def orphans(self, known: frozenset[str]) -> list[str]:
        """Return the scopes of ours that still hold CPUs and are not in `known`."""
        return [scope for scope in self._scopes() if scope not in known and self._claims(self._dir(scope))]

    def _claims(self, base: Path) -> bool:
        """Tell whether there is a shield or a part of one, valid or not."""
        files = ("vcpus/cpuset.cpus.partition", "vcpus/cpuset.cpus.exclusive", "cpuset.cpus.exclusive")
        return not {text(base / name) for name in files} <= {None, "", "member"}

    def _scopes(self) -> list[str]:
        patterns = [f"{slices}qemu-launcher-*.scope" for slices in self.slices]
        return [f"/{path.relative_to(self.root)}" for pattern in patterns for path in find(self.root, pattern)]

    def _dir(self, scope: str) -> Path:
        return self.root / scope.lstrip("/")

    def _outside(self, scope: str) -> Path:
        """Return the group below which the threads outside the shield are."""
        return self._dir(scope)

    def _reserved(self, vcpus: Path) -> frozenset[int]:
        """Return the CPUs of the partition when there is one and it is valid."""
        with Ended(OSError):
            state = (vcpus / "cpuset.cpus.partition").read_text().strip()
            return read(vcpus / "cpuset.cpus.exclusive.effective") if state in ("isolated", "root") else frozenset()
        return frozenset()

    def _reserve(self, base: Path, reserved: frozenset[int], kind: str) -> None:
        """Make the shield; `kind` as the kernel calls it. With no CPUs there is none, nor any trace of one."""
        _exclusive(base, reserved)
        if not reserved:
            return
        vcpus = threaded(base / "vcpus")
        _exclusive(vcpus, reserved)
        if (vcpus / "cpuset.cpus.partition").read_text().strip() != kind:
            with privileges.raised("sys_admin"):
                (vcpus / "cpuset.cpus.partition").write_text(kind)
        state = (vcpus / "cpuset.cpus.partition").read_text().strip()
        if state != kind or self._reserved(vcpus) != reserved:
            raise Failed(f"The kernel does not make the partition: {state!a}")

    def _open(self, base: Path) -> None:
        """Take the shield away; its threads are still where they were."""
        if (base / "vcpus/cpuset.cpus.partition").exists():
            (base / "vcpus/cpuset.cpus.partition").write_text("member")
            _exclusive(base / "vcpus", frozenset())
        if (base / "cpuset.cpus.exclusive").exists():
            _exclusive(base, frozenset())

    def _sweep(self, base: Path, outside: Path, places: Mapping[int, Path]) -> None:
        """Move all threads but the named ones into emulator/, those born meanwhile included."""
        homes, end = {str(place) for place in places.values()}, time.monotonic() + SWEEP_SECONDS
        _drain(base, outside / "emulator", end)  # once it is empty, nobody in it makes threads there
        for group in (base / "vcpus", outside / "pinned"):
            for place in find(group, "*/"):
                _drain(place, outside / "emulator", end, keep=place.name if str(place) in homes else "")
                if str(place) not in homes:
                    place.rmdir()


def _drain(source: Path, emulator: Path, end: float, keep: str = "") -> None:
    late, same, seen = False, 0, list[str]()
    while tids := [tid for tid in (source / "cgroup.threads").read_text().split() if tid != keep]:
        same = same + 1 if tids == seen else 0
        # One pass is for those that were there: on a slow host it takes long to look at all places.
        if late or same > STUCK_LOOKS:
            raise Failed("Threads are born faster than they can be moved, or do not end")
        for tid in tids[:SWEEP_THREADS]:
            with suppress(ProcessLookupError):
                (emulator / "cgroup.threads").write_text(tid)
        late, seen = time.monotonic() > end, tids
        time.sleep(same / 1000)


def find(root: Path, pattern: str) -> list[Path]:
    """Return what there is, as Path.glob does; with a slash at the end, folders only.

    Path.glob of Python 3.11 fails when a folder ends meanwhile. That of 3.13 finds nothing in one that cannot be opened
    just now (Ended): who had a shield would have none, and what is remembered of others would be forgotten.
    """
    first, more, rest = pattern.partition("/")
    if not more and "*" not in first:  # not looked for: others may have filled the folder, or closed it to us
        return [root / first] if os.path.exists(root / first) else []  # noqa: PTH110  Path's raises PermissionError
    with Ended(OSError), os.scandir(root) as entries:
        found = [root / e.name for e in entries if fnmatch.fnmatch(e.name, first) and (e.is_dir() or not more)]
        return [path for folder in found for path in find(folder, rest)] if rest else found
    return []


def threaded(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    path.chmod(0o755)  # UMask=0077 would hide from its user whether the partition he was granted is valid
    if (path / "cgroup.type").read_text().strip() != "threaded":
        (path / "cgroup.type").write_text("threaded")
    return path


def text(path: Path) -> str | None:
    """Return the list in the file; None for a group that has ended, of which a kernel says ENOENT or ENODEV."""
    with Ended(OSError):
        return path.read_text().strip()
    return None


def read(path: Path) -> frozenset[int]:
    return parse_cpulist(path.read_text())


def write(path: Path, cpus: Iterable[int]) -> None:
    # An empty write is no write at all: the newline is what clears the file.
    path.write_text(cpulist(cpus) + "\n")


def _exclusive(path: Path, cpus: frozenset[int], *, shrink: bool = False) -> None:
    try:
        current = read(path / "cpuset.cpus.exclusive")
        wanted = cpus & current if shrink else cpus
        if current != wanted:
            write(path / "cpuset.cpus.exclusive", wanted)
    except OSError as err:
        if not path.exists():
            return  # it ended meanwhile, and holds nothing
        if err.errno != errno.EINVAL:
            raise
        raise Conflict(f"The kernel refuses CPUs {cpulist(cpus)}: another cpuset holds some, or has no others") from err
