"""What was done, read back from the kernel and compared with what was asked for.

Why it exists: a helper that answers success without having acted must not get a guest started. Nothing here is
taken from an answer or from a cache of ours; the sources are /proc/PID/task/TID/status, sched_getscheduler(2) and
/proc/PID/limits. Each difference is a sentence that names the thread; no difference, no sentence.
"""

import os
from collections.abc import Collection, Iterator

from . import procfs
from .cpulist import format_cpulist
from .definition import Scheduling
from .plan import ThreadPlan
from .sizes import format_limit


def thread_differences(pid: int, plan: ThreadPlan, realtime: Collection[int]) -> list[str]:
    """How the threads of `pid` differ from `plan`; empty when they are as planned.

    `realtime`: TIDs of the emulator threads that real time was set for, if the plan has it for them.
    """
    return [
        *_pin_differences(pid, plan),
        *_others_differences(pid, plan),
        *_shield_differences(pid, plan),
        *_policy_differences(pid, plan, realtime),
    ]


def memlock_differences(pid: int, granted: int, *, exactly: bool) -> list[str]:
    """How RLIMIT_MEMLOCK of `pid` differs from `granted` bytes. `exactly`: hard limit too, neither may be higher."""
    limits = procfs.memlock_limit(pid)
    if limits is None:
        return [f"the limits of QEMU (PID {pid}) cannot be read"]
    soft, hard = limits
    if (soft, hard) == (granted, granted) if exactly else soft >= granted:
        return []
    has = f"{format_limit(soft)} (hard limit {format_limit(hard)})"
    return [f"QEMU (PID {pid}) may lock {has}, not {format_limit(granted)}"]


def _pin_differences(pid: int, plan: ThreadPlan) -> Iterator[str]:
    for pin in plan.pins:
        allowed = procfs.allowed_cpus(pid, pin.tid)
        if allowed is None:
            yield f"{pin} is no thread of QEMU's any more"
        elif allowed != pin.cpus:
            yield f"{pin} may run on CPUs {format_cpulist(allowed)}, not on {format_cpulist(pin.cpus)}"


def _others_differences(pid: int, plan: ThreadPlan) -> Iterator[str]:
    """Threads come and go here: one that has ended is no difference."""
    pinned = {pin.tid for pin in plan.pins}
    for tid in procfs.tids(pid) if plan.others else ():
        allowed = procfs.allowed_cpus(pid, tid) if tid not in pinned else None
        if allowed is not None and not allowed <= plan.others:
            yield (
                f"the emulator thread {tid} may run on CPUs {format_cpulist(allowed)}, "
                f"not only on {format_cpulist(plan.others)}"
            )


def _shield_differences(pid: int, plan: ThreadPlan) -> Iterator[str]:
    """A shield keeps everybody else away: QEMU's other threads, and this launcher as a sample of the host."""
    if plan.isolation != "shield":
        return
    pinned, cpus = {pin.tid for pin in plan.pins if pin.shielded}, plan.cpus
    others = [(f"QEMU's thread {tid}", pid, tid) for tid in procfs.tids(pid) if tid not in pinned]
    for name, process, tid in [*others, ("the launcher itself", os.getpid(), os.getpid())]:
        stray = cpus & (procfs.allowed_cpus(process, tid) or frozenset())
        if stray:
            yield f"CPUs {format_cpulist(stray)} are not shielded: {name} may run there"


def _policy_differences(pid: int, plan: ThreadPlan, realtime: Collection[int]) -> Iterator[str]:
    if plan.vcpu_policy is not None:
        names = {pin.tid: str(pin) for pin in plan.pins}
        for tid in plan.scheduled:
            who = names.get(tid, f"the vCPU thread {tid}")
            found = procfs.scheduling(tid)
            if found is None:
                yield f"{who} has ended"
            else:
                yield from _policy_difference(who, found, plan.vcpu_policy)
    if plan.emulator is not None:
        # No child is given real time: a thread that was made since is rightly without. Other policies are inherited.
        others = set(procfs.tids(pid)) - plan.named
        for tid in sorted(others.intersection(realtime) if plan.emulator.priority else others):
            found = procfs.scheduling(tid)
            if found is not None:
                yield from _policy_difference(f"the emulator thread {tid}", found, plan.emulator)


def _policy_difference(who: str, found: procfs.Scheduling, wanted: Scheduling) -> Iterator[str]:
    resets = wanted.priority > 0
    if (found.policy, found.priority) != wanted or (resets and not found.reset_on_fork):
        yield f"{who} is scheduled {found}, not {procfs.Scheduling(*wanted, reset_on_fork=resets)}"
