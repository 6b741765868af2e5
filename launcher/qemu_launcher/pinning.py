"""Where threads shall run: the values of vcpu_pinning, iothread_pinning and emulator_pinning, and their readers.

A set of host CPUs is written as a number, a range as the kernel writes it (`2-3`, `0-1,8`), or a list of these; one
form for all three keys. Nothing here looks at the host: a CPU that does not exist is refused later, by `fitting`.

Refused: an empty set, a CPU that is named twice in one set, a range that counts backwards, and more CPUs in all than a
definition can mean (aliases make much out of little).
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple, NoReturn

from . import yamlnode
from .cpulist import MAX_CPU, format_cpulist
from .errors import Mark, did_you_mean, shortened
from .places import LEVELS, MAX_PINNED, Place, describe_place
from .yamlnode import List, Map, Node, Scalar, describe, fail, without_zeros

MAX_UINT32 = (1 << 32) - 1
MAX_NAMED = 1 << 20  # host CPUs in all sets of one key together: a thousand vCPUs on a thousand CPUs each
_REQUIRED = ("socket", "core", "thread")  # and what a number without a word before it stands for, in this order
CPUS_HINT = "write a number such as 2, a range such as 2-5, or a list of these such as [2, 4-5]"

_INNER = {"die": "dies", "cluster": "clusters", "module": "modules"}  # and their names in -smp
_ORDER = ", ".join(LEVELS)
_PART = "(?:0|[1-9][0-9]{0,99})"  # no leading zeros: 010 is eight to some
_LEVEL_KEY = re.compile(r"([A-Za-z]+) +([0-9]{1,10})")
_RANGE = f"{_PART}(?:-{_PART})?"
_ONE_RANGE, _RANGES = re.compile(_RANGE), re.compile(f"{_RANGE}(?:,{_RANGE})*")


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

    `topology`: place of the vCPU -> host CPUs. `by_index`: vCPU i runs on the i-th.
    """

    topology: Mapping[Place, CpuSet] | None
    by_index: tuple[CpuSet, ...] | None
    mark: Mark

    @property
    def sets(self) -> tuple[CpuSet, ...]:
        """The CPUs of each vCPU, in the order of the file."""
        return tuple(self.topology.values()) if self.topology is not None else self.by_index or ()

    @property
    def cpus(self) -> frozenset[int]:
        """All CPUs that vCPUs are pinned to."""
        return frozenset[int]().union(*(one.cpus for one in self.sets))


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
    flat = [value.text for _key, value in node.pairs if isinstance(value, Scalar) and _ONE_RANGE.fullmatch(value.text)]
    if flat and [key.text for key, _value in node.pairs] == [str(index) for index in range(len(flat))]:
        hint = f"for a list by virtual CPU write [{shortened(', '.join(flat))}]"
        yamlnode.entries(node.pairs[0][1], "socket 0", hint)  # which is none
    topology = dict(_by_topology(node, what, (), budget, [MAX_PINNED]))
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


def out_of_range(place: Place, smp: Mapping[str, int]) -> str | None:
    """What is wrong with `place` in a PC of these `-smp` numbers; None if nothing is, or they do not tell.

    Only a PC numbers each level from 0 on: spapr, for one, counts cores in steps of their threads.
    """
    inner = {level: smp.get(plural, 1) for level, plural in _INNER.items()}
    cores = smp.get("cores")
    named = {level for level, _ in place}
    limits = {"drawer": 1, "book": 1, "socket": smp.get("sockets"), **inner, "thread": smp.get("threads")}
    limits["core"] = cores and cores * prod(number for level, number in inner.items() if level not in named)
    for position, (level, number) in enumerate(place):
        limit = limits[level]
        if limit is not None and number >= limit:
            where = describe_place(place[:position]) or "the guest"
            return f"{level} {number}, but -smp gives {where} only {level} {format_cpulist(range(limit))}"
    return None


def beside_the_first(pinning: Pinning) -> tuple[str, Mark] | None:
    """A vCPU that a guest of a single one does not have, and where it was pinned; None if only that one is."""
    if pinning.topology is None:
        return ("vCPU 1", pinning.sets[1].mark) if len(pinning.sets) > 1 else None
    others = (
        (describe_place(place), cpus.mark) for place, cpus in pinning.topology.items() if any(n for _, n in place)
    )
    return next(others, None)


def smp_for(pinning: Pinning) -> str:
    """The least item of the section qemu that gives a PC all vCPUs of `pinning`."""
    if pinning.topology is None:
        return f"smp: {len(pinning.sets)}"
    counts = dict.fromkeys(LEVELS[LEVELS.index("socket") :], 1)
    for level, number in (part for place in pinning.topology for part in place if part[0] in counts):
        counts[level] = max(counts[level], number + 1)
    # A level that QEMU's release, or its PC, does not know may not be named, not even with 1.
    parts = [f"{_INNER.get(level, f'{level}s')}: {n}" for level, n in counts.items() if level in _REQUIRED or n > 1]
    return f"smp: [{prod(counts.values())}, {', '.join(parts)}]"


def _by_topology(
    node: Node, what: str, place: Place, budget: _Budget, left: list[int]
) -> Iterator[tuple[Place, CpuSet]]:
    """All vCPUs in the map `node`, which is at `place`. `left`: how many entries all maps together may still have."""
    if place and place[-1][0] == "thread":
        yield place, _cpus(node, f"the host CPU of vCPU ({describe_place(place)})", budget)
        return
    seen: dict[int, str] = {}
    for key, value in yamlnode.entries(node, describe_place(place) or what):
        level, number = _level(key, place, what)
        if seen and level not in seen.values():
            other = next(iter(seen.values()))
            fail(
                key,
                f"{describe_place(place) or what} has a {level} beside a {other}",
                "name the same level in all of its keys",
            )
        if number in seen:
            fail(key, f"{level} {number} is given twice in {describe_place(place) or what}", "remove one of them")
        seen[number] = level
        left[0] -= 1  # empty ones too: aliases can make a billion of them out of a small file
        if left[0] < 0:
            fail(key, f"{what} names more than {MAX_PINNED} vCPUs")
        yield from _by_topology(value, what, (*place, (level, number)), budget, left)


def _level(key: Scalar, place: Place, what: str) -> tuple[str, int]:
    """The level and number of a key below `place`: `0`, or `die 0`."""
    depth = LEVELS.index(place[-1][0]) + 1 if place else 0
    plain = next(level for level in _REQUIRED if LEVELS.index(level) >= depth)
    where = f"in {describe_place(place) or what}"
    named = _LEVEL_KEY.fullmatch(key.text) if key.kind == "str" else None
    if named is None:
        if key.kind == "int":
            return plain, yamlnode.integer(key, f"a {plain} number {where}", 0, MAX_UINT32)
        what = f"a {plain} number {where} must be a whole number, not {describe(key)}"
        fail(key, what, f"write a number, or a level and its number, such as {plain} 0")
    level, number = named[1], int(named[2])
    if level not in LEVELS:
        hint = did_you_mean(level, LEVELS) or f"known are {', '.join(LEVELS)}"
        fail(key, f"unknown level {shortened(level)!r} {where}", hint)
    if LEVELS.index(level) < depth:
        fail(key, f"{level} {number} stands inside of {place[-1][0]} {place[-1][1]}", f"from the outside in: {_ORDER}")
    if LEVELS.index(level) > LEVELS.index(plain):
        fail(key, f"{level} {number} {where} without a {plain} around it", f"from the outside in: {_ORDER}")
    if number > MAX_UINT32:
        fail(key, f"{level} {number} is out of range (0-{MAX_UINT32})")
    return level, number


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
        cpu = yamlnode.integer(node, what, 0, MAX_CPU)
        yield range(cpu, cpu + 1)
        return
    if not isinstance(node, Scalar) or node.kind != "str" or not _RANGES.fullmatch(node.text):
        _no_cpus(node, what)
    for part in node.text.split(","):
        first, dash, last = part.partition("-")
        low, high = int(first), int(last if dash else first)
        if max(low, high) > MAX_CPU:
            fail(node, f"{what} is {shortened(part)}, which is out of range (0-{MAX_CPU})")
        if high < low:
            fail(node, f"{what}: the range {part} counts backwards", f"did you mean {high}-{low}?")
        yield range(low, high + 1)


def _no_cpus(node: Node, what: str) -> NoReturn:
    hint = without_zeros(node) or CPUS_HINT
    fail(node, f"{what} must be a number, a range or a list of these, not {describe(node)}", hint)
