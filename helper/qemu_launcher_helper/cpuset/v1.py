"""Shielding in the legacy hierarchy: cgroup v1 (cgroup-v1/cpusets.rst). The host's tasks leave the CPUs.

    MOUNT/qemu-launcher/
        4/           one cpuset for each list of CPUs that shielded threads have, named after it: these threads
            qemu-launcher-1000-win11.scope/     empty: whose it is
        pool/        all CPUs less all shielded ones: every task that was in MOUNT itself and can be moved
            qemu-launcher-1000-win11.scope/     empty, but for
                0-1/     its threads that have CPUs which others may use too

All else is to be read from this tree. A task that begins is in its parent's cpuset, so none comes back. All of it
goes with the last VM. About two thirds of the kernel's own threads refuse to be moved, and stay.

Other cpusets, a container's say, stay what they are, with their tasks in them, and lose the shielded CPUs as long as
there is a shield; what they had is remembered as in pool.py. CPUs of one that is cpu_exclusive are not to be had. None
of ours is: nobody else could have a cpuset then.

systemd has no cpusets here. It makes the scope of a VM all the same, in its own hierarchy, where a user's processes may
go wherever he may write; so a scope says whose a thread was, and the cpuset tree, which is root's, where it is.
"""

import errno
import itertools
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .. import privileges
from ..contract import Conflict, Failed, Pin, TargetRefused
from ..target import PROC, Ended, Target
from .cpulist import cpulist, parse_cpulist
from .partition import CGROUP, STUCK_LOOKS, SWEEP_SECONDS, Partition, find, read, text
from .pool import MEMORY, change, remember, remembered

ONLINE, MOUNTS = Path("/sys/devices/system/cpu/online"), Path("/proc/self/mountinfo")
PREFIX = "qemu-launcher"
# How cpusets get there. In /sys/fs/cgroup nobody can make a folder unless something is mounted there.
MOUNTED = "without systemd, before Linux 6.11: mkdir -p /run/cpuset; mount -t cgroup -o cpuset cpuset /run/cpuset"
# Cpusets of others that are looked after. Whoever may make some could make too many, and too long names of them.
MOST_CPUSETS = 2000


class V1(Partition):
    """The mechanism. Undone by `settle` alone."""

    name = "cpuset-v1"
    reason = "The host has the legacy cgroup hierarchy: most threads of the kernel's own are not kept away"
    # What there is in the hierarchy where scopes are.
    units = "system.slice"

    def __init__(self, mounts: Path = MOUNTS, memory: Path = MEMORY, online: Path = ONLINE) -> None:
        # systemd's own hierarchy may be v2 beside v1 ("hybrid").
        found = hierarchies(mounts)
        units = [Path(at) for at, kind, options in found if kind == "cgroup2" or "name=systemd" in options.split(",")]
        cpusets = [Path(at) for at, kind, options in found if kind == "cgroup" and "cpuset" in options.split(",")]
        units = [path for path in units if (path / self.units).exists()]
        super().__init__([*units[::-1], CGROUP][0])
        self._memory, self._online, self.everything = memory, online, read(online)
        # How long to wait, again and again, for tasks that are ending, until the next `settle`.
        self._tree, self._looks = [*cpusets, CGROUP / "cpuset"][0], list[float]()
        self._prefix, self._pool = self._tree / PREFIX, self._tree / PREFIX / "pool"

    def lacks(self) -> str:
        """Tell what this host lacks for it; "" when it can be used."""
        return "" if (self._tree / "cpuset.cpus").exists() else f"Shielding needs cgroup v2; {MOUNTED}"

    def processes(self, scope: str) -> list[int]:
        """Return the PIDs of all processes that have a thread in a cpuset of the scope's."""
        return [int(pid) for place in self._places(scope) for pid in (place / "cgroup.procs").read_text().split()]

    def kill(self, scope: str) -> None:
        """End what is left, where systemd's hierarchy is v2. No file of v1 does that, and a signal needs CAP_KILL."""
        with suppress(PermissionError):
            super().kill(scope)

    def settle(self, live: Mapping[str, frozenset[int]]) -> None:
        """Let every task that can be moved, and every other cpuset, have all CPUs but those that `live` shields.

        Raises Conflict when that leaves a cpuset nothing.
        """
        shielded = frozenset[int]().union(*live.values())
        alone = [path.parent for path in find(self._tree, "*/cpuset.cpu_exclusive") if text(path) == "1"]
        self.everything = read(self._online)
        self._ours = self.everything.difference(*map(_cpus, alone))
        if not (shielded or self._prefix.exists() or self._memory.exists()):
            return
        self._looks, end = [0.01] * STUCK_LOOKS, time.monotonic() + SWEEP_SECONDS
        self._new(self._new(self._prefix) / "pool")
        owners = {scope.rpartition("/")[2]: cpus for scope, cpus in live.items()}
        for place in find(self._prefix, "[0-9]*/"):
            if not any(parse_cpulist(place.name) <= owners.get(mark.name, frozenset()) for mark in find(place, "*/")):
                with suppress(OSError, Failed):  # one that is ending, and does not end, is still in there
                    self._remove(place, end)
        if not (pool := self._ours - shielded) and shielded:
            raise Conflict(f"CPUs {cpulist(shielded)} are all that no other cpuset has alone (cpu_exclusive)")
        wanted = {path: parse_cpulist(path.name) & pool or pool for path in find(self._pool, "*/*/")}
        wanted |= dict.fromkeys([self._pool, *find(self._pool, "*/")], pool) | {self._prefix: self._ours}
        try:
            if not shielded:
                # Before Linux 6.2 a cpuset with other CPUs gives its tasks all of them, whatever taskset(1) had chosen.
                with suppress(Failed):
                    self._move(self._pool, self._tree)
            self._leave(self._others(alone), wanted, shielded, next(iter(live.values()), shielded))
        finally:
            home = self._pool if shielded else self._tree
            self._move(self._tree if shielded else self._pool, home)
            self._move(self._prefix, home)  # where the kernel puts threads whose only CPU went offline
        if not shielded:
            with suppress(OSError):  # there are unshielded pins, or such as are ending
                self._pool.rmdir()
                self._prefix.rmdir()
                self._tree.chmod(0o555)

    def apply(self, scope: str, pins: Sequence[Pin], reserved: frozenset[int], others: frozenset[int]) -> None:
        """Put every thread of the scope where `pins` and `others` (empty: all unshielded CPUs) want it. Idempotent.

        After `settle`, which has taken the `reserved` CPUs from everybody. Failed when the kernel does otherwise.
        """
        if taken := reserved - self._ours:
            raise Conflict(f"CPUs {cpulist(taken)} belong to another cpuset alone (cpu_exclusive), or are offline")
        name, places = scope.rpartition("/")[2], defaultdict[Path, set[str]](set)
        for pin in pins:
            place = self._prefix if pin.shielded else self._pool / name
            places[place / cpulist(pin.cpus)].add(str(pin.tid))
        self._new(self._new(self._prefix) / "pool")
        home = self._pool / name / cpulist(others) if others else self._pool
        for place in {*places, home} - {self._pool}:
            if place.parent != self._prefix:
                self._new(place.parent)
            self._new(place, parse_cpulist(place.name))
            if place.parent == self._prefix:
                (place / name).mkdir(exist_ok=True)
        known, processes = {self._tree, self._pool, *self._places(scope)}, super().processes(scope)
        end = time.monotonic() + SWEEP_SECONDS
        for place, tids in places.items():
            for tid in tids:
                _still_in_time(end)
                self._take(tid, processes, known, place)
        for place in {*self._places(scope)} - {home}:
            self._move(place, home, end, places.get(place, ()))
            if place not in places:
                self._remove(place, end)
        self._gather(scope, known, home, frozenset().union(*places.values()))
        for place, tids in places.items():
            if tids - _tasks(place) or read(place / "cpuset.effective_cpus") != parse_cpulist(place.name):
                raise Failed(f"Threads {', '.join(sorted(tids))} did not get CPUs {place.name}")

    def withdraw(self, scope: str, end: float) -> None:
        """Put the scope's threads where the host's other tasks are; `settle` then gives the CPUs back. Idempotent."""
        for place in self._places(scope):
            with suppress(OSError):  # what is still in there is seen below, or does not matter
                self._remove(place, end)
        for group in find(self._pool, f"{scope.rpartition('/')[2]}/"):
            self._remove(group, end)

    def shielded_threads(self, scope: str) -> dict[int, frozenset[int]] | None:
        """Return the threads inside the shield with the CPUs they have; None when there is no valid shield."""
        with Ended(OSError):  # it ends while we look
            places = [place for place in self._places(scope) if place.parent == self._prefix]
            shared = read(self._pool / "cpuset.cpus")
            # The kernel takes a CPU that goes offline out of a cpuset for good, and the tasks of an empty one as well.
            whole = all(read(place / "cpuset.cpus") == parse_cpulist(place.name) for place in places)
            if places and whole and not any(read(place / "cpuset.cpus") & shared for place in places):
                return {int(tid): read(place / "cpuset.cpus") for place in places for tid in _tasks(place)}
        return None

    def orphans(self, known: frozenset[str]) -> list[str]:
        """Return the scopes, by their names alone, that have a cpuset of ours and are not in `known`."""
        names = {path.name for path in find(self._prefix, "*/qemu-launcher-*.scope")}
        return [f"/{name}" for name in sorted(names - {scope.rpartition("/")[2] for scope in known})]

    def _others(self, alone: Collection[Path]) -> list[Path]:
        """Return the cpusets of others, each before those below it; of too many MOST_CPUSETS, and one more.

        Not by Path.glob or `find`: a thousand in one another would end it all (RecursionError).
        """
        found = [self._tree]
        for path in found:
            with Ended(OSError), os.scandir(path) as entries:
                folders = (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
                theirs = (folder for folder in folders if folder != self._prefix and folder not in alone)
                found.extend(itertools.islice(theirs, MOST_CPUSETS + 2 - len(found)))
        return found[1:]

    def _leave(
        self, others: list[Path], wanted: dict[Path, frozenset[int]], shielded: frozenset[int], claim: frozenset[int]
    ) -> None:
        """Give each cpuset in `wanted` these CPUs, and the `others` what they had less the `shielded` ones.

        Raises Conflict when the `claim` leaves one nothing, or one keeps what it has, or there are too many; all others
        are as they should be.
        """
        known, memory, bare = remembered(self._memory), dict[str, list[str]](), ""
        # What has not been offline since they were written: a CPU that returns does so to no list.
        stayed = self.everything - (self._ours - _cpus(self._prefix))
        crowd = f"are not to be had with more than {MOST_CPUSETS} cpusets" if len(others) > MOST_CPUSETS else ""
        # What was remembered is put back, however many there are by now.
        back = [self._tree / name for name in known or ()]
        for path in dict.fromkeys([*others[:MOST_CPUSETS], *back]) if shielded or known != {} else ():
            name, now = str(path.relative_to(self._tree)), _cpus(path)
            if not now:  # it is still being made, or has ended
                continue
            # Whoever has come meanwhile has what the one above it had then: runc and others copy that list.
            above = memory.get(str(path.parent.relative_to(self._tree)), [""])[:2]
            before, *written = [cpulist(self.everything), cpulist(now)] if known is None else known.get(name, above)
            # The kernel takes offline CPUs from all lists. What is neither ours nor that, an administrator has written.
            ours = [parse_cpulist(list_) & those for list_ in written for those in (self.everything, stayed)]
            before = before if now in ours else cpulist(now)
            left = parse_cpulist(before) & self.everything - shielded
            bare = bare if left or not parse_cpulist(before) & claim else name
            if shielded or left != now:
                wanted[path] = left or now
                memory[name] = [before, *map(cpulist, (now, now | left, left))]
        if shielded:  # else what is remembered says all, also when /run is full
            remember(self._memory, memory)
        # Grow from the top down, then shrink from the leaves up: no cpuset may have less than those below it.
        for path in sorted(wanted, key=lambda path: len(path.parts)):
            change(path / "cpuset.cpus", cpulist(_cpus(path) | wanted[path]))
        from_below = sorted(wanted, key=lambda path: -len(path.parts))
        refused = [path.name for path in from_below if not change(path / "cpuset.cpus", cpulist(wanted[path]))]
        if not shielded and not refused:
            self._memory.unlink(missing_ok=True)
        if bare or refused or (crowd and shielded):
            what = f"are all that there are in the cpuset {bare!a}" if bare else crowd
            raise Conflict(f"CPUs {cpulist(shielded)} {what or f'are not left by {refused[0]!a}'}")

    def _places(self, scope: str) -> list[Path]:
        """Return all cpusets that hold threads of this scope, those of the shield last."""
        name = scope.rpartition("/")[2]
        return [*find(self._pool, f"{name}/*/"), *(mark.parent for mark in find(self._prefix, f"[0-9]*/{name}"))]

    def _new(self, path: Path, cpus: frozenset[int] = frozenset()) -> Path:
        """Make a cpuset, if it is not there, with these CPUs; with none, it has as many as it may until `settle`."""
        path.parent.chmod(0o755)  # MOUNT is read-only even to root without CAP_DAC_OVERRIDE, but it is root's
        path.mkdir(exist_ok=True)
        path.chmod(0o755)  # UMask=0077 would hide from its user whether his shield is valid
        cpus = cpus or read(path / "cpuset.cpus") or self._ours & read(path.parent / "cpuset.cpus")
        for name, value in (("mems", text(path.parent / "cpuset.mems")), ("cpus", cpulist(cpus))):
            if text(path / f"cpuset.{name}") != value:
                (path / f"cpuset.{name}").write_text(value or "")
        return path

    def _remove(self, place: Path, end: float) -> None:
        self._move(place, self._pool, end)
        for path in (*find(place, "*/"), place):
            path.rmdir()

    def _move(self, source: Path, target: Path, end: float = math.inf, keep: Iterable[str] = ()) -> None:
        """Move all tasks but `keep`, those born meanwhile included; Failed when there are still new ones after `end`.

        Each is tried once: the kernel keeps some where they are, and of one that is ending says that it was moved. That
        is waited for, but not for ever.
        """
        tried, moved, late, here, there = set(keep), set[str](), math.inf, _cpus(source), _cpus(target)
        while tids := _tasks(source) - tried:
            for tid in tids:
                _still_in_time(late)  # those of the first round are no more than there are
                if _put(tid, target, here, there):
                    moved.add(tid)
            tried, late = tried | tids, min(late, end, time.monotonic() + SWEEP_SECONDS)
        while self._looks and not moved.isdisjoint(_tasks(source)):
            time.sleep(self._looks.pop())

    def _take(self, tid: str, processes: Iterable[int], known: Collection[Path], place: Path) -> bool:
        """Move a thread of these processes; tell whether that worked. It does not with what is none of theirs any more.

        Conflict for one in a cpuset that is not `known`, and keeps it from anything: nobody would put it back there.
        """
        for pid in processes:
            if (at := text(PROC / f"{pid}/task/{tid}/cpuset")) is not None:
                if (group := self._tree / at.lstrip("/")) not in known and self._confines(group):
                    raise Conflict(f"Somebody keeps a thread of the VM's in the cpuset {at!a}, which it would leave")
                return _put(tid, place)
        return False

    def _confines(self, group: Path) -> bool:
        """Tell whether a cpuset has fewer CPUs than the pool, or other memory than all tasks."""
        memory = (text(path / "cpuset.mems") for path in (group, self._tree))
        return not _cpus(group) >= _cpus(self._pool) or len({*memory}) > 1

    def _gather(self, scope: str, known: Collection[Path], home: Path, named: frozenset[str]) -> None:
        """Move all threads of the scope's processes but the named ones into `home`."""
        tried, end = {*named, *_tasks(home)}, time.monotonic() + SWEEP_SECONDS
        for pid in super().processes(scope):
            with suppress(TargetRefused, FileNotFoundError, ProcessLookupError), Target(pid) as process:
                while process.cgroup() == scope and (tids := {*map(str, process.tids())} - tried):
                    for tid in tids:
                        _still_in_time(end)
                        tried.add(tid)
                        born = process.task_start_time(int(tid))
                        if self._take(tid, [pid], known, home) and process.task_start_time(int(tid)) != born:
                            _put(tid, self._pool)  # it has ended; if that moved somebody, then to where all others are


def hierarchies(mounts: Path) -> list[tuple[str, str, str]]:
    """Return where whole hierarchies are, each with "cgroup" or "cgroup2" and its options: proc_pid_mountinfo(5)."""
    return re.findall(r"^\S+ \S+ \S+ / (\S+) .* - (cgroup2?) \S+ (\S+)$", mounts.read_text(), re.MULTILINE)


def _put(tid: str, place: Path, here: frozenset[int] = frozenset(), there: frozenset[int] = frozenset()) -> bool:
    """Move one task; tell whether that worked. It does not with one that has ended, nor with PF_NO_SETAFFINITY.

    The kernel gives it all CPUs of its new cpuset, which are `there`. If it had others than all that are `here`,
    somebody's taskset(1) has made it so, and that holds on where it can. What the kernel keeps to itself (since Linux
    6.2) is better, as nobody can ask for it: what a cpuset has left of it is all that we see. So a task gets the CPUs
    back that none could have here.
    """
    try:
        with privileges.raised("sys_nice"):
            chosen = os.sched_getaffinity(int(tid))
            (place / "tasks").write_text(tid)
            with suppress(OSError):
                if chosen != here and os.sched_getaffinity(int(tid)) == there:
                    os.sched_setaffinity(int(tid), chosen | (there - here))
    except OSError as err:
        if err.errno not in (errno.ESRCH, errno.EINVAL):
            raise
        return False
    return True


def _still_in_time(end: float) -> None:
    if time.monotonic() > end:
        raise Failed("Threads are born faster than they can be moved, or there are too many")


def _tasks(place: Path) -> set[str]:
    return set((place / "tasks").read_text().split())


def _cpus(place: Path) -> frozenset[int]:
    """Return its CPUs; none of one that has ended."""
    return parse_cpulist(text(place / "cpuset.cpus") or "")
