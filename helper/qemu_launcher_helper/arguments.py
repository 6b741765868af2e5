"""Wire values become frozen requests here, once; everything further in works on these.

Pure. Refuses wrong shapes and ranges (InvalidArguments) and numbers that can be no thread of a VM (TargetRefused).
The values come from a bus whose daemon may or may not have checked the body against its signature (dbus-daemon does,
dbus-broker does not), so nothing is taken for granted, not even their number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .contract import INFINITY, MAX_CPUS, MAX_PID, MAX_PRIORITY, MAX_TIDS, MIN_PID, POLICIES, REALTIME_POLICIES, VM_NAME
from .errors import InvalidArguments, TargetRefused


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a call, as the bus says: unique name, uid, pid, and the uid's name (or "uid 1000" if it has none)."""

    sender: str
    uid: int
    pid: int
    user: str


@dataclass(frozen=True, slots=True)
class Typed:
    """A value in a D-Bus variant of our own making; `bus` turns it into what the library wants."""

    signature: str
    value: Any


@dataclass(frozen=True, slots=True)
class MemlockRequest:
    """SetMemlock. bytes: INFINITY asks for as much as the caller may have."""

    pid: int
    vm: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Pin:
    """One thread, the host CPUs it may use (at least one), and whether these are to be its VM's alone."""

    tid: int
    cpus: frozenset[int]
    shielded: bool


@dataclass(frozen=True, slots=True)
class PinRequest:
    """PinThreads: the complete wanted map, 1 to MAX_TIDS pins. others: empty means all CPUs that nobody shields."""

    pid: int
    vm: str
    pins: tuple[Pin, ...]
    others: frozenset[int]


@dataclass(frozen=True, slots=True)
class SchedulerRequest:
    """SetScheduler: 1 to MAX_TIDS threads. priority: 1..99 for fifo and rr, 0 for the others."""

    pid: int
    vm: str
    tids: tuple[int, ...]
    policy: str
    priority: int


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """Release a VM of user `uid`."""

    uid: int
    vm: str


@dataclass(frozen=True, slots=True)
class ListRequest:
    """ListVms: the caller's own, or everybody's."""

    all: bool


@dataclass(frozen=True, slots=True)
class LimitsRequest:
    """GetLimits, of the caller."""


Request = MemlockRequest | PinRequest | SchedulerRequest | ReleaseRequest | ListRequest | LimitsRequest


def parse(member: str, body: Sequence[Any]) -> Request:
    """Return the request of a call of `member`.

    Raises InvalidArguments for a wrong number, type or range, TargetRefused for a PID or TID that no VM can have.
    """
    match member, body:
        case "SetMemlock", [pid, vm, wanted]:
            return MemlockRequest(_task(pid), _vm(vm), _integer(wanted, "number of bytes", 1, INFINITY))
        case "PinThreads", [pid, vm, [_, *_] as pins, others] if len(pins) <= MAX_TIDS:
            parsed = tuple(_pin(pin) for pin in pins)
            _distinct([pin.tid for pin in parsed])
            return PinRequest(_task(pid), _vm(vm), parsed, _cpus(others))
        case "SetScheduler", [pid, vm, [_, *_] as tids, policy, priority] if len(tids) <= MAX_TIDS:
            if policy not in POLICIES:
                raise InvalidArguments(f"The policy is none of {', '.join(POLICIES)}")
            lowest, highest = (1, MAX_PRIORITY) if policy in REALTIME_POLICIES else (0, 0)
            level = _integer(priority, f"priority of policy {policy}", lowest, highest)
            return SchedulerRequest(_task(pid), _vm(vm), tuple(_distinct([_task(tid) for tid in tids])), policy, level)
        case "Release", [uid, vm]:  # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2)
            return ReleaseRequest(_integer(uid, "uid", 0, 2**32 - 2), _vm(vm))
        case "ListVms", [bool() as everybody]:
            return ListRequest(everybody)
        case "GetLimits", []:
            return LimitsRequest()
    raise InvalidArguments(f"The arguments are not such as {member} takes")


def _pin(value: object) -> Pin:
    match value:
        case [tid, [_, *_] as cpus, bool() as shielded]:
            return Pin(_task(tid), _cpus(cpus), shielded)
    raise InvalidArguments("A pin is not a thread, at least one CPU, and whether to shield it")


def _cpus(value: object) -> frozenset[int]:
    numbers = value if isinstance(value, list) else [None]
    return frozenset(_distinct([_integer(cpu, "number of a CPU", 0, MAX_CPUS - 1) for cpu in numbers]))


def _distinct(numbers: list[int]) -> list[int]:
    if len(set(numbers)) != len(numbers):
        raise InvalidArguments("One of the numbers in a list is there twice")
    return numbers


def _integer(value: object, what: str, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:  # a bool is an int to isinstance
        raise InvalidArguments(f"The {what} is not from {lowest} to {highest}")
    return value


def _task(value: object) -> int:
    if type(value) is not int or not MIN_PID <= value <= MAX_PID:
        raise TargetRefused(f"The number of a process or thread is not from {MIN_PID} to {MAX_PID}")
    return value


def _vm(value: object) -> str:
    if not isinstance(value, str) or not VM_NAME.fullmatch(value):
        raise InvalidArguments("The VM's name is not 1 to 48 of A-Z a-z 0-9 _ -, beginning with a letter or digit")
    return value
