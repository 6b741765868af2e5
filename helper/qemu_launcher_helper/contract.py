"""The wire: what exists on it, what may be asked, what is refused, and every limit that does not depend on the user.

dbus/org.qemulauncher.Helper1.xml is authoritative; tests/contract compares this table with it, with the launcher's
own copy, with polkit's actions and with the bus policy.

Pure. `parse` turns wire values into checked keyword arguments, once; everything further in works on these. The types
are right already: `bus` has parsed the bytes by the signature in the table, and by no other. Their number may not be,
as a body can be empty whatever its signature.

    Exception
    |-- Refusal                 the caller gets `wire_name` and str(error), nothing more
    |   |-- NotAuthorized       polkit, or the caller's identity, says no
    |   |-- TargetRefused       the process or thread is not the caller's to tune
    |   |-- LimitExceeded       more than this user may have
    |   |-- Conflict            somebody else holds it
    |   |-- Unsupported         this host cannot do it
    |   |-- Failed              our fault, or the administrator's; the journal knows more
    |   |-- InvalidArguments    shape or range of a wire value
    |   `-- UnknownMethod       not in the table, so it does not exist
    `-- CallFailed              a D-Bus call of ours failed; never goes on the wire as it is

Texts of refusals are complete sentences for the user without the full stop, made of fixed words, numbers and
validated names. Those that others have chosen, of processes and cpusets, go through ascii(); nothing else is theirs.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

VERSION = "0.1.0"
BUS_NAME = INTERFACE = "org.qemulauncher.Helper1"
OBJECT_PATH = "/org/qemulauncher/Helper1"

MANAGE_OTHERS = "org.qemulauncher.manage-others"

# By member: signature of the arguments, signature of the answer, polkit action (None: needs none), and the method of
# operations.Operation that serves it. MANAGE_OTHERS is asked only about requests that reach beyond one's own VMs.
METHODS = {
    "SetMemlock": ("ust", "t", "org.qemulauncher.set-memlock", "set_memlock"),
    "PinThreads": ("usa(uaub)au", "", "org.qemulauncher.pin-threads", "pin_threads"),
    "SetScheduler": ("usausu", "", "org.qemulauncher.set-scheduler", "set_scheduler"),
    "CheckMemlock": ("st", "t", "org.qemulauncher.set-memlock", "check_memlock"),
    "CheckPins": ("sa(uaub)au", "", "org.qemulauncher.pin-threads", "check_pins"),
    "CheckScheduler": ("sa(uaub)su", "", "org.qemulauncher.set-scheduler", "check_scheduler"),
    "Release": ("us", "", MANAGE_OTHERS, "release"),
    "ListVms": ("b", "a(susutss)", MANAGE_OTHERS, "list_vms"),
    "GetLimits": ("", "a{sv}", None, "get_limits"),
    "GetLimitsOf": ("u", "a{sv}", MANAGE_OTHERS, "get_limits"),
}

# Of the audit trail in the journal: what was granted, refused, released.
MESSAGE_ID = "5f3c8a1d9e674b0fb2d84c7a61e90f35"

# "As much as I may have", or "no limit": what RLIM_INFINITY is in 64 bits, setrlimit(2).
INFINITY = 2**64 - 1

# A VM name becomes part of a unit name, a file name, log lines and polkit details: it can do no harm in any of them.
VM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")

# The unit in which systemd keeps a VM's processes: uid and name of the VM.
SCOPE = "qemu-launcher-{}-{}.scope"

# sched(7). SCHED_DEADLINE is not among them: its admission control is global, one user could starve the host.
POLICIES = ("other", "batch", "idle", "fifo", "rr")
# Those with a static priority, and the kernel's range of it, from 1; what a user may have is in limits.py.
REALTIME_POLICIES, MAX_PRIORITY = ("fifo", "rr"), 99

# PID 1 is nobody's VM; PID_MAX_LIMIT, proc_pid_sys_kernel(5): 2^22 on 64-bit systems. Highest CPU number + 1: NR_CPUS
# of x86-64 with MAXSMP. Threads in one request: QEMU 10's largest machine has 4096 vCPUs, but no host of ours has more
# than 1024 CPUs to pin them to; 1024 pins make a message of 17 KiB.
MIN_PID, MAX_PID, MAX_CPUS, MAX_TIDS = 2, 2**22, 8192, 1024

# Largest message that is parsed at all, or kept until it is known whose it is; the largest sensible PinThreads fits.
MAX_MESSAGE_BYTES = 24 * 1024
# One launch makes four calls, one after the other. What is more than this is a mistake or an attack. The last: of all
# users together, whose largest messages then fit into the unit's MemoryMax=; one user's connections make 1024.
CALLS_IN_FLIGHT, CALLS_PER_WINDOW, WINDOW_SECONDS, MAX_CALLS = 4, 60, 20.0, 1536
# Calls of one user that wait for his one password dialog, and dialogs on the whole host: at 128 unanswered ones the
# bus would stop delivering our own calls (max_replies_per_connection, dbus-daemon(1)).
DIALOG_QUEUE, MAX_DIALOGS = 8, 8
# A person types a password; polkit's own agents give up after about as long. Any other call of ours: 25 s is what
# every D-Bus library waits by default (dbus_connection_send_with_reply).
DIALOG_SECONDS, CALL_SECONDS = 300.0, 25.0
# The bus itself answers at once, or not at all: in a flood it drops answers to us too. So it is asked who calls again.
DAEMON_SECONDS, IDENTIFY_TRIES = 10.0, 3
# A systemd job of ours moves one process into a scope: milliseconds, unless the host is in deep trouble, or the
# caller's session is being stopped and resists. Only calls about this user wait. Between two looks at it, which cost
# systemd next to nothing; the same for a caller who may leave his dialog behind.
JOB_SECONDS, JOB_PAUSE, DIALOG_PAUSE = 30.0, 0.01, 1.0
# Long enough to serve a whole launch with one process, short enough that nothing of root's stays around.
IDLE_SECONDS = 15.0


class Refusal(Exception):  # noqa: N818  a refusal is the helper working, not an error of it
    """The caller does not get what he asked for."""

    wire_name: ClassVar[str]

    def __init_subclass__(cls, wire_name: str = "") -> None:
        cls.wire_name = wire_name or f"org.qemulauncher.Error.{cls.__name__}"


class NotAuthorized(Refusal):
    """org.qemulauncher.Error.NotAuthorized."""


class TargetRefused(Refusal):
    """org.qemulauncher.Error.TargetRefused."""


class LimitExceeded(Refusal):
    """org.qemulauncher.Error.LimitExceeded."""


class Conflict(Refusal):
    """org.qemulauncher.Error.Conflict."""


class Unsupported(Refusal):
    """org.qemulauncher.Error.Unsupported."""


class Failed(Refusal):
    """org.qemulauncher.Error.Failed."""


class InvalidArguments(Refusal, wire_name="org.freedesktop.DBus.Error.InvalidArgs"):
    """The bus's own name for this, so that every D-Bus tool knows it."""


class UnknownMethod(Refusal, wire_name="org.freedesktop.DBus.Error.UnknownMethod"):
    """The bus's own name for this."""


class CallFailed(Exception):  # noqa: N818  it names what happened to the call
    """A D-Bus call that the helper made came back as an error, as nonsense, or not at all.

    `name` is the D-Bus error name, or "timeout", "lost the bus", "unexpected". `text` may hold foreign words.
    """

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text = name, text


class Caller(NamedTuple):
    """Who sent a call, as the bus says: unique name, uid, pid, and the uid's name (or "uid 1000" if it has none).

    account: as which uid his calls are counted. That is one for all uids without an account: one user may have 65,536
    of them, subuid(5), and call as each.
    """

    sender: str
    uid: int
    pid: int
    user: str
    account: int


class Pin(NamedTuple):
    """One thread, the host CPUs it may use (at least one), and whether these are to be its VM's alone."""

    tid: int
    cpus: frozenset[int]
    shielded: bool


def parse(member: str, body: Sequence[Any]) -> dict[str, Any]:
    """Return the arguments, by name, of a call of `member`, whose body was parsed by the signature in METHODS.

    They are those of the method of operations.Operation that METHODS names. Units and ranges: bytes, 1 to INFINITY,
    which asks for as much as the caller may have; 1 to MAX_TIDS pins or tids, each thread once; others: empty means
    all CPUs that nobody shields; priority: 1 to MAX_PRIORITY for fifo and rr, 0 for the other policies.

    Raises InvalidArguments for a wrong number, shape or range, TargetRefused for a PID or TID that no VM can have.
    """
    with suppress(TypeError, ValueError):  # of values that no codec would give
        match member, body:
            case "CheckMemlock", [vm, amount]:
                return {"vm": _vm(vm), "bytes": _within(amount, "number of bytes", 1, INFINITY)}
            case "CheckPins", [vm, pins, others]:
                return {"vm": _vm(vm), "pins": _pins(pins), "others": _cpus(others)}
            case "CheckScheduler", [vm, pins, policy, priority] if policy in POLICIES:
                return {"vm": _vm(vm), "pins": _pins(pins)} | _scheduling(policy, priority)
            case ("SetMemlock", [pid, *rest]) | ("PinThreads", [pid, *rest]):
                return {"pid": _task(pid)} | parse("CheckMemlock" if member == "SetMemlock" else "CheckPins", rest)
            case "SetScheduler", [pid, vm, tids, policy, priority] if policy in POLICIES:
                return {"pid": _task(pid), "vm": _vm(vm), "tids": _tids(tids)} | _scheduling(policy, priority)
            case "Release", [uid, vm]:
                return parse("GetLimitsOf", [uid]) | {"vm": _vm(vm)}
            case "GetLimitsOf", [uid]:  # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2)
                return {"uid": _within(uid, "uid", 0, 2**32 - 2)}
            case "ListVms", [bool() as everybody]:
                return {"everybody": everybody}
            case "GetLimits", []:
                return {}
    raise InvalidArguments(f"The arguments are not among those that {member} takes")


def _within(value: int, what: str, lowest: int, highest: int, refusal: type[Refusal] = InvalidArguments) -> int:
    if not lowest <= value <= highest:
        raise refusal(f"The {what} is not from {lowest} to {highest}")
    return value


def _scheduling(policy: str, priority: int) -> dict[str, Any]:
    _within(priority, f"priority of policy {policy}", *((1, MAX_PRIORITY) if policy in REALTIME_POLICIES else (0, 0)))
    return {"policy": policy, "priority": priority}


def _task(value: int) -> int:
    return _within(value, "number of a process or thread", MIN_PID, MAX_PID, TargetRefused)


def _tids(values: list[int]) -> tuple[int, ...]:
    if not 1 <= len(values) == len(set(values)) <= MAX_TIDS:
        raise InvalidArguments(f"The threads are not 1 to {MAX_TIDS}, each named once")
    return tuple(map(_task, values))


def _pins(values: list[Any]) -> tuple[Pin, ...]:
    _tids([tid for tid, _, _ in values])
    return tuple(Pin(tid, _cpus(cpus, least=1), shielded) for tid, cpus, shielded in values)


def _cpus(values: list[int], least: int = 0) -> frozenset[int]:
    _within(len(values), "number of CPUs of a thread", least, MAX_CPUS)
    return frozenset(_within(cpu, "number of a CPU", 0, MAX_CPUS - 1) for cpu in values)


def _vm(value: str) -> str:
    if not VM_NAME.fullmatch(value):
        raise InvalidArguments("The VM's name is not 1 to 48 of A-Z a-z 0-9 _ -, beginning with a letter or digit")
    return value
