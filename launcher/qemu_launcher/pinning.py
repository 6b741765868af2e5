"""Where threads shall run: the values of vcpu_pinning, iothread_pinning and emulator_pinning, and their readers.

A set of host CPUs is written as a number, a range as the kernel writes it (`2-3`, `0-1,8`), or a list of these; one
form for all three keys. Nothing here looks at the host: a CPU that does not exist is refused later, by `host`.

Refused: an empty set, a CPU that is named twice in one set, a range that counts backwards, and more CPUs in all than a
definition can mean (aliases make much out of little).
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn

from . import yamlnode
from .cpulist import MAX_CPU, format_cpulist
from .errors import Mark
from .yamlnode import List, Map, Node, Scalar, describe, fail

MAX_UINT32 = (1 << 32) - 1
MAX_PINNED = 8192  # vCPUs; twice what any of QEMU's machines can have
MAX_NAMED = 1 << 20  # host CPUs in all sets of one key together: a thousand vCPUs on a thousand CPUs each
CPUS_HINT = "write a number such as 2, a range such as 2-5, or a list of these such as [2, 4-5]"

_PART = "(?:0|[1-9][0-9]{0,9})"  # no leading zeros: 010 is eight to some
_RANGES = re.compile(rf"{_PART}(?:-{_PART})?(?:,{_PART}(?:-{_PART})?)*")


class CpuSet(NamedTuple):
    """The host CPUs that a thread may run on, never empty; where the set was written, and each of its parts."""

    cpus: frozenset[int]
    mark: Mark
    parts: tuple[tuple[range, Mark], ...]

    def mark_of(self, cpus: frozenset[int]) -> Mark:
        """Where the first of `cpus` that is in this set was written."""
        return next((mark for part, mark in self.parts if not cpus.isdisjoint(part)), self.mark)


class Pinning(NamedTuple):
    """Which vCPU runs on which host CPUs: exactly one of the two forms is set, never empty.

    `topology`: (socket, core, thread) of the vCPU -> host CPUs. `by_index`: vCPU i runs on the i-th.
    """

    topology: Mapping[tuple[int, int, int], CpuSet] | None
    by_index: tuple[CpuSet, ...] | None
    mark: Mark

    @property
    def sets(self) -> tuple[CpuSet, ...]:
        """The CPUs of each vCPU, in the order of the file."""
        return tuple(self.topology.values()) if self.topology is not None else self.by_index or ()


class _Budget:
    """How many host CPUs a key may still name."""

    def __init__(self) -> None:
        self.left = MAX_NAMED

    def spend(self, node: Node, what: str, count: int) -> None:
        self.left -= count
        if self.left < 0:
            fail(node, f"up to here {what} names more than {MAX_NAMED} host CPUs")


def vcpu_pinning(node: Node, what: str) -> Pinning | None:
    """Either form of vcpu_pinning; None for a map that names no vCPU, which the original tool takes for no pinning."""
    budget = _Budget()
    if isinstance(node, List):
        if not node.items:
            fail(node, f"{what} is an empty list", "name a host CPU for each vCPU, or remove the key")
        if len(node.items) > MAX_PINNED:
            fail(node, f"{what} names more than {MAX_PINNED} vCPUs")
        sets = (_cpus(item, f"the host CPU of vCPU {i}", budget) for i, item in enumerate(node.items))
        return Pinning(None, tuple(sets), node.mark)
    if not isinstance(node, Map):
        fail(
            node,
            f"{what} must be a map or a list, not {describe(node)}",
            "write socket: {core: {thread: host CPU}}, or a list: [CPU of vCPU 0, CPU of vCPU 1, ...]",
        )
    topology = dict(_by_topology(node, what, budget))
    return Pinning(topology, None, node.mark) if topology else None


def emulator_pinning(node: Node, what: str) -> CpuSet:
    """The CPUs of all threads that no other key names."""
    return _cpus(node, what, _Budget())


def iothread_pinning(node: Node, what: str) -> Mapping[str, CpuSet] | None:
    """iothread id -> its CPUs; None for an empty map."""
    budget = _Budget()
    if not isinstance(node, Map):
        fail(node, f"{what} must be a map, not {describe(node)}", "write id of the iothread: host CPU")
    found = {
        yamlnode.string(key, f"an iothread's id in {what}"): _cpus(
            value, f"the host CPU of iothread {key.text!r}", budget
        )
        for key, value in node.pairs
    }
    return found or None


def _by_topology(node: Node, what: str, budget: _Budget) -> Iterator[tuple[tuple[int, int, int], CpuSet]]:
    seen = 0
    for socket, cores in _numbered(node, what, "socket"):
        for core, threads in _numbered(cores, f"socket {socket}", "core"):
            for thread, cpu in _numbered(threads, f"core {core} of socket {socket}", "thread"):
                seen += 1
                yield (socket, core, thread), _cpus(cpu, f"the host CPU of vCPU {socket}/{core}/{thread}", budget)
            seen += 1  # empty ones too: aliases can make a billion of them out of a small file
            if seen > MAX_PINNED:
                fail(node, f"{what} names more than {MAX_PINNED} vCPUs")


def _numbered(node: Node, what: str, key_name: str) -> Iterator[tuple[int, Node]]:
    for key, value in yamlnode.entries(node, what):
        yield yamlnode.integer(key, f"a {key_name} number in {what}", 0, MAX_UINT32), value


# Sets of host CPUs


def _cpus(node: Node, what: str, budget: _Budget) -> CpuSet:
    """A number, a range, or a list of these."""
    if isinstance(node, List) and not node.items:
        fail(node, f"{what} is an empty list", CPUS_HINT)
    cpus: set[int] = set()
    parts: list[tuple[range, Mark]] = []
    for item in node.items if isinstance(node, List) else (node,):
        for part in _ranges(item, what):
            budget.spend(item, what, len(part))
            if twice := cpus.intersection(part):
                fail(item, f"{what}: CPU {format_cpulist(twice)} is named twice", "name each CPU once")
            cpus.update(part)
            parts.append((part, item.mark))
    return CpuSet(frozenset(cpus), node.mark, tuple(parts))


def _ranges(node: Node, what: str) -> Iterator[range]:
    if isinstance(node, Scalar) and node.kind == "int":
        cpu = yamlnode.integer(node, what, 0, MAX_UINT32)
        yield range(cpu, cpu + 1)
        return
    if not isinstance(node, Scalar) or node.kind != "str" or not _RANGES.fullmatch(node.text):
        _no_cpus(node, what)
    for part in node.text.split(","):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if high < low:
            fail(node, f"{what}: the range {part} counts backwards", f"did you mean {high}-{low}?")
        if high > MAX_CPU:
            fail(node, f"{what}: {part} is out of range; no host has a CPU above {MAX_CPU}")
        yield range(low, high + 1)


def _no_cpus(node: Node, what: str) -> NoReturn:
    fail(node, f"{what} must be a number, a range or a list of these, not {describe(node)}", CPUS_HINT)
