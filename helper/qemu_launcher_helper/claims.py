"""Who may have what: pure arithmetic over the host's topology and memory, the live records and one user's limits.

Guarantees, whatever the sequence of claims: live shields are disjoint, consist of whole SMT cores, leave at least
one whole core to the host, and CPUs, VMs and lockable memory stay within the limits of each uid. Refuses with Conflict
or LimitExceeded, naming who holds what and what is free instead.

rlimits are per process and inherited, so memlock bounds each QEMU, and by the records the sum of what was granted;
children that QEMU forks are bounded only by MemoryMax= on the user's slice (qemu-launcher-helper(8) says so).
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .contract import INFINITY
from .cpulist import format_cpulist, parse_cpulist
from .errors import Conflict, InvalidArguments, LimitExceeded
from .limits import Limits, user_name
from .records import Record

CPU = Path("/sys/devices/system/cpu")
# What always stays unlockable for the host, all users together.
HOST_BYTES = 2 << 30
HOST_SHARE = 10  # percent of MemTotal
# The host's cores, lowest first; each is the set of its online SMT siblings.
Cores = Sequence[frozenset[int]]


def union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """Return the union of `sets`."""
    return frozenset[int]().union(*sets)


def read_cores() -> Cores:
    """Read the host's online cores from /sys (sysfs-devices-system-cpu)."""
    online = parse_cpulist((CPU / "online").read_text())
    siblings = {parse_cpulist((CPU / f"cpu{n}/topology/thread_siblings_list").read_text()) & online for n in online}
    return sorted(siblings, key=min)


def free_for(limits: Limits, cores: Cores, records: Iterable[Record]) -> frozenset[int]:
    """Return the CPUs that a new shield within `limits` could take, one core at least left to the host."""
    live = [record for record in records if not record.stray]
    shielded, taken = union(record.shielded for record in live), union(record.cpus for record in live)
    free = [core for core in cores if core.isdisjoint(taken) and (limits.cpus is None or core <= limits.cpus)]
    if not any(core.isdisjoint(shielded) for core in cores if core not in free):
        free = free[1:]
    return union(free)


def check_count(uid: int, limits: Limits, records: Iterable[Record]) -> None:
    """Refuse (LimitExceeded) a new VM that would be one more than its owner may have."""
    count = sum(record.uid == uid for record in records)
    if count >= limits.max_vms:
        raise LimitExceeded(f"You have {count} VMs, and may have {limits.max_vms} ({limits.source})")


def check(claim: Record, emulator: frozenset[int], limits: Limits, cores: Cores, records: Iterable[Record]) -> Record:
    """Return what a VM gets that asks for claim.shielded, claim.pinned, and `emulator` for its other threads.

    That is `claim`, shielded in whole cores. Raises InvalidArguments, LimitExceeded or Conflict when it may not be.
    """
    others = [record for record in records if record.key != claim.key]
    shared = claim.pinned | emulator
    shield = union(core for core in cores if core & claim.shielded)
    if missing := (claim.shielded | shared) - union(cores):
        raise InvalidArguments(f"CPUs {format_cpulist(missing)} do not exist or are offline")
    if overlap := shield & shared:
        raise InvalidArguments(f"CPUs {format_cpulist(overlap)} are asked for both shielded and shared")
    free = f"free for you: {format_cpulist(free_for(limits, cores, others)) or 'none'}"
    if limits.cpus is not None and (outside := (shield | shared) - limits.cpus):
        own = f"{format_cpulist(limits.cpus)} ({limits.source})"
        raise LimitExceeded(f"CPUs {format_cpulist(outside)} are not among yours, {own}; {free}")
    used = shield.union(*(record.cpus for record in (claim, *others) if record.uid == claim.uid))
    if limits.max_cpus is not None and len(used) > limits.max_cpus:
        count = f"{len(used)}, and you may have {limits.max_cpus} at once ({limits.source})"
        raise LimitExceeded(f"CPUs {format_cpulist(used)} of all your VMs are {count}")
    live = [record for record in others if not record.stray]
    for record in live:
        if overlap := shield & record.cpus | shared & record.shielded:
            since = time.strftime("%H:%M", time.localtime(record.since))
            holder = f"VM {record.vm} of {user_name(record.uid)} since {since}"
            raise Conflict(f"CPUs {format_cpulist(overlap)} are held by {holder}; {free}")
    gone = shield.union(*(record.shielded for record in live))
    if shield and all(core & gone for core in cores):
        raise LimitExceeded(f"CPUs {format_cpulist(gone)}: at least one whole core must stay with the host; {free}")
    return replace(claim, shielded=shield)


def lockable_bytes() -> int:
    """Return MemTotal less what the host keeps, in bytes (sysconf(3))."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, total - max(HOST_BYTES, total * HOST_SHARE // 100))


def grant_memlock(asked: int, own: Record, limits: Limits, records: Iterable[Record], lockable: int) -> int:
    """Return how many of the `asked` bytes the VM `own` may lock; INFINITY only where the administrator wrote it.

    LimitExceeded when nothing is left. `lockable`: lockable_bytes().
    """
    if limits.memlock == INFINITY:
        return asked
    others = [record for record in records if record.key != own.key]
    held = sum(record.memlock for record in others if record.uid == own.uid)
    most = lockable if limits.memlock is None else limits.memlock
    left = min(most - held, lockable - sum(min(record.memlock, lockable) for record in others))
    if left <= 0:
        rule = f"{most} bytes ({'this host' if limits.memlock is None else limits.source})"
        raise LimitExceeded(f"No memory is left to lock: your VMs hold {held} bytes of {rule}")
    return min(asked, left)
