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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from .arguments import Caller
from .errors import TargetRefused

PROC = Path("/proc")
# proc_pid_stat(5): field 22, counted behind the last ")" because a comm may contain anything.
START_TIME = 22 - 3


@dataclass(frozen=True, slots=True)
class Home:
    """The cgroup that a target lives in, split where its slice ends."""

    slice_path: str  # "/user.slice/user-1000.slice"
    unit: str  # "session-3.scope"

    @property
    def slice_unit(self) -> str:
        """The slice's unit name, as systemd wants it in Slice=."""
        return self.slice_path.rpartition("/")[2]


class Target:
    """One process, held by descriptors; a context manager. Opening refuses a process that does not exist."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as err:
            raise TargetRefused(f"process {pid} does not exist") from err
        try:
            self.dirfd = os.open(PROC / str(pid), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # Alive now, so the number was not free between the two opens: both name one process.
            self.start_time = self.task_start_time(pid) if self.is_alive() else None
        except OSError:
            self.start_time = None
        if self.start_time is None:
            self.close()
            raise TargetRefused(f"process {pid} does not exist")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close both descriptors; harmless twice."""
        for name in ("pidfd", "dirfd"):
            with suppress(OSError):
                os.close(getattr(self, name, -1))
            setattr(self, name, -1)

    def is_alive(self) -> bool:
        """Tell whether the process has not exited (pidfd_open(2): readable once it has)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def read(self, name: str) -> str:
        """Return the text of /proc/PID/`name`; OSError once the process is gone."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.dirfd)
        with os.fdopen(fd, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    def task_start_time(self, tid: int) -> int | None:
        """Return thread `tid`'s start time in clock ticks since boot; None when it is no thread of this process."""
        try:
            return int(self.read(f"task/{tid}/stat").rpartition(")")[2].split()[START_TIME])
        except (OSError, IndexError, ValueError):
            return None

    def tids(self) -> frozenset[int]:
        """Return the TIDs of all threads, as the kernel lists them."""
        try:
            fd = os.open("task", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.dirfd)
        except OSError:
            return frozenset()
        try:
            return frozenset(int(name) for name in os.listdir(fd))
        finally:
            os.close(fd)

    def cgroup(self, tid: int | None = None) -> str:
        """Return the cgroup v2 path of the process or of one thread; "" once it is gone."""
        try:
            text = self.read("cgroup" if tid is None else f"task/{tid}/cgroup")
        except OSError:
            return ""
        return next((line[3:] for line in text.splitlines() if line.startswith("0::")), "")

    def verify(self, caller: Caller, scope: str, services: Collection[str] = ()) -> Home:
        """Check every fact of SECURITY S5 and return where the process lives.

        `scope` is the name of the VM's own scope, where an earlier call may have put it. TargetRefused otherwise.
        """
        try:
            status = dict(line.split(":\t", 1) for line in self.read("status").splitlines() if ":\t" in line)
            uid_map = self.read("uid_map")
        except OSError as err:
            raise TargetRefused(f"process {self.pid} is gone") from err
        own_map = (PROC / "self/uid_map").read_text()
        uid = str(caller.uid)
        facts = {
            "is a thread, not a process": status.get("Tgid") == str(self.pid),
            "is not a child of yours": status.get("PPid") == str(caller.pid),
            "does not run as you": status.get("Uid", "").split() == [uid] * 4,
            "runs with mixed group ids": len(status.get("Gid", "").split()) == 4
            and len(set(status["Gid"].split())) == 1,
            "is in another PID namespace": len(status.get("NSpid", "").split()) == 1,
            "is in another user namespace": uid_map == own_map,
            "is dead": status.get("State", "Z")[0] not in "ZX" and self.is_alive(),
            "is not yours to name": self.pid not in (1, os.getpid()) and status.get("Kthread", "0") == "0",
        }
        for wrong, holds in facts.items():
            if not holds:
                raise TargetRefused(f"process {self.pid} {wrong}")
        return self._home(caller.uid, scope, services)

    def _home(self, uid: int, scope: str, services: Collection[str]) -> Home:
        cgroup = self.cgroup()
        own = rf"/user\.slice/user-{uid}\.slice"
        named = "|".join(re.escape(name) for name in services)
        patterns = [
            rf"({own})/(session-[^/]+\.scope|{re.escape(scope)})(?:/.*)?",
            rf"({own})/(user@{uid}\.service)/.*",
            rf"(/system\.slice)/({named}|{re.escape(scope)})(?:/.*)?" if named else r"(?!)()()",
        ]
        for pattern in patterns:
            if (match := re.fullmatch(pattern, cgroup)) and not cgroup.endswith(" (deleted)"):
                return Home(match[1], match[2])
        raise TargetRefused(
            f"process {self.pid} is not in a login session or user service of yours; "
            "helper.toml would have to name the service it belongs to"
        )

    def verify_threads(self, tids: Iterable[int]) -> dict[int, int]:
        """Return the start time of each thread in `tids`; TargetRefused when one is not a thread of this process."""
        times: dict[int, int] = {}
        for tid in tids:
            start = self.task_start_time(tid)
            if start is None:
                raise TargetRefused(f"{tid} is not a thread of process {self.pid}")
            times[tid] = start
        return times

    def verify_comm(self, patterns: Iterable[str]) -> None:
        """Catch the mistake of naming something that is not QEMU. No boundary: anybody may call himself QEMU."""
        try:
            comm = self.read("comm").rstrip("\n")
        except OSError as err:
            raise TargetRefused(f"process {self.pid} is gone") from err
        if not any(fnmatch.fnmatchcase(comm, pattern) for pattern in patterns):
            raise TargetRefused(f"process {self.pid} is not a QEMU by its name, {comm!a}")


def find(pid: int, start_time: int) -> Target | None:
    """Open the recorded process (`pid`, `start_time`), or None when it has ended, also if its number lives on."""
    try:
        target = Target(pid)
    except TargetRefused:
        return None
    # A zombie leader with live threads still counts as alive: the pidfd tells, not the state letter.
    if target.start_time != start_time:
        target.close()
        return None
    return target
