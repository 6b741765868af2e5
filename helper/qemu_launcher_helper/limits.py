"""How much each user may have: built-in defaults, and /etc/qemu-launcher/helper.toml where an administrator wrote one.

The file is read afresh for every call. Refuses a file that somebody other than root could have written, and anything
in it that it does not understand to the last key: then all but Release is refused (Failed), because a limit that was
meant and not kept is worse than no service. The path is a constant; only tests pass another.

The rest is arithmetic over the host's topology and memory, which it reads itself, live records and one user's limits.
Guarantees, whatever the sequence of claims: live shields are disjoint, consist of whole SMT cores, leave at least
one whole core to the host, and CPUs, VMs and lockable memory stay within the limits of each uid. Refuses with Conflict
or LimitExceeded, naming who holds what and what is free instead.

rlimits are per process and inherited, so memlock bounds each QEMU, and by the records the sum of what was granted;
children that QEMU forks are bounded only by MemoryMax= on the user's slice (qemu-launcher-helper(8) says so).
"""

import grp
import logging
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from . import contract
from .contract import Conflict, Failed, InvalidArguments, LimitExceeded, TargetRefused
from .cpuset.cpulist import cpulist, parse_cpulist
from .records import Record

# A hundred entries fit many times; a device or a runaway file does not.
PATH, MAX_FILE_BYTES = "/etc/qemu-launcher/helper.toml", 64 * 1024
# What one user's VMs can never lock together.
HOST_BYTES, HOST_PERCENT = 2 << 30, 10
Cpus = frozenset[int]
# The host's cores, lowest first; each is the set of its online SMT siblings.
Cores = Sequence[Cpus]
# What the kernel shows for a user it cannot name, proc_sys_kernel(5): such a caller could be anybody.
OVERFLOW_UID = int(Path("/proc/sys/kernel/overflowuid").read_text())
CPU, RT_RUNTIME = Path("/sys/devices/system/cpu"), Path("/proc/sys/kernel/sched_rt_runtime_us")
# How many files are open on the host, and how many may be (fs.file-max): proc_sys_fs(5).
FILES = Path("/proc/sys/fs/file-nr")


class Limits(NamedTuple):
    """What a user may have; one [[limits]] entry of the file.

    cpus: None means every CPU; max_cpus: None means no number of its own; the housekeeping core stays in both cases.
    memlock: bytes per user; None means the host's rule alone (MemTotal less max(2 GiB, 10 %)); INFINITY if written.
    realtime: "shielded" (fifo and rr only on shielded CPUs of the VM) or "anywhere". source: who decided all this.
    deadline: always no: the kernel refuses it to threads in a partition (EPERM), and admits it for all users as one.
    users, groups: whom the entry is for; both empty means everybody.
    """

    cpus: frozenset[int] | None = None
    max_cpus: int | None = None
    max_vms: int = 8
    memlock: int | None = None
    policies: frozenset[str] = frozenset(contract.POLICIES)
    max_priority: int = 10
    realtime: str = "shielded"
    deadline: bool = False
    source: str = "the built-in defaults"
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class Settings(NamedTuple):
    """The whole file. comm: patterns of process names that may be tuned (fnmatch; it catches mistakes and is no
    boundary). services: system services whose processes may be targets, for example "my-vm.service". cpuset_mount:
    where to mount cpusets of cgroup v1 on a host without systemd that has none; "" for nowhere.
    """

    entries: tuple[Limits, ...] = ()
    comm: tuple[str, ...] = ("qemu-system-*", "qemu-kvm", "kvm", ".qemu-system-*")
    services: tuple[str, ...] = ()
    cpuset_mount: str = ""

    def limits_for(self, uid: int) -> Limits:
        """Return the first entry that names the user or one of his groups, or everybody; else the defaults.

        Failed while the host's table of open files is nearly full. When it is full, as any user can make it, no name is
        found, without an error, and who has an entry of his own would be everybody; to fill its last tenth takes longer
        than to look a name up.
        """
        opened, _, most = map(int, FILES.read_text().split()) if self.entries else (0, 0, 0)
        if opened > most * 9 // 10:
            raise Failed("Too many files are open on this host to be sure who is in which group: try again later")
        name, gids = "", set[int | None]()  # a uid without a name is only ever everybody
        with suppress(KeyError):
            name, gids = (user := pwd.getpwuid(uid)).pw_name, {*os.getgrouplist(user.pw_name, user.pw_gid)}
        his = (e for e in self.entries if not e.users + e.groups or name in e.users or gids & {*map(_number, e.groups)})
        return next(his, Limits())


def _number(name: str, *, user: bool = False) -> int | None:
    with suppress(KeyError):
        return pwd.getpwnam(name).pw_uid if user else grp.getgrnam(name).gr_gid
    return None


def check(path: str | None = None) -> int:
    """Say what an administrator has to know of the file; return the exit status, 1 if he has to do something."""
    with suppress(Failed):  # then it has been said why
        entries = load(path).entries
        unknown = [name for entry in entries for name in entry.users if _number(name, user=True) is None]
        unknown += [name for entry in entries for name in entry.groups if _number(name) is None]
        for name in unknown:
            logging.error("%s names %a, whom this host does not know", path or PATH, name)
        there = os.path.lexists(path or PATH)
        found = f"is understood: {len(entries)} [[limits]]" if there else "is not there: the defaults are everybody's"
        logging.info("%s %s", path or PATH, found)
        return int(bool(unknown) or (not there and path is not None))
    return 1


def account(uid: int) -> tuple[str, int]:
    """Return the account's name and uid; "uid 1000" when it has none, or one that would not be plain text for a person.

    The uid is OVERFLOW_UID when there is no account.
    """
    name, known = "", OVERFLOW_UID
    with suppress(KeyError):
        name, _, known, *_ = pwd.getpwuid(uid)
    # For polkit dialogs and log lines: no markup, no second line, no terminal escape can be made of it.
    return name if re.fullmatch(r"[A-Za-z0-9 ,._-]{1,64}", name) else f"uid {uid}", known


def load(path: str | None = None) -> Settings:
    """Return the settings as the file has them now; Failed while it is broken or unsafe, as no half of it counts."""
    path = path or PATH
    try:
        # O_NONBLOCK: a FIFO in this place must not hold the helper up before it is refused.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            mode, uid, size = (info := os.fstat(file.fileno())).st_mode, info.st_uid, info.st_size
            if not stat.S_ISREG(mode) or uid != 0 or mode & (stat.S_IWGRP | stat.S_IWOTH) or size > MAX_FILE_BYTES:
                raise ValueError(f"{size} bytes, mode {mode:o}, uid {uid}: not a file of 64 KiB that root alone writes")
            document = tomllib.load(file)
        tables = [(f"[[limits]] entry {number}", table) for number, table in enumerate(document.pop("limits", []), 1)]
        entries = [Limits(source=f"{path}, {place}", **_values(table, Limits, place)) for place, table in tables]
        if not all(entry.users or entry.groups for entry in entries[:-1]):
            raise ValueError("only the last [[limits]] entry may be without users and groups")
        return Settings(entries=tuple(entries), **_values(document, Settings, "top level"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as err:  # the last: quite another shape
        why = getattr(err, "strerror", err if isinstance(err, ValueError) else "write [[limits]], in two brackets")
        logging.critical("nobody is served, %s is not understood: %a", path, str(why))
        raise Failed("helper.toml is broken, nobody is served: sudo qemu-launcher-helper --check says why") from err


# By key: the type of its value, and the form of the value or, in a list, of each item, which then are texts; in words.
_FORMS: dict[str, tuple[type, str, str]] = {
    "comm": (list, r"[A-Za-z0-9 ._*?-]{1,64}", 'a list of patterns, as ["qemu-system-*"]'),
    "services": (list, r"[A-Za-z0-9:_.@-]{1,200}\.service", 'a list, as ["my-vm.service"]'),
    "cpuset_mount": (str, r"/(run|sys/fs/cgroup)/[A-Za-z0-9_-]{1,64}", 'a folder in /run, as "/run/cpuset"'),
    "users": (list, r"[^\s:,\0]{1,64}", 'a list of names, as ["alice"]'),
    "groups": (list, r"[^\s:,\0]{1,64}", 'a list of names, as ["students"]'),
    "cpus": (str, r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", 'a text, as "8-15,24"'),
    "max_cpus": (int, r"[0-9]{1,4}", "a number, 0 to 9999"),
    "max_vms": (int, r"[0-9]{1,3}", "a number, 0 to 999"),  # not more: the records are read at every call
    "memlock": (str, r"infinity|[1-9][0-9]{0,5}[KMGT]", 'a text, as "512M", "16G" or "infinity"'),
    "policies": (list, "|".join(contract.POLICIES), f"a list of some of {', '.join(contract.POLICIES)}"),
    "max_priority": (int, r"[0-9]{1,2}", "a number, 0 to 99"),
    "realtime": (str, r"shielded|anywhere", '"shielded" or "anywhere"'),
    "deadline": (bool, "False", "false"),
}


def _bytes(text: str) -> int:
    return contract.INFINITY if text == "infinity" else int(text[:-1]) << 10 * ("KMGT".index(text[-1]) + 1)


_CONVERT: dict[str, Callable[[Any], Any]] = {"cpus": parse_cpulist, "memlock": _bytes, "policies": frozenset}


def _values(table: Mapping[str, Any], of: type[Limits | Settings], place: str) -> dict[str, Any]:
    values, known = {}, [key for key in _FORMS if key in of._fields]
    for key, value in table.items():
        kind, form, words = _FORMS[key] if key in known else (type(None), "", f"not there, but {', '.join(known)}")
        each, one = (value, str) if kind is list else ([value], kind)
        # type(), as to isinstance a bool is an int
        if type(value) is not kind or not each or not all(type(x) is one and re.fullmatch(form, str(x)) for x in each):
            raise ValueError(f"{place}: {key} = {value!r}: {key} is {words}")
        values[key] = _CONVERT.get(key, tuple if kind is list else kind)(value)
    return values


def union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """Return the union of `sets`."""
    return frozenset[int]().union(*sets)


def read_cores() -> Cores:
    """Read the host's online cores from /sys (sysfs-devices-system-cpu)."""
    online = parse_cpulist((CPU / "online").read_text())
    siblings = {parse_cpulist((CPU / f"cpu{n}/topology/thread_siblings_list").read_text()) & online for n in online}
    return sorted(siblings, key=min)


def free_for(limits: Limits, cores: Sequence[Cpus], records: Iterable[Record]) -> frozenset[int]:
    """Return the CPUs that a new shield within `limits` could take, one core at least left to the host."""
    live = [record for record in records if not record.stray]
    gone, taken = union(record.shielded for record in live), union(record.cpus for record in live)
    free = [core for core in cores if core.isdisjoint(taken) and (limits.cpus is None or core <= limits.cpus)]
    usable = _usable(cores, gone)
    return union(core for core in free if usable and ({*usable} - {*free} or core != usable[0]))


def _usable(cores: Cores, gone: Cpus) -> list[Cpus]:
    """Return what the host's tasks have when the CPUs in `gone` are; isolcpus= has taken some from the scheduler."""
    isolated = parse_cpulist((CPU / "isolated").read_text())
    return [core for core in cores if core.isdisjoint(gone) and not core <= isolated]


def check_cpus(claim: Record, emulator: Cpus, limits: Limits, cores: Cores, records: Iterable[Record]) -> Record:
    """Return what a VM gets that asks for claim.shielded, claim.pinned, and `emulator` for its other threads.

    That is `claim`, shielded in whole cores. Raises InvalidArguments, LimitExceeded or Conflict when it may not be.
    """
    others = [record for record in records if record.key != claim.key]
    shared = claim.pinned | emulator
    shield = union(core for core in cores if core & claim.shielded)
    if missing := (claim.shielded | shared) - union(cores):
        raise InvalidArguments(f"CPUs {cpulist(missing)} do not exist or are offline")
    if overlap := shield & shared:
        raise InvalidArguments(f"CPUs {cpulist(overlap)} are asked for both shielded and shared")
    free = f"; free for you: {cpulist(free_for(limits, cores, others)) or 'none'}"
    if limits.cpus is not None and (alien := (shield | shared) - limits.cpus):
        raise LimitExceeded(f"CPUs {cpulist(alien)} are not among your {cpulist(limits.cpus)} ({limits.source}){free}")
    used = shield.union(*(record.cpus for record in (claim, *others) if record.uid == claim.uid))
    if limits.max_cpus is not None and len(used) > limits.max_cpus:
        raise LimitExceeded(f"Your VMs would hold {len(used)} CPUs, and may hold {limits.max_cpus} ({limits.source})")
    live = [record for record in others if not record.stray]
    for record in live:
        if overlap := shield & record.cpus | shared & record.shielded:
            raise Conflict(f"CPUs {cpulist(overlap)} are held by VM {record.vm} of {account(record.uid)[0]}{free}")
    gone = shield.union(*(record.shielded for record in live))
    if shield and not _usable(cores, gone):
        raise LimitExceeded(f"CPUs {cpulist(gone)}: at least one whole core must stay with the host{free}")
    return claim._replace(shielded=shield)


def lockable_bytes() -> int:
    """Return MemTotal less what the host keeps, in bytes (sysconf(3))."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, total - max(HOST_BYTES, total * HOST_PERCENT // 100))


def grant_memlock(asked: int, own: Record, limits: Limits, records: Iterable[Record], lockable: int) -> int:
    """Return how many of the `asked` bytes the VM `own` may lock; INFINITY only where the administrator wrote it.

    Never less than it may already: what it has locked stays locked under a lower limit, and goes on to count.
    LimitExceeded when nothing is left. `lockable`: lockable_bytes().
    """
    if limits.memlock == contract.INFINITY:
        return max(asked, own.memlock)
    held = sum(record.memlock for record in records if record.uid == own.uid and record.key != own.key)
    most = lockable if limits.memlock is None else min(limits.memlock, lockable)
    if most <= held:
        rule = f"{most} bytes ({'this host' if most == lockable else limits.source})"
        raise LimitExceeded(f"No memory is left to lock: your VMs hold {held} bytes of {rule}")
    return max(own.memlock, min(asked, most - held))


def check_policy(policy: str, priority: int, limits: Limits, tids: Iterable[int], shielded: Mapping[int, Cpus]) -> None:
    """Refuse (LimitExceeded, TargetRefused, Unsupported) a policy and priority that this caller may not set.

    `tids`: all threads of the VM that would then have real time. `shielded`: the CPUs of each thread that is pinned
    inside the VM's shield, as the kernel has them.
    """
    if policy not in limits.policies:
        raise LimitExceeded(f"Policy {policy} is none of yours, {', '.join(sorted(limits.policies))} ({limits.source})")
    if priority > limits.max_priority:
        raise LimitExceeded(f"Priority {priority} is above yours, {limits.max_priority} ({limits.source})")
    if policy in contract.REALTIME_POLICIES and int(RT_RUNTIME.read_text()) == -1:
        raise contract.Unsupported("kernel.sched_rt_runtime_us is -1: nothing would stop a real-time thread")
    if policy not in contract.REALTIME_POLICIES or limits.realtime == "anywhere":
        return
    places = [shielded.get(tid, frozenset()) for tid in tids]
    if any(len(cpus) != 1 for cpus in places):
        raise TargetRefused("Real time needs every thread to be pinned to one shielded CPU of its own")
    if len(used := union(places)) < len(places):
        raise TargetRefused("Real time for two threads on one CPU would hang the guest")
    if 0 in used:
        raise LimitExceeded(f'Real time on CPU 0 needs realtime = "anywhere" ({limits.source})')
