"""Wire values become checked keyword arguments here, once; everything further in works on these.

Pure. Refuses wrong numbers and ranges (InvalidArguments) and numbers that can be no thread of a VM (TargetRefused).
The types are right already: `bus` has parsed the bytes by the signature in the table, and by no other. Their number
may not be, as a body can be empty whatever its signature.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from .contract import INFINITY, MAX_CPUS, MAX_PID, MAX_PRIORITY, MAX_TIDS, MIN_PID, POLICIES, REALTIME_POLICIES, VM_NAME
from .errors import InvalidArguments, Refusal, TargetRefused


class Caller(NamedTuple):
    """Who sent a call, as the bus says: unique name, uid, pid, and the uid's name (or "uid 1000" if it has none)."""

    sender: str
    uid: int
    pid: int
    user: str


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
            case "SetMemlock", [pid, vm, amount]:
                return {"pid": _task(pid), "vm": _vm(vm), "bytes": _within(amount, "number of bytes", 1, INFINITY)}
            case "PinThreads", [pid, vm, pins, others]:
                return {"pid": _task(pid), "vm": _vm(vm), "pins": _pins(pins), "others": _cpus(others)}
            case "SetScheduler", [pid, vm, tids, policy, priority] if policy in POLICIES:
                levels = (1, MAX_PRIORITY) if policy in REALTIME_POLICIES else (0, 0)
                _within(priority, f"priority of policy {policy}", *levels)
                return {"pid": _task(pid), "vm": _vm(vm), "tids": _tids(tids), "policy": policy, "priority": priority}
            case "Release", [uid, vm]:  # 2^32 - 1 is "no change" to the kernel, never a user: setresuid(2)
                return {"uid": _within(uid, "uid", 0, 2**32 - 2), "vm": _vm(vm)}
            case "ListVms", [bool() as everybody]:
                return {"everybody": everybody}
            case "GetLimits", []:
                return {}
    raise InvalidArguments(f"The arguments are not among those that {member} takes")


def _within(value: int, what: str, lowest: int, highest: int, refusal: type[Refusal] = InvalidArguments) -> int:
    if not lowest <= value <= highest:
        raise refusal(f"The {what} is not from {lowest} to {highest}")
    return value


def _task(value: int) -> int:
    return _within(value, "number of a process or thread", MIN_PID, MAX_PID, TargetRefused)


def _tids(values: list[int]) -> tuple[int, ...]:
    _within(len(values), "number of threads", 1, MAX_TIDS)
    if len(set(values)) < len(values):
        raise InvalidArguments("A thread is named twice")
    return tuple(map(_task, values))


def _pins(values: list[Any]) -> tuple[Pin, ...]:
    _tids([tid for tid, _, _ in values])
    if not all(cpus for _, cpus, _ in values):
        raise InvalidArguments("A pin has no CPU")
    return tuple(Pin(tid, _cpus(cpus), shielded) for tid, cpus, shielded in values)


def _cpus(values: list[int]) -> frozenset[int]:
    return frozenset(_within(cpu, "number of a CPU", 0, MAX_CPUS - 1) for cpu in values)


def _vm(value: str) -> str:
    if not VM_NAME.fullmatch(value):
        raise InvalidArguments("The VM's name is not 1 to 48 of A-Z a-z 0-9 _ -, beginning with a letter or digit")
    return value
