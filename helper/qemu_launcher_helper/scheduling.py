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
from .arguments import SchedulerRequest
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
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


def check(
    request: SchedulerRequest, limits: Limits, shielded: Mapping[int, frozenset[int]], realtime: Iterable[int]
) -> None:
    """Refuse (LimitExceeded, TargetRefused, Unsupported) what this caller may not set.

    `shielded`: the CPUs of each thread of the VM that is pinned inside its shield, as the kernel has them. `realtime`:
    the VM's other threads that have real time already.
    """
    if request.policy not in limits.policies:
        allowed = ", ".join(sorted(limits.policies))
        raise LimitExceeded(f"policy {request.policy} is not among yours, {allowed} ({limits.source})")
    if request.policy not in REALTIME_POLICIES:
        return
    if request.priority > limits.max_priority:
        raise LimitExceeded(f"priority {request.priority} is above yours, {limits.max_priority} ({limits.source})")
    if int(RT_RUNTIME.read_text()) == -1:
        raise Unsupported("real time is refused while kernel.sched_rt_runtime_us is -1: nothing would stop a thread")
    if limits.realtime == "anywhere":
        return
    used = {cpu for tid in realtime for cpu in shielded.get(tid, ())}
    for tid in request.tids:
        cpus = shielded.get(tid, frozenset())
        if len(cpus) != 1:
            raise TargetRefused(f"real time needs thread {tid} to be pinned to one shielded CPU of its own")
        if cpus & used:
            raise TargetRefused(f"real time for two threads on CPU {min(cpus)} would hang the guest")
        if 0 in cpus:
            raise LimitExceeded(f'real time on CPU 0 needs realtime = "anywhere" ({limits.source})')
        used |= cpus


def set_policy(target: Target, start_times: Mapping[int, int], policy: str, priority: int) -> None:
    """Set all threads, verify each before and after; TargetRefused and the old policy back when one is not itself."""
    for tid, start_time in start_times.items():
        if target.task_start_time(tid) != start_time:
            raise TargetRefused(f"thread {tid} is gone")
        try:
            before = os.sched_getscheduler(tid), os.sched_getparam(tid)
            _set(tid, POLICY[policy], os.sched_param(priority))
            after = os.sched_getscheduler(tid), os.sched_getparam(tid).sched_priority
        except ProcessLookupError as err:
            raise TargetRefused(f"thread {tid} is gone") from err
        except OSError as err:
            raise Failed(f"the kernel refuses policy {policy} for thread {tid}: error {err.errno}") from err
        if target.task_start_time(tid) != start_time:
            with suppress(ProcessLookupError):
                _set(tid, *before)
            raise TargetRefused(f"thread {tid} is gone")
        if after != (POLICY[policy], priority):
            raise Failed(f"thread {tid} did not take policy {policy}")


def take_realtime(target: Target, keep: Iterable[int] = ()) -> None:
    """Put every real-time thread of the target, but those in `keep`, back to SCHED_OTHER."""
    for tid in target.tids() - frozenset(keep):
        with suppress(ProcessLookupError, TargetRefused):
            if os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_FIFO, os.SCHED_RR):
                set_policy(target, target.verify_threads([tid]), "other", 0)


def rlimit(target: Target, which: int, limit: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return one limit of the target as it was, (soft, hard), -1 for infinity, and set it to `limit` if given.

    TargetRefused, and the old limit put back, when the number is another process's by then. prlimit(2).
    """
    try:
        with privileges.raised("sys_resource"):
            before = resource.prlimit(target.pid, which, *([limit] if limit else []))
            if target.is_alive():
                return before
            resource.prlimit(target.pid, which, before)
    except ProcessLookupError:
        pass
    raise TargetRefused(f"process {target.pid} is gone")


def _set(tid: int, policy: int, param: os.sched_param) -> None:
    with privileges.raised("sys_nice"):
        os.sched_setscheduler(tid, policy, param)
