"""What was done, read back from the kernel and compared with what was asked for.

Why it exists: a helper that answers success without having acted must not get a guest started. Nothing here is
taken from an answer or from a cache of ours; the sources are /proc/PID/task/TID/status, sched_getscheduler(2) and
/proc/PID/limits. Each difference is a sentence that names the thread; no difference, no sentence.
"""

import os
from collections.abc import Iterator

from . import procfs
from .cpulist import format_cpulist
from .plan import Pin, ThreadPlan
from .voice import format_size


def thread_differences(pid: int, plan: ThreadPlan) -> list[str]:
    """How the threads of `pid` differ from `plan`; empty when they are as planned."""
    return [*_pin_differences(pid, plan), *_shield_differences(pid, plan), *_policy_differences(plan)]


def memlock_differences(pid: int, granted: int, *, exactly: bool) -> list[str]:
    """How RLIMIT_MEMLOCK of `pid` differs from `granted` bytes. `exactly`: hard limit too, neither may be higher."""
    limits = procfs.memlock_limit(pid)
    if limits is None:
        return [f"the limits of QEMU (PID {pid}) cannot be read"]
    soft, hard = limits
    if (soft, hard) == (granted, granted) if exactly else soft >= granted:
        return []
    return [f"QEMU (PID {pid}) may lock {_limit(soft)} (hard limit {_limit(hard)}), not {_limit(granted)}"]


def describe(pin: Pin) -> str:
    """`vCPU 3 (TID 4711)`."""
    which = ", ".join(str(index) for index in pin.vcpus)
    return f"vCPU {which} (TID {pin.tid})"


def _pin_differences(pid: int, plan: ThreadPlan) -> Iterator[str]:
    for pin in plan.pins:
        allowed = procfs.allowed_cpus(pid, pin.tid)
        if allowed is None:
            yield f"{describe(pin)} is no thread of QEMU's any more"
        elif allowed != pin.cpus:
            yield f"{describe(pin)} may run on CPUs {format_cpulist(allowed)}, not on {format_cpulist(pin.cpus)}"


def _shield_differences(pid: int, plan: ThreadPlan) -> Iterator[str]:
    """A shield keeps everybody else away: QEMU's other threads, and this launcher as a sample of the host."""
    if plan.isolation != "shield":
        return
    pinned = {pin.tid for pin in plan.pins}
    others = [(f"QEMU's thread {tid}", pid, tid) for tid in procfs.tids(pid) if tid not in pinned]
    for name, process, tid in [*others, ("the launcher itself", os.getpid(), os.getpid())]:
        stray = plan.cpus & (procfs.allowed_cpus(process, tid) or frozenset())
        if stray:
            yield f"CPUs {format_cpulist(stray)} are not shielded: {name} may run there"


def _policy_differences(plan: ThreadPlan) -> Iterator[str]:
    if plan.policy is None:
        return
    names = {pin.tid: describe(pin) for pin in plan.pins}
    for tid in plan.scheduled:
        found = procfs.scheduling(tid)
        wanted = procfs.Scheduling(plan.policy, plan.priority, reset_on_fork=plan.policy in ("fifo", "rr"))
        who = names.get(tid, f"the vCPU thread {tid}")
        if found is None:
            yield f"{who} has ended"
        elif (found.policy, found.priority) != (wanted.policy, wanted.priority) or (
            wanted.reset_on_fork and not found.reset_on_fork
        ):
            yield f"{who} is scheduled {found}, not {wanted}"


def _limit(size: int) -> str:
    return "unlimited" if size == procfs.INFINITY else format_size(size)
