"""What the kernel says of a process and its threads: /proc read into values, and signals that hit the right one.

Why it exists: the launcher believes neither the helper nor its own lock file; what it reports and what it
compares is read here, from /proc (proc(5)) and sched_getscheduler(2).
Every reader returns None, or an empty collection, for a process or thread that is gone: being gone is an
answer, not an error. A process is named by PID and start time, because a PID alone may be somebody else's by now.
"""

import errno
import os
import re
import resource
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .cpulist import parse_cpulist
from .sizes import INFINITY

PROC = Path("/proc")

# include/uapi/linux/sched.h; the names are those of the definition's `scheduler` key.
POLICY_NAMES = {
    os.SCHED_OTHER: "other",
    os.SCHED_FIFO: "fifo",
    os.SCHED_RR: "rr",
    os.SCHED_BATCH: "batch",
    os.SCHED_IDLE: "idle",
    6: "deadline",
}


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Policy and priority of one thread, as sched_getscheduler(2) and sched_getparam(2) report them."""

    policy: str
    priority: int
    reset_on_fork: bool

    def __str__(self) -> str:
        words = self.policy if not self.priority else f"{self.policy} {self.priority}"
        return f"{words} (reset on fork)" if self.reset_on_fork else words


@dataclass(frozen=True, slots=True)
class Process:
    """A process that cannot be mistaken for a later one: PID and start time (clock ticks since boot)."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this PID now; None if there is none, or only its zombie."""
        start = start_time(pid)
        return None if start is None else cls(pid, start)

    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return start_time(self.pid) == self.start_time

    @contextmanager
    def pidfd(self) -> Iterator[int | None]:
        """A pidfd on exactly this process, None if it is gone. Identity is checked after the pidfd is held."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            yield None
            return
        try:
            yield fd if self.is_alive() else None
        finally:
            os.close(fd)


def start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of `pid` (proc(5), stat, field 22); None if it is dead or a zombie."""
    text = _read(f"{pid}/stat")
    if text is None:
        return None
    # comm may contain spaces and parentheses: what follows the last one is safe to split.
    fields = text.rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in {"Z", "X"} else ticks


def boot_id() -> str | None:
    """What this boot of the host is called (random(4)); None where the kernel does not tell."""
    text = _read("sys/kernel/random/boot_id")
    return None if text is None else text.strip()


def tids(pid: int) -> tuple[int, ...]:
    """Threads of `pid` in ascending order; empty if it is gone."""
    try:
        return tuple(sorted(int(name) for name in os.listdir(PROC / str(pid) / "task")))
    except OSError:
        return ()


def allowed_cpus(pid: int, tid: int) -> frozenset[int] | None:
    """CPUs on which the thread may run now (Cpus_allowed_list: affinity within its cpuset)."""
    text = _field(f"{pid}/task/{tid}/status", "Cpus_allowed_list")
    return None if text is None else parse_cpulist(text)


def scheduling(tid: int) -> Scheduling | None:
    """Policy and priority of a thread of anybody's: the kernel asks for no privilege to read them.

    None for one that has ended, and where the C library has no such calls (musl: ENOSYS).
    """
    try:
        raw = os.sched_getscheduler(tid)
        priority = os.sched_getparam(tid).sched_priority
    except OSError as err:
        if err.errno not in (errno.ESRCH, errno.ENOSYS):
            raise
        return None
    policy = raw & ~os.SCHED_RESET_ON_FORK
    return Scheduling(
        policy=POLICY_NAMES.get(policy, f"policy {policy}"),
        priority=priority,
        reset_on_fork=bool(raw & os.SCHED_RESET_ON_FORK),
    )


def own_memlock_limit() -> tuple[int, int]:
    """Soft and hard RLIMIT_MEMLOCK of this process in bytes, INFINITY for none."""
    soft, hard = (
        INFINITY if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    return soft, hard


def memory_total() -> int:
    """The host's memory in bytes, as sysconf(3) has it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memlock_limit(pid: int) -> tuple[int, int] | None:
    """Soft and hard RLIMIT_MEMLOCK in bytes, INFINITY for unlimited."""
    text = _read(f"{pid}/limits")
    found = re.search(r"^Max locked memory +(\S+) +(\S+)", text or "", re.MULTILINE)
    if found is None:
        return None
    soft, hard = (INFINITY if word == "unlimited" else int(word) for word in found.groups())
    return soft, hard


def resident(pid: int) -> int | None:
    """Memory in use, in bytes: VmRSS, and the huge pages that it leaves out."""
    small, huge = (_kibibytes(f"{pid}/status", name) for name in ("VmRSS", "HugetlbPages"))
    return None if small is None else small + (huge or 0)


def locked(pid: int) -> int | None:
    """Locked memory in bytes (VmLck)."""
    return _kibibytes(f"{pid}/status", "VmLck")


def owner(pid: int) -> int | None:
    """Real uid of `pid`. Not the owner of its /proc directory, which is root for a process that is not dumpable."""
    text = _field(f"{pid}/status", "Uid")
    return None if text is None else int(text.split()[0])


def comm(pid: int) -> str | None:
    """Name of `pid` as the kernel keeps it, at most 15 bytes."""
    text = _read(f"{pid}/comm")
    return None if text is None else text.rstrip("\n")


def end(process: Process, *, grace: float) -> bool:
    """SIGTERM, then SIGKILL after `grace` seconds; returns when it has ended. False if it had ended already.

    QEMU takes SIGTERM as `quit`: it closes its images and leaves. Needs no child: any process of this user.
    """
    with process.pidfd() as fd:
        if fd is None:
            return False
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, None)):
            try:
                signal.pidfd_send_signal(fd, number)
            except ProcessLookupError:
                return True
            if wait_readable(fd, seconds):
                return True
    return True


def wait_readable(fd: int, seconds: float | None) -> bool:
    """Wait until `fd` is readable (for a pidfd: its process has ended); False after `seconds`, None waits for ever."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _read(relative: str) -> str | None:
    try:
        return (PROC / relative).read_text("utf-8", "surrogateescape")
    except OSError:
        return None


def _field(relative: str, name: str) -> str | None:
    found = re.search(rf"^{name}:\s*(.*)$", _read(relative) or "", re.MULTILINE)
    return None if found is None else found[1].strip()


def _kibibytes(relative: str, name: str) -> int | None:
    text = _field(relative, name)
    return None if text is None else int(text.split()[0]) * 1024
