"""Wire values become frozen requests here, once; everything further in works on these.

Pure. Refuses wrong numbers and ranges (InvalidArguments) and numbers that can be no thread of a VM (TargetRefused).
The types are right already: `bus` has parsed the bytes by the signature in the table, and by no other. Their number
may not be, as a body can be empty whatever its signature. NamedTuples are as frozen and slotted as dataclasses.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .contract import INFINITY, MAX_CPUS, MAX_PID, MAX_PRIORITY, MAX_TIDS, MIN_PID, POLICIES, REALTIME_POLICIES, VM_NAME
from .errors import InvalidArguments, TargetRefused


class Caller(NamedTuple):
    """Who sent a call, as the bus says: unique name, uid, pid, and the uid's name (or "uid 1000" if it has none)."""

    sender: str
    uid: int
    pid: int
    user: str


class Typed(NamedTuple):
    """A value in a D-Bus variant of our own making; `bus` turns it into what the library wants."""

    signature: str
    value: Any


class MemlockRequest(NamedTuple):
    """SetMemlock. bytes: INFINITY asks for as much as the caller may have."""

    pid: int
    vm: str
    bytes: int


class Pin(NamedTuple):
    """One thread, the host CPUs it may use (at least one), and whether these are to be its VM's alone."""

    tid: int
    cpus: frozenset[int]
    shielded: bool


class PinRequest(NamedTuple):
    """PinThreads: the complete wanted map, 1 to MAX_TIDS pins. others: empty means all CPUs that nobody shields."""

    pid: int
    vm: str
    pins: tuple[Pin, ...]
    others: frozenset[int]


class SchedulerRequest(NamedTuple):
    """SetScheduler: 1 to MAX_TIDS threads. priority: 1..99 for fifo and rr, 0 for the others."""

    pid: int
    vm: str
    tids: tuple[int, ...]
    policy: str
    priority: int


class ReleaseRequest(NamedTuple):
    """Release a VM of user `uid`."""

    uid: int
    vm: str


class ListRequest(NamedTuple):
    """ListVms: the caller's own, or everybody's."""

    all: bool


class LimitsRequest(NamedTuple):
    """GetLimits, of the caller."""


Request = MemlockRequest | PinRequest | SchedulerRequest | ReleaseRequest | ListRequest | LimitsRequest


def parse(member: str, body: Sequence[Any]) -> Request:
    """Return the request of a call of `member`, whose body was parsed by the signature in contract.METHODS.

    Raises InvalidArguments for a wrong number, shape or range, TargetRefused for a PID or TID that no VM can have.
    """
    try:
        match member, body:
            case "SetMemlock", [pid, vm, wanted]:
                return MemlockRequest(_task(pid), _vm(vm), _within(wanted, "number of bytes", 1, INFINITY))
            case "PinThreads", [pid, vm, pins, others]:
                parsed = tuple(Pin(_task(tid), _cpus(cpus), shielded) for tid, cpus, shielded in _some(pins, "pins"))
                if len({pin.tid for pin in parsed}) < len(parsed) or not all(pin.cpus for pin in parsed):
                    raise InvalidArguments("A pin has no CPU, or a thread has two pins")
                return PinRequest(_task(pid), _vm(vm), parsed, _cpus(others))
            case "SetScheduler", [pid, vm, tids, policy, priority] if policy in POLICIES:
                lowest, highest = (1, MAX_PRIORITY) if policy in REALTIME_POLICIES else (0, 0)
                level = _within(priority, f"priority of policy {policy}", lowest, highest)
                return SchedulerRequest(_task(pid), _vm(vm), tuple(map(_task, _some(tids, "tids"))), policy, level)
            case "Release", [uid, vm]:  # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2)
                return ReleaseRequest(_within(uid, "uid", 0, 2**32 - 2), _vm(vm))
            case "ListVms", [bool() as everybody]:
                return ListRequest(everybody)
            case "GetLimits", []:
                return LimitsRequest()
    except (TypeError, ValueError) as err:
        raise InvalidArguments(f"The arguments are malformed, {member} does not take such") from err
    raise InvalidArguments(f"The arguments are not among those that {member} takes")


def _within(value: int, what: str, lowest: int, highest: int) -> int:
    if not lowest <= value <= highest:
        raise InvalidArguments(f"The {what} is not from {lowest} to {highest}")
    return value


def _task(value: int) -> int:
    if not MIN_PID <= value <= MAX_PID:
        raise TargetRefused(f"The number of a process or thread is not from {MIN_PID} to {MAX_PID}")
    return value


def _vm(value: str) -> str:
    if not VM_NAME.fullmatch(value):
        raise InvalidArguments("The VM's name is not 1 to 48 of A-Z a-z 0-9 _ -, beginning with a letter or digit")
    return value


def _some(values: list[Any], what: str) -> list[Any]:
    _within(len(values), f"number of {what}", 1, MAX_TIDS)
    return values


def _cpus(values: list[int]) -> frozenset[int]:
    return frozenset(_within(cpu, "number of a CPU", 0, MAX_CPUS - 1) for cpu in values)
