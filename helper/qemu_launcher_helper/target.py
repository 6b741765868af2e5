"""Who is the process that a caller names, and are these its threads: then, and still now. And the acts on it.

A PID is only a number: it is reused. So a Target holds a pidfd and a descriptor of /proc/PID, opened before the
first fact is read; a fact read through that descriptor is a fact about this process or an error, never about a
successor. Acts take a number (prlimit, sched_setscheduler, cgroup.threads): those here capture what they find, act, and
put it back when the number is another's by then; and all are followed by `verify` again.

Refuses (TargetRefused) whatever is not plainly the caller's own child; reads nothing that needs a capability.
fifo and rr are always set with SCHED_RESET_ON_FORK: the user then can neither raise, pass on nor regain them
(sched(7)).

The executable is not looked at: an unprivileged user can make /proc/PID/exe anything (qemu-launcher-helper(8)).
"""

import fnmatch
import os
import re
import resource
import select
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from errno import EMFILE, ENFILE, ENOMEM
from pathlib import Path
from types import TracebackType

from . import privileges
from .contract import SCOPE, Caller, TargetRefused

REALTIME = {"fifo": os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, "rr": os.SCHED_RR | os.SCHED_RESET_ON_FORK}
POLICY = REALTIME | {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE}
PROC, SYSTEMD = Path("/proc"), Path("/run/systemd/system").exists()  # sd_booted(3)
# Whether no controller is cgroup v2's, which is beside v1 then: its groups limit nothing, and those of v1 are not left.
UNLIMITED = "" in [path.read_text().strip() for path in Path("/sys/fs/cgroup").glob("unified/cgroup.controllers")]


class Ended(suppress):
    """Errors of something that has ended are suppressed; not such as say nothing of it: no file can be opened now.

    Whoever has no CAP_SYS_ADMIN in effect meets the host's limit on open files (fs.file-max), which any user can reach.
    """

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> bool:
        return super().__exit__(kind, err, tb) and getattr(err, "errno", 0) not in (EMFILE, ENFILE, ENOMEM)


class Target(ExitStack):
    """One process, held by descriptors that leaving the context closes.

    Opening refuses (TargetRefused) a process that does not exist, or that started at another time than `start_time`.
    """

    def __init__(self, pid: int, start_time: int | None = None) -> None:
        super().__init__()
        self.pid, self.start_time = pid, -1
        with Ended(OSError), ExitStack() as opened:
            self.pidfd = os.pidfd_open(pid)
            opened.callback(os.close, self.pidfd)
            self.dirfd = os.open(PROC / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, self.dirfd)
            # Alive now, so the number was not free between the two opens: both name one process.
            self.start_time = self.task_start_time(pid) if self.is_alive() else -1
            if self.start_time != -1 and start_time in (None, self.start_time):
                self.push(opened.pop_all())
                return
        raise TargetRefused(f"Process {pid} does not exist")

    def is_alive(self) -> bool:
        """Tell whether the process has not exited (pidfd_open(2): readable once it has)."""
        return not select.select([self.pidfd], [], [], 0)[0]  # which can, as LimitNOFILE= is far below 1024

    def read(self, name: str) -> str:
        """Return the text of /proc/PID/`name`; TargetRefused once the process is gone."""
        with Ended(OSError):
            return Path(f"/proc/self/fd/{self.dirfd}/{name}").read_text(errors="surrogateescape")
        raise TargetRefused(f"Process {self.pid} is gone")

    def status(self) -> dict[str, str]:
        """Return the lines of proc_pid_status(5) by name; TargetRefused once the process is gone."""
        return dict(line.split(":\t", 1) for line in self.read("status").split("\n") if ":\t" in line)

    def cgroup(self) -> str:
        """Return the process's path in systemd's hierarchy; "" when it has none, TargetRefused once it is gone.

        That is cgroup v2, always the last line of proc_pid_cgroup(5); where all are in its root, or there is none, v1.
        """
        return "".join(re.findall(r"^(?:0:|[0-9]+:name=systemd):(/.+)$", self.read("cgroup"), re.MULTILINE)[-1:])

    def tids(self) -> frozenset[int]:
        """Return the TIDs of all threads, as the kernel lists them; OSError once the process is gone."""
        return frozenset(map(int, os.listdir(f"/proc/self/fd/{self.dirfd}/task")))

    def task_start_time(self, tid: int) -> int:
        """Return thread `tid`'s start time in clock ticks since boot; -1 when it is no thread of this process."""
        with suppress(TargetRefused):
            # proc_pid_stat(5): field 22, counted behind the last ")" because a comm may contain anything.
            return int(self.read(f"task/{tid}/stat").rpartition(")")[2].split()[22 - 3])
        return -1

    def verify_threads(self, tids: Iterable[int]) -> dict[int, int]:
        """Return the start time of each thread in `tids`; TargetRefused when one is not a thread of this process."""
        times = {tid: self.task_start_time(tid) for tid in tids}
        if strangers := [tid for tid in times if times[tid] == -1]:
            raise TargetRefused(f"{strangers[0]} is not a thread of process {self.pid}")
        return times

    def verify(self, caller: Caller, vm: str, services: Collection[str] = (), comm: Iterable[str] = ("*",)) -> str:
        """Check every fact of step 11 in qemu-launcher-helper(8); return the cgroup path of the unit it lives in.

        That is a session or user service of the caller's, one of the system `services`, or the scope of his VM `vm`,
        where an earlier call may have put it. `comm`: patterns of names, to catch the mistake of naming something that
        is not QEMU; no boundary: anybody may call himself QEMU. TargetRefused when a fact is wrong.
        """
        status, uid, scope = self.status(), caller.uid, re.escape(SCOPE.format(caller.uid, vm))
        gids, name = status.get("Gid", "").split(), status.get("Name", "")
        facts = {
            "is a thread, not a process": status.get("Tgid") == str(self.pid),
            "is not a child of yours": status.get("PPid") == str(caller.pid),
            "does not run as you": status.get("Uid", "").split() == [str(caller.uid)] * 4,
            "runs with mixed group ids": len(gids) == 4 and len(set(gids)) == 1,
            "is in another PID namespace": len(status.get("NSpid", "").split()) == 1,
            "is in another user namespace": self.read("uid_map") == (PROC / "self/uid_map").read_text(),
            "is dead": status.get("State", "Z")[0] not in "ZX" and self.is_alive(),
            "is not yours to name": self.pid not in (1, os.getpid()) and status.get("Kthread", "0") == "0",
            f"is not a QEMU by its name, {name!a}": any(fnmatch.fnmatchcase(name, pattern) for pattern in comm),
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise TargetRefused(f"Process {self.pid} {wrong[0]}")
        own = rf"/user\.slice/user-{uid}\.slice/(session-[^/]+\.scope|user@{uid}\.service|{scope})"
        own += rf"|/qemu\.slice/qemu-{uid}\.slice/{scope}"  # root alone makes units there
        # elogind's sessions, which older ones only count. The root's group has no limits to escape from, nor the one
        # into which OpenRC moves all that was in it.
        own += "" if SYSTEMD else rf"|/{scope}|/c?[0-9]+|/rc\.init|{r'(?!.*/qemu-launcher-).*' if UNLIMITED else ''}\Z"
        system = rf"/system\.slice/({'|'.join([scope, *map(re.escape, services)])})" if services else own
        if unit := re.match(f"({own}|{system})(?=/|$)", self.cgroup()):
            return unit[0]
        raise TargetRefused(f"Process {self.pid} is in no session or service of yours, nor in one of helper.toml's")

    def set_policy(self, start_times: Mapping[int, int], policy: str, priority: int) -> None:
        """Set all threads, verify each before and after; TargetRefused, and SCHED_OTHER, for one that is another then.

        OSError when the kernel refuses (ProcessLookupError: the thread has ended); sched_setscheduler(2).
        """
        for tid, start_time in start_times.items():
            if self.task_start_time(tid) != start_time:
                raise TargetRefused(f"Thread {tid} is gone")
            # rtkit gives a nice value below 0 with this flag alone, and only privilege takes the flag away.
            flag = os.getpriority(os.PRIO_PROCESS, tid) < 0 and os.sched_getscheduler(tid) & os.SCHED_RESET_ON_FORK
            _set(tid, POLICY[policy] | flag, os.sched_param(priority))
            if self.task_start_time(tid) != start_time:
                _set(tid, os.SCHED_OTHER, os.sched_param(0))  # what it had is not known: it began meanwhile
                raise TargetRefused(f"Thread {tid} is gone")

    def take_realtime(self, keep: Iterable[int] = ()) -> None:
        """Put every real-time thread of the target, but those in `keep`, back to SCHED_OTHER."""
        for tid in self.tids() - frozenset(keep):
            with suppress(ProcessLookupError, TargetRefused):
                if os.sched_getscheduler(tid) | os.SCHED_RESET_ON_FORK in REALTIME.values():
                    self.set_policy(self.verify_threads([tid]), "other", 0)

    def set_rttime(self, limit: tuple[int, int], keep: Collection[int] = ()) -> None:
        """Set RLIMIT_RTTIME, and let no thread have real time but those in `keep`.

        Nor these if there was a limit: under one, rtkit may have given them theirs. Where there is none, it gives none.
        """
        self.take_realtime(keep)  # before: a lower limit would kill them
        held = self.rlimit(resource.RLIMIT_RTTIME, limit)
        self.take_realtime(keep if held[1] == resource.RLIM_INFINITY else ())

    def rlimit(self, which: int, limit: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return one limit of the target as it was, (soft, hard), -1 for infinity, and set it to `limit` if given.

        TargetRefused, and the old limit put back, when the number is another process's by then; ProcessLookupError when
        it is nobody's. prlimit(2).
        """
        with privileges.raised("sys_resource"):
            before = resource.prlimit(self.pid, which, *([limit] if limit else []))
            if not self.is_alive():
                resource.prlimit(self.pid, which, before)
                raise TargetRefused(f"Process {self.pid} is gone")
        return min(before, key=lambda limit: limit % 2**64), before[1]  # the kernel itself leaves soft ones above hard


def _set(tid: int, policy: int, param: os.sched_param) -> None:
    with privileges.raised("sys_nice"):
        os.sched_setscheduler(tid, policy, param)
