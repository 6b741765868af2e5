"""Who is the process that a caller names, and are these its threads: then, and still now.

A PID is only a number: it is reused. So a Target holds a pidfd and a descriptor of /proc/PID, opened before the
first fact is read; a fact read through that descriptor is a fact about this process or an error, never about a
successor. Acts that take a number (prlimit, sched_setscheduler, cgroup.threads) are followed by `verify` again.

Refuses (TargetRefused) whatever is not plainly the caller's own child; reads nothing that needs a capability.
The executable is not looked at: an unprivileged user can make /proc/PID/exe anything (SECURITY S7).
"""

import fnmatch
import os
import re
import select
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from .arguments import Caller
from .errors import TargetRefused

PROC = Path("/proc")
# proc_pid_stat(5): field 22, counted behind the last ")" because a comm may contain anything.
START_TIME = 22 - 3


class Target(ExitStack):
    """One process, held by descriptors that leaving the context closes.

    Opening refuses (TargetRefused) a process that does not exist, or that started at another time than `start_time`.
    """

    def __init__(self, pid: int, start_time: int | None = None) -> None:
        super().__init__()
        self.pid, self.start_time = pid, -1
        try:
            self.pidfd = os.pidfd_open(pid)
            self.callback(os.close, self.pidfd)
            self.dirfd = os.open(PROC / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.callback(os.close, self.dirfd)
            # Alive now, so the number was not free between the two opens: both name one process.
            if self.is_alive():
                self.start_time = self.task_start_time(pid)
        except OSError:
            self.start_time = -1
        if self.start_time == -1 or start_time not in (None, self.start_time):
            self.close()
            raise TargetRefused(f"process {pid} does not exist")

    def is_alive(self) -> bool:
        """Tell whether the process has not exited (pidfd_open(2): readable once it has)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def read(self, name: str) -> str:
        """Return the text of /proc/PID/`name`; OSError once the process is gone."""
        return Path(f"/proc/self/fd/{self.dirfd}/{name}").read_text(errors="surrogateescape")

    def status(self) -> dict[str, str]:
        """Return the lines of proc_pid_status(5) by name; OSError once the process is gone."""
        return dict(line.split(":\t", 1) for line in self.read("status").splitlines() if ":\t" in line)

    def task_start_time(self, tid: int) -> int:
        """Return thread `tid`'s start time in clock ticks since boot; -1 when it is no thread of this process."""
        try:
            return int(self.read(f"task/{tid}/stat").rpartition(")")[2].split()[START_TIME])
        except OSError:
            return -1

    def tids(self) -> frozenset[int]:
        """Return the TIDs of all threads, as the kernel lists them; none once the process is gone."""
        try:
            return frozenset(int(name) for name in os.listdir(f"/proc/self/fd/{self.dirfd}/task"))
        except OSError:
            return frozenset()

    def cgroup(self) -> str:
        """Return the process's cgroup v2 path; "" once it is gone."""
        try:
            return next((line[3:] for line in self.read("cgroup").splitlines() if line.startswith("0::")), "")
        except OSError:
            return ""

    def verify(self, caller: Caller, scope: str, services: Collection[str] = ()) -> tuple[str, str]:
        """Check every fact of SECURITY S5; return the path of the slice and the name of the unit it lives in.

        `scope` is the name of the VM's own scope, where an earlier call may have put it. TargetRefused otherwise.
        """
        try:
            status, uid_map = self.status(), self.read("uid_map")
        except OSError as err:
            raise TargetRefused(f"process {self.pid} is gone") from err
        uids, gids = status.get("Uid", "").split(), status.get("Gid", "").split()
        facts = {
            "is a thread, not a process": status.get("Tgid") == str(self.pid),
            "is not a child of yours": status.get("PPid") == str(caller.pid),
            "does not run as you": uids == [str(caller.uid)] * 4,
            "runs with mixed group ids": len(gids) == 4 and len(set(gids)) == 1,
            "is in another PID namespace": len(status.get("NSpid", "").split()) == 1,
            "is in another user namespace": uid_map == (PROC / "self/uid_map").read_text(),
            "is dead": status.get("State", "Z")[0] not in "ZX" and self.is_alive(),
            "is not yours to name": self.pid not in (1, os.getpid()) and status.get("Kthread", "0") == "0",
        }
        for wrong, holds in facts.items():
            if not holds:
                raise TargetRefused(f"process {self.pid} {wrong}")
        own, named = rf"/user\.slice/user-{caller.uid}\.slice", "|".join(map(re.escape, services))
        patterns = [
            rf"({own})/(session-[^/]+\.scope|{re.escape(scope)})(?:/.*)?",
            rf"({own})/(user@{caller.uid}\.service)/.*",
            rf"(/system\.slice)/({named}|{re.escape(scope)})(?:/.*)?" if named else "(?!)",
        ]
        cgroup = self.cgroup()
        for pattern in patterns:
            if (match := re.fullmatch(pattern, cgroup)) and not cgroup.endswith(" (deleted)"):
                return match[1], match[2]
        raise TargetRefused(
            f"process {self.pid} is not in a login session or user service of yours; "
            "helper.toml would have to name the service it belongs to"
        )

    def verify_threads(self, tids: Iterable[int]) -> dict[int, int]:
        """Return the start time of each thread in `tids`; TargetRefused when one is not a thread of this process."""
        times = {tid: self.task_start_time(tid) for tid in tids}
        for tid, start_time in times.items():
            if start_time == -1:
                raise TargetRefused(f"{tid} is not a thread of process {self.pid}")
        return times

    def verify_comm(self, patterns: Iterable[str]) -> None:
        """Catch the mistake of naming something that is not QEMU. No boundary: anybody may call himself QEMU."""
        comm = self.status().get("Name", "")
        if not any(fnmatch.fnmatchcase(comm, pattern) for pattern in patterns):
            raise TargetRefused(f"process {self.pid} is not a QEMU by its name, {comm!a}")
