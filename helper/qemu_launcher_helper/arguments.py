"""Wire values become frozen requests here, once; everything further in works on these.

Pure. Refuses wrong shapes and ranges (InvalidArguments) and numbers that can be no thread of a VM (TargetRefused).
The values come from the bus, whose daemon may or may not have checked them against the signature, so nothing is taken
for granted, not even their number.
"""

from collections.abc import Callable, Sequence
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
    pid: int
    vm: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Pin:
    tid: int
    cpus: frozenset[int]
    shielded: bool


@dataclass(frozen=True, slots=True)
class PinRequest:
    pid: int
    vm: str
    pins: tuple[Pin, ...]
    others: frozenset[int]


@dataclass(frozen=True, slots=True)
class SchedulerRequest:
    pid: int
    vm: str
    tids: tuple[int, ...]
    policy: str
    priority: int


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    uid: int
    vm: str


@dataclass(frozen=True, slots=True)
class ListRequest:
    all: bool


@dataclass(frozen=True, slots=True)
class LimitsRequest:
    pass


Request = MemlockRequest | PinRequest | SchedulerRequest | ReleaseRequest | ListRequest | LimitsRequest


def parse(member: str, body: Sequence[Any]) -> Request:
    """Return the request of a call of `member`, which must be in the table of contract.

    Raises InvalidArguments for a wrong number, type or range, TargetRefused for a PID or TID that no VM can have.
    """
    try:
        return _PARSERS[member](*body)
    except TypeError as err:
        raise InvalidArguments("The arguments do not have the number or the types that the method takes") from err


def _memlock(pid: object, vm: object, wanted: object) -> MemlockRequest:
    return MemlockRequest(_task(pid, "process"), _vm(vm), _integer(wanted, "bytes", 1, INFINITY))


def _pin(pid: object, vm: object, pins: object, others: object) -> PinRequest:
    parsed = tuple(_one_pin(*_array(pin, "pin", 3)) for pin in _array(pins, "pins", MAX_TIDS))
    if not parsed:
        raise InvalidArguments("The list of pins is empty")
    _distinct([pin.tid for pin in parsed], "pins")
    return PinRequest(_task(pid, "process"), _vm(vm), parsed, _cpus(others))


def _one_pin(tid: object, cpus: object, shielded: object) -> Pin:
    if not (parsed := _cpus(cpus)):
        raise InvalidArguments("A pin names no CPU")
    return Pin(_task(tid, "thread"), parsed, _boolean(shielded))


def _scheduler(pid: object, vm: object, tids: object, policy: object, priority: object) -> SchedulerRequest:
    if not isinstance(policy, str) or policy not in POLICIES:
        raise InvalidArguments(f"The policy is none of {', '.join(POLICIES)}")
    lowest, highest = (1, MAX_PRIORITY) if policy in REALTIME_POLICIES else (0, 0)
    level = _integer(priority, f"priority of policy {policy}", lowest, highest)
    parsed = tuple(_task(tid, "thread") for tid in _array(tids, "tids", MAX_TIDS))
    if not parsed:
        raise InvalidArguments("The list of tids is empty")
    _distinct(parsed, "tids")
    return SchedulerRequest(_task(pid, "process"), _vm(vm), parsed, policy, level)


def _release(uid: object, vm: object) -> ReleaseRequest:
    # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2).
    return ReleaseRequest(_integer(uid, "uid", 0, 2**32 - 2), _vm(vm))


def _list(everybody: object) -> ListRequest:
    return ListRequest(_boolean(everybody))


_PARSERS: dict[str, Callable[..., Request]] = {
    "SetMemlock": _memlock,
    "PinThreads": _pin,
    "SetScheduler": _scheduler,
    "Release": _release,
    "ListVms": _list,
    "GetLimits": LimitsRequest,
}


def _integer(value: object, what: str, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:  # a bool is an int to isinstance
        raise InvalidArguments(f"The {what} is not a number from {lowest} to {highest}")
    return value


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise InvalidArguments("A truth value is neither true nor false")
    return value


def _task(value: object, what: str) -> int:
    if type(value) is not int or not MIN_PID <= value <= MAX_PID:
        raise TargetRefused(f"The number of the {what} is not from {MIN_PID} to {MAX_PID}")
    return value


def _vm(value: object) -> str:
    if not isinstance(value, str) or not VM_NAME.fullmatch(value):
        raise InvalidArguments("The VM's name is not one to 48 of A-Z a-z 0-9 _ -, beginning with a letter or digit")
    return value


def _array(value: object, what: str, longest: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) > longest:
        raise InvalidArguments(f"The list of {what} is longer than {longest}, or no list")
    return value


def _cpus(value: object) -> frozenset[int]:
    numbers = [_integer(cpu, "number of a CPU", 0, MAX_CPUS - 1) for cpu in _array(value, "CPUs", MAX_CPUS)]
    _distinct(numbers, "CPUs")
    return frozenset(numbers)


def _distinct(numbers: Sequence[int], what: str) -> None:
    if len(set(numbers)) != len(numbers):
        raise InvalidArguments(f"The list of {what} names something twice")
