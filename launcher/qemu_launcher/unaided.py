"""What a user may do with the threads of his own QEMU without anybody's help: affinity, and policies without priority.

Why it exists: no privilege is asked for where the kernel needs none (sched_setaffinity(2), sched_setscheduler(2)).
Emulator threads come and go while we look: one that has ended meanwhile is none any more, and one that was born
meanwhile inherits what its creator had. So all of them are gone over until a look finds no new one.

Refused, as TuningFailed that names thread and value: what the kernel refuses. What was done before that stays done,
until `undo`.
"""

import contextlib
import os
from collections.abc import Callable, Sequence

from . import procfs
from .cpulist import format_cpulist
from .definition import Scheduling
from .errors import TuningFailed
from .plan import ThreadPlan

POLICIES = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}
# sched(7), "SCHED_IDLE": back to another policy is up, which RLIMIT_NICE allows or not.
IDLE_STAYS = "who may not raise a thread's priority (ulimit -e) can give it the policy idle, and not take it back"
# A look takes well under a millisecond: who makes threads faster than that is no QEMU that stands still.
_LOOKS = 100


def pin(wanted: ThreadPlan, pid: int, trace: Callable[[str], None] = lambda _: None) -> None:
    """Put every thread of `pid` where the plan wants it. `trace` is told what is done."""
    for one in wanted.pins:
        trace(f"sched_setaffinity: {one} -> CPU {format_cpulist(one.cpus)}")
        _put(one.tid, str(one), one.cpus)
    pinned = {one.tid for one in wanted.pins}
    if wanted.others:
        trace(f"sched_setaffinity: all other threads -> CPU {format_cpulist(wanted.others)}")
        _each(pid, pinned, lambda tid: _put(tid, f"the emulator thread {tid}", wanted.others))


def schedule(tids: Sequence[int], policy: Scheduling) -> None:
    """Give the threads a policy that has no priority."""
    for tid in tids:
        try:
            os.sched_setscheduler(tid, POLICIES[policy.policy], os.sched_param(0))
        except OSError as err:
            hint = IDLE_STAYS if isinstance(err, PermissionError) and policy.policy != "idle" else None
            raise TuningFailed(f"TID {tid} cannot be scheduled {policy}: {err.strerror}", hint) from err


def schedule_all(wanted: ThreadPlan, policy: Scheduling, pid: int) -> None:
    """The same for all emulator threads of `pid`."""
    _each(pid, wanted.named, lambda tid: schedule([tid], policy))


def emulator_tids(wanted: ThreadPlan, pid: int) -> tuple[int, ...]:
    """The emulator threads that `pid` has now."""
    return tuple(tid for tid in procfs.tids(pid) if tid not in wanted.named)


def undo(pid: int) -> bool:
    """Let all threads of `pid` run where we may, and by the usual policy, as far as the kernel allows that.

    False if one of them keeps the policy idle, for the reason that IDLE_STAYS tells.
    """
    for tid in procfs.tids(pid):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(tid, os.sched_getaffinity(0))
        with contextlib.suppress(OSError):
            os.sched_setscheduler(tid, os.SCHED_OTHER, os.sched_param(0))
    left = [found for tid in procfs.tids(pid) if (found := procfs.scheduling(tid)) is not None]
    return not any(found.policy == "idle" for found in left)


def _put(tid: int, who: str, cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(tid, cpus)
    except OSError as err:
        raise TuningFailed(
            f"{who} cannot be put on CPU {format_cpulist(cpus)}: {err.strerror}",
            f"CPUs you may use: {format_cpulist(os.sched_getaffinity(0))}",
        ) from err


def _each(pid: int, but: frozenset[int] | set[int], act: Callable[[int], None]) -> None:
    done: set[int] = set()
    for _ in range(_LOOKS):
        new = set(procfs.tids(pid)) - done - but
        if not new:
            return
        for tid in sorted(new):
            try:
                act(tid)
            except TuningFailed as err:
                if not isinstance(err.__cause__, ProcessLookupError):
                    raise
        done |= new
    raise TuningFailed(
        f"QEMU (PID {pid}) makes threads faster than they can be tuned",
        "try again, or leave out emulator_pinning and emulator_scheduler, which are for those threads",
    )
