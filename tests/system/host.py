"""What the kernel says about this host, read by root from /proc and the cgroup tree; the oracle of all system tests.

Nothing here asks the launcher, the helper or systemd: a claim about the host is checked against the host. CPUs are
sets of numbers, sizes are bytes. A thread or process that ends while it is read is left out, never an error.

What a shield is differs with the kernel, see mechanism(). With partitions the kernel itself has a word for it. Without
them (Linux before 6.11) it is what all other groups of the host may not use: the tree is read for that.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from system import legacy

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
GRANTS = Path("/run/qemu-launcher/grants")
# What the helper remembers of the host's groups while it has changed them.
MEMORY = Path("/run/qemu-launcher/pool")
# Where the scopes of VMs are when they cannot be below their users' slices.
VMS = CGROUP / "qemu.slice"
INFINITY = -1

# include/linux/sched.h: a kernel thread, and one whose CPUs nobody may change because its work belongs to one CPU
# (migration/4, ksoftirqd/4, ...). The kernel leaves these where they are when a partition takes their CPU.
PF_NO_SETAFFINITY = 0x04000000
PF_KTHREAD = 0x00200000
# PID of the thread that starts all others of the kernel (init/main.c).
KTHREADD = 2
# sched(7); sched_getscheduler(2) adds the flag to the policy.
POLICIES = {0: "other", 1: "fifo", 2: "rr", 3: "batch", 5: "idle", 6: "deadline"}
RESET_ON_FORK = 0x40000000

# Everything takes seconds in an emulated machine on a busy desk; what never comes is a failure all the same.
PATIENCE = 240.0  # seconds


class Thread(NamedTuple):
    """One thread of the host. `born`: clock ticks since boot, proc_pid_stat(5)."""

    pid: int
    tid: int
    name: str
    parent: int
    cpus: frozenset[int]
    flags: int
    born: int

    @property
    def of_kernel(self) -> bool:
        """Whether it is a thread of the kernel's own, or a program that the kernel runs (kernel/umh.c).

        One of those is systemd-cgroups-agent, for each group of the legacy hierarchy's that empties.
        """
        return bool(self.flags & PF_KTHREAD) or self.parent == KTHREADD

    @property
    def belongs_to_its_cpu(self) -> bool:
        """Whether not even the kernel moves it."""
        return bool(self.flags & PF_NO_SETAFFINITY)


def parse(cpulist: str) -> frozenset[int]:
    """`0-3,8` as numbers."""
    cpus: set[int] = set()
    for part in filter(None, cpulist.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def online() -> frozenset[int]:
    """All CPUs of the host."""
    return parse(Path("/sys/devices/system/cpu/online").read_text())


def has_systemd() -> bool:
    """Whether systemd is this host's init: sd_booted(3)."""
    return Path("/run/systemd/system").exists()


def mechanism() -> str:
    """The one that this kernel allows: partition, since Linux 6.11 (cgroup-v2.rst, Cpuset), or pool.

    And cpuset-v1, where it was told to use the legacy hierarchy.
    """
    if legacy.is_legacy():
        return "cpuset-v1"
    linux = [int(number) for number in re.findall("[0-9]+", (PROC / "sys/kernel/osrelease").read_text())[:2]]
    return "partition" if linux >= [6, 11] else "pool"


def effective(group: Path) -> frozenset[int]:
    """CPUs that tasks of a group may use; without a cpuset of its own, those of the group above. None of one gone."""
    while not (group / "cpuset.cpus.effective").exists() and group != CGROUP:
        if not group.exists():
            return frozenset()
        group = group.parent
    with suppress(OSError):  # it ended meanwhile
        return parse(_content(f"{group}/cpuset.cpus.effective"))
    return frozenset()


def groups() -> list[Path]:
    """The host's own top groups, as init.scope and user.slice: those in which any task is, but for the one of VMs.

    Into the others, those of mounts, systemd writes at each daemon-reload; for these the kernel refuses that.
    """
    found = []
    for path in CGROUP.iterdir():
        with suppress(OSError):  # it ended meanwhile, or is a file of the root's
            if path != VMS and "populated 1" in _content(f"{path}/cgroup.events"):
                found.append(path)
    return found


def isolated() -> frozenset[int]:
    """CPUs that are nobody's but a shield's.

    With partitions, that is the root's own word, cgroup-v2.rst. Without, what no group of the host may use, nor any
    thread of a VM's that is outside of a shield.
    """
    if mechanism() == "partition":
        return parse((CGROUP / "cpuset.cpus.isolated").read_text())
    if mechanism() == "cpuset-v1":
        return online() - frozenset[int]().union(
            *map(parse, legacy.shared() or [Path("/sys/devices/system/cpu/online").read_text()])
        )
    outside = [*groups(), *(path for path in _tree() if path.match("qemu-launcher-*.scope/pool"))]
    return online() - frozenset[int]().union(*map(effective, outside))


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """The lines of proc_pid_status(5); FileNotFoundError when the process is gone."""
    path = PROC / str(pid) / "status" if tid is None else PROC / f"{pid}/task/{tid}/status"
    lines = path.read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def cpus_of(pid: int, tid: int | None = None) -> frozenset[int]:
    """Cpus_allowed_list of a process's main thread, or of one of its threads."""
    return parse(status(pid, tid)["Cpus_allowed_list"])


def tids(pid: int) -> frozenset[int]:
    """All threads of a process; none when it is gone."""
    try:
        return frozenset(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return frozenset()


def pids() -> list[int]:
    """All processes of the host."""
    return [int(name) for name in os.listdir(PROC) if name.isdigit()]


def _content(path: str) -> str:
    """What a small file of /proc says, in a tenth of pathlib's time: there are hundreds of threads to read about."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 1 << 16).decode(errors="replace")
    finally:
        os.close(descriptor)


def threads() -> Iterator[Thread]:
    """Every thread of the host that has not ended: one that waits to be reaped keeps the CPUs it had last."""
    for pid in pids():
        for tid in sorted(tids(pid)):
            try:
                name, _, rest = _content(f"/proc/{pid}/task/{tid}/stat").partition("(")[2].rpartition(") ")
                # Cpus_allowed_list of /proc/PID/status without the CPUs that are offline, in a fraction of the time.
                allowed = frozenset(os.sched_getaffinity(tid))
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = rest.split()
            if fields[0] in "ZX":
                continue
            # Fields 4, 9 and 22, counted from the third one, which follows the name.
            yield Thread(pid, tid, name, int(fields[4 - 3]), allowed, int(fields[9 - 3]), int(fields[22 - 3]))


def parent(pid: int) -> int:
    """PID of its parent."""
    return int(status(pid)["PPid"])


def namespaced(pid: int) -> int | None:
    """The number that a process has in a PID namespace of its own; None when it is in the host's, or gone."""
    try:
        numbers = status(pid)["NSpid"].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(numbers[1]) if len(numbers) > 1 else None


def born(pid: int) -> int:
    """Start time of a process in clock ticks since boot: field 22 of proc_pid_stat(5)."""
    return int((PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()[22 - 3])


def scheduling(tid: int) -> tuple[str, int, bool]:
    """Policy, priority, and whether children start without them."""
    policy = os.sched_getscheduler(tid)
    reset = bool(policy & RESET_ON_FORK)
    return POLICIES[policy & ~RESET_ON_FORK], os.sched_getparam(tid).sched_priority, reset


def _flags(pid: int) -> int:
    """Field 9 of proc_pid_stat(5)."""
    return int(_content(f"/proc/{pid}/stat").rpartition(") ")[2].split()[9 - 3])


def realtime_threads() -> set[int]:
    """TIDs of the user threads, all over the host, that have a real-time policy."""
    found = set()
    for pid in pids():
        for tid in tids(pid):
            try:
                policy = POLICIES[os.sched_getscheduler(tid) & ~RESET_ON_FORK]
                if policy in ("fifo", "rr") and not _flags(pid) & PF_KTHREAD:
                    found.add(tid)
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def limit(pid: int, name: str) -> tuple[int, int]:
    """Soft and hard limit, INFINITY for none; `name` as in proc_pid_limits(5), such as "Max locked memory"."""
    lines = (PROC / f"{pid}/limits").read_text().splitlines()
    words = next(line for line in lines if line.startswith(name)).removeprefix(name).split()
    soft, hard = (INFINITY if word == "unlimited" else int(word) for word in words[:2])
    return soft, hard


def locked(pid: int) -> int:
    """Bytes that the process has locked (VmLck)."""
    return int(status(pid)["VmLck"].split()[0]) << 10


def units() -> Path:
    """The hierarchy in which the scopes of VMs are."""
    return legacy.units() if legacy.is_legacy() else CGROUP


def cgroup(pid: int, tid: int | None = None) -> Path:
    """Where a process or thread is in it."""
    path = PROC / f"{pid}/cgroup" if tid is None else PROC / f"{pid}/task/{tid}/cgroup"
    lines = path.read_text().splitlines()
    line = next(line for line in lines if line.startswith("0::") or ":name=systemd:" in line)
    return units() / line.split(":", 2)[2].lstrip("/")


def cpuset_of(pid: int, tid: int | None = None) -> Path:
    """The group that says which CPUs it may use."""
    if legacy.is_legacy():
        return legacy.CPUSETS / legacy.cpuset_of(pid, pid if tid is None else tid)
    return cgroup(pid, tid)


def slice_of(uid: int) -> Path:
    """A user's slice."""
    return units() / f"user.slice/user-{uid}.slice"


def memory_limit(group: Path) -> int:
    """MemoryMax= of a group of `units()`, in bytes."""
    path = legacy.memory(group) / "memory.limit_in_bytes" if legacy.is_legacy() else group / "memory.max"
    return int(path.read_text())


def memory_used(group: Path) -> int:
    """What it uses, with all below it."""
    path = legacy.memory(group) / "memory.usage_in_bytes" if legacy.is_legacy() else group / "memory.current"
    return int(path.read_text())


def scope_of(uid: int, vm: str) -> Path:
    """The scope of a VM. It is in its user's slice, unless that slice has to leave the VM's CPUs itself."""
    slices = VMS / f"qemu-{uid}.slice" if mechanism() == "pool" else slice_of(uid)
    if not has_systemd() and not slices.exists():  # elogind, which has made no group for him there
        slices = units()
    return slices / f"qemu-launcher-{uid}-{vm}.scope"


def emulator_of(scope: Path) -> Path:
    """The group of all threads that are not pinned; with v1, that is everybody's."""
    if legacy.is_legacy():
        return legacy.POOL
    return scope / ("emulator" if mechanism() == "partition" else "pool/emulator")


def scopes() -> set[str]:
    """Names of all scopes of VMs in the cgroup tree."""
    return {path.name for path in _tree() if fnmatch(path.name, "qemu-launcher-*.scope")}


def _tree() -> list[Path]:
    """All groups of that hierarchy; in others, systemd may leave empty ones behind for a while."""
    return [Path(folder) for folder, _, _ in os.walk(units())]


def records() -> set[str]:
    """Names of all records of grants, half written ones included."""
    return {path.name for path in GRANTS.glob("*")}


def exclusive() -> dict[str, frozenset[int]]:
    """Every cgroup that claims CPUs for itself, with these."""
    if mechanism() == "cpuset-v1":
        return {name: parse(cpus) for name, cpus in legacy.claims().items()}
    pool = mechanism() == "pool"
    found = {}
    for group in _tree():
        if pool and not group.match("qemu-launcher-*.scope/vcpus"):
            continue
        try:
            if cpus := parse(_content(f"{group}/cpuset.cpus" if pool else f"{group}/cpuset.cpus.exclusive")):
                found[str(group.relative_to(CGROUP))] = cpus
        except OSError:  # it has no cpuset of its own, or ended meanwhile
            continue
    return found


def is_alive(pid: int) -> bool:
    """Whether a process exists and has not exited."""
    try:
        return status(pid)["State"][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes(name: str) -> list[int]:
    """PIDs whose command line has a word of that name, or a path that ends in it; no kernel threads, no zombies."""
    found = []
    for pid in pids():
        try:
            words = _content(f"/proc/{pid}/cmdline").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word.rpartition("/")[2] == name for word in words[:3]) and is_alive(pid):
            found.append(pid)
    return found


def helper() -> int | None:
    """PID of the running helper, as /proc knows it, whoever started it; stepping_helper.py is one too."""
    found = processes("qemu-launcher-helper") + processes("stepping_helper.py")
    assert len(found) <= 1, f"more than one helper runs: {found}"
    return found[0] if found else None


def descriptors(pid: int, looks: int = 4) -> int:
    """How many the helper has open at rest. Even then it looks at VMs every 15 s: the fewest of some looks."""
    found = []
    for _ in range(looks):
        found.append(len(os.listdir(PROC / f"{pid}/fd")))
        time.sleep(0.1)
    return min(found)


def born_of_us() -> frozenset[int]:
    """CPUs of a process forked just now by this test."""
    done = subprocess.run(["cat", "/proc/self/status"], check=True, capture_output=True, text=True)
    return parse(next(line for line in done.stdout.splitlines() if line.startswith("Cpus_allowed_list")).split()[1])


def born_of_pid_1() -> frozenset[int]:
    """CPUs of a service started just now."""
    command = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", "cat", "/proc/self/status"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return parse(next(line for line in done.stdout.splitlines() if line.startswith("Cpus_allowed_list")).split()[1])


def trespassers(cpus: Iterable[int], but: Iterable[int], since: int) -> list[Thread]:
    """Threads that may run on `cpus` although they are not named in `but`.

    Exempt are the kernel's threads that belong to their CPU, and the kernel's threads younger than `since` (clock
    ticks since boot): kthreadd starts every thread on all housekeeping CPUs (kernel/kthread.c), whatever cpusets say.
    Without partitions all of the kernel's threads are: they are in the root's group, which has all CPUs.
    """
    wanted, allowed = frozenset(cpus), frozenset(but)
    since = since if mechanism() == "partition" else -1
    return [
        thread
        for thread in threads()
        if thread.cpus & wanted
        and thread.tid not in allowed
        and not thread.belongs_to_its_cpu
        and not (thread.of_kernel and thread.born > since)
    ]


def traces() -> list[str]:
    """What VMs have left on this host, as sentences; none on a host that never had one."""
    found = [f"the scope {name} is still there" for name in sorted(scopes())]
    found += [f"the record {name} is still there" for name in sorted(records())]
    found += [f"{path} still claims CPUs {sorted(cpus)}" for path, cpus in sorted(exclusive().items())]
    if cpus := isolated():
        found.append(f"CPUs {sorted(cpus)} are still isolated")
    if mechanism() == "pool":
        confined = {group.name: effective(group) for group in groups() if effective(group) not in (online(), set())}
        found += [f"{name} may use CPUs {sorted(cpus)} only" for name, cpus in sorted(confined.items())]
    if legacy.OURS.exists():
        found.append("our cpusets are still there")
    if MEMORY.exists():
        found.append("what the groups of the host were like is still remembered")
    if cpus_of(1) != online():
        found.append(f"PID 1 may run on {sorted(cpus_of(1))} only")
    if running := processes("qemu-system-x86_64"):
        found.append(f"QEMU still runs: {running}")
    if rt := realtime_threads():
        found.append(f"threads {sorted(rt)} still are real-time")
    return found


def wait_for(what: str, holds: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Return when `holds()` is true; AssertionError, naming `what`, when it never becomes so.

    A look that takes long is taken less often: an emulated host has one CPU's time for it and for what is waited for.
    """
    end = time.monotonic() + seconds
    while True:
        began = time.monotonic()
        if holds():
            return
        now = time.monotonic()
        assert now < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(max(0.1, now - began))


def wait_until_as_before(hurry: Callable[[], None] = lambda: None) -> None:
    """Return when nothing of any VM is left on the host; AssertionError with what is left otherwise.

    `hurry` is called before each look at it while there are records.
    """
    end = time.monotonic() + PATIENCE
    while True:
        if records():
            hurry()
        if not (left := traces()):
            return
        assert time.monotonic() < end, f"after {PATIENCE:.0f} s: {'; '.join(left)}"
        time.sleep(0.3)
