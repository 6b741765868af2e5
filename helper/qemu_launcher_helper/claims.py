"""Who may have which CPUs: pure arithmetic over the host's topology, the live records and one user's limits.

Guarantees, whatever the sequence of claims: live shields are disjoint, consist of whole SMT cores, leave at least
one whole core to the host, and stay within the limits of each uid. Refuses with Conflict or LimitExceeded,
naming who holds what and what is free instead.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from .cpulist import format_cpulist, parse_cpulist
from .errors import Conflict, InvalidArguments, LimitExceeded
from .limits import Limits
from .records import Record

CPU = Path("/sys/devices/system/cpu")


def union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """Return the union of `sets`."""
    return frozenset[int]().union(*sets)


@dataclass(frozen=True, slots=True)
class Topology:
    """The online CPUs, by core: each core is the set of its online SMT siblings."""

    cores: tuple[frozenset[int], ...]

    @property
    def online(self) -> frozenset[int]:
        """All online CPUs."""
        return union(self.cores)

    def whole_cores(self, cpus: Collection[int]) -> frozenset[int]:
        """Return `cpus` with all their online SMT siblings."""
        return union(core for core in self.cores if core & frozenset(cpus))


@dataclass(frozen=True, slots=True)
class Claim:
    """What one VM asks for: CPUs for itself alone (before rounding up to whole cores) and CPUs it shares."""

    uid: int
    vm: str
    shielded: frozenset[int]
    pinned: frozenset[int]
    others: frozenset[int]


def read_topology() -> Topology:
    """Read the host's topology from /sys (sysfs-devices-system-cpu)."""
    online = parse_cpulist((CPU / "online").read_text())
    siblings = {parse_cpulist((CPU / f"cpu{n}/topology/thread_siblings_list").read_text()) & online for n in online}
    return Topology(tuple(sorted(siblings, key=min)))


def free_for(limits: Limits, topology: Topology, records: Iterable[Record]) -> frozenset[int]:
    """Return the CPUs that a new shield within `limits` could take, one core at least left to the host."""
    live = [record for record in records if not record.stray]
    shielded = union(record.shielded for record in live)
    taken = shielded | union(record.pinned for record in live)
    allowed = topology.online if limits.cpus is None else limits.cpus
    free = [core for core in topology.cores if core.isdisjoint(taken) and core <= allowed]
    if not any(core.isdisjoint(shielded) for core in topology.cores if core not in free):
        free = free[1:]
    return union(free)


def check(
    claim: Claim, limits: Limits, topology: Topology, records: Collection[Record], name_of: Callable[[int], str]
) -> frozenset[int]:
    """Return the CPUs to shield, whole cores; Conflict, LimitExceeded or InvalidArguments when it may not be."""
    others = [record for record in records if record.key != (claim.uid, claim.vm)]
    wanted = claim.shielded | claim.pinned | claim.others
    if missing := wanted - topology.online:
        raise InvalidArguments(f"CPUs {format_cpulist(missing)} do not exist or are offline")
    shield = topology.whole_cores(claim.shielded)
    if overlap := shield & (claim.pinned | claim.others):
        raise InvalidArguments(f"CPUs {format_cpulist(overlap)} are asked for both shielded and shared")
    free = format_cpulist(free_for(limits, topology, others)) or "none"
    _check_limits(claim, shield, limits, others, free)
    for record in others:
        held = record.shielded if not record.stray else frozenset()
        if overlap := (shield & (held | record.pinned)) | ((claim.pinned | claim.others) & held):
            since = time.strftime("%H:%M", time.localtime(record.since))
            raise Conflict(
                f"CPUs {format_cpulist(overlap)} are held by VM {record.vm} of {name_of(record.uid)} since {since}; "
                f"free for you: {free}"
            )
    gone = shield | union(record.shielded for record in others if not record.stray)
    if shield and not any(core.isdisjoint(gone) for core in topology.cores):
        raise LimitExceeded(f"at least one whole core must stay with the host; free for you: {free}")
    return shield


def check_count(uid: int, limits: Limits, records: Iterable[Record]) -> None:
    """Refuse (LimitExceeded) a new VM that would be one more than its owner may have."""
    count = sum(record.uid == uid for record in records)
    if count >= limits.max_vms:
        raise LimitExceeded(f"you have {count} VMs, and may have {limits.max_vms} ({limits.source})")


def _check_limits(claim: Claim, shield: frozenset[int], limits: Limits, others: Iterable[Record], free: str) -> None:
    asked = shield | claim.pinned
    if limits.cpus is not None and (outside := (asked | claim.others) - limits.cpus):
        raise LimitExceeded(
            f"CPUs {format_cpulist(outside)} are not among yours, {format_cpulist(limits.cpus)} ({limits.source}); "
            f"free for you: {free}"
        )
    held = union(record.shielded | record.pinned for record in others if record.uid == claim.uid)
    if limits.max_cpus is not None and len(asked | held) > limits.max_cpus:
        with_held = f" with {format_cpulist(held)} that you hold already" if held else ""
        raise LimitExceeded(
            f"CPUs {format_cpulist(asked)}{with_held} are {len(asked | held)}, "
            f"and you may have {limits.max_cpus} at once ({limits.source})"
        )
