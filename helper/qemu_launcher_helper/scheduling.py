"""Policies and priorities of threads, and the real-time brake that goes with them.

fifo and rr are always set with SCHED_RESET_ON_FORK: the user then can neither raise, pass on nor regain them
(sched(7)). Every act takes a number, so each captures what it finds, acts, and puts it back when the thread turns
out to be another one by then.
"""

import os
import resource
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from . import privileges
from .contract import REALTIME_POLICIES
from .errors import Failed, LimitExceeded, TargetRefused, Unsupported
from .limits import Limits
from .target import Target

POLICY = {
    "other": os.SCHED_OTHER,
    "batch": os.SCHED_BATCH,
    "idle": os.SCHED_IDLE,
    "fifo": os.SCHED_FIFO | os.SCHED_RESET_ON_FORK,
    "rr": os.SCHED_RR | os.SCHED_RESET_ON_FORK,
}
RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")
# The CPUs of each thread of a VM that is pinned inside its shield, as the kernel has them.
Shielded = Mapping[int, frozenset[int]]


def check(tids: Iterable[int], policy: str, priority: int, limits: Limits, shielded: Shielded, rest: set[int]) -> None:
    """Refuse (LimitExceeded, TargetRefused, Unsupported) what this caller may not set for threads `tids`.

    `rest`: the VM's other threads that have real time already.
    """
    if policy not in limits.policies:
        allowed = ", ".join(sorted(limits.policies))
        raise LimitExceeded(f"Policy {policy} is not among yours, {allowed} ({limits.source})")
    if priority > limits.max_priority:
        raise LimitExceeded(f"Priority {priority} is above yours, {limits.max_priority} ({limits.source})")
    if policy in REALTIME_POLICIES and int(RT_RUNTIME.read_text()) == -1:
        raise Unsupported("Real time is refused while kernel.sched_rt_runtime_us is -1: nothing would stop a thread")
    if policy not in REALTIME_POLICIES or limits.realtime == "anywhere":
        return
    used = {cpu for tid in rest for cpu in shielded.get(tid, ())}
    for tid in tids:
        cpus = shielded.get(tid, frozenset())
        if len(cpus) != 1:
            raise TargetRefused(f"Real time needs thread {tid} to be pinned to one shielded CPU of its own")
        if cpus & used:
            raise TargetRefused(f"Real time for two threads on CPU {min(cpus)} would hang the guest")
        if 0 in cpus:
            raise LimitExceeded(f'Real time on CPU 0 needs realtime = "anywhere" ({limits.source})')
        used |= cpus


def set_policy(target: Target, start_times: Mapping[int, int], policy: str, priority: int) -> None:
    """Set all threads, verify each before and after; TargetRefused and the old policy back when one is not itself.

    OSError when the kernel refuses (ProcessLookupError: the thread has ended); sched_setscheduler(2).
    """
    for tid, start_time in start_times.items():
        before = os.sched_getscheduler(tid), os.sched_getparam(tid)
        if target.task_start_time(tid) != start_time:
            raise TargetRefused(f"Thread {tid} is gone")
        _set(tid, POLICY[policy], os.sched_param(priority))
        if target.task_start_time(tid) != start_time:
            _set(tid, *before)
            raise TargetRefused(f"Thread {tid} is gone")
        if (os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority) != (POLICY[policy], priority):
            raise Failed(f"Thread {tid} did not take policy {policy}")


def _set(tid: int, policy: int, param: os.sched_param) -> None:
    with privileges.raised("sys_nice"):
        os.sched_setscheduler(tid, policy, param)


def take_realtime(target: Target, keep: Iterable[int] = ()) -> None:
    """Put every real-time thread of the target, but those in `keep`, back to SCHED_OTHER."""
    for tid in target.tids() - frozenset(keep):
        with suppress(ProcessLookupError, TargetRefused):
            if os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_FIFO, os.SCHED_RR):
                set_policy(target, target.verify_threads([tid]), "other", 0)


def rlimit(target: Target, which: int, limit: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return one limit of the target as it was, (soft, hard), -1 for infinity, and set it to `limit` if given.

    TargetRefused, and the old limit put back, when the number is another process's by then; ProcessLookupError when
    it is nobody's. prlimit(2).
    """
    with privileges.raised("sys_resource"):
        before = resource.prlimit(target.pid, which, *([limit] if limit else []))
        if not target.is_alive():
            resource.prlimit(target.pid, which, before)
            raise TargetRefused(f"Process {target.pid} is gone")
    return before
