"""Who is who among QEMU's threads: the answers of query-cpus-fast and query-iothreads as values.

Why it exists: pinning needs TIDs, and the definition names vCPUs by place or by index.
Pure: it takes QMP answers and returns values, and refuses answers of another shape.

Two things called `thread-id` come in one answer: the outer one is the host's TID, the one inside `props`
is the place of the vCPU in its core.

A place names some levels (`places.LEVELS`), and its core number counts through those between that it leaves out, as
Linux counts the cores of a package: with `-smp 8,sockets=1,dies=2,cores=2,threads=2` the cores of socket 0 are 0, 1
(die 0), 2, 3 (die 1), and each of the dies has cores 0 and 1. Where nothing is left out, or the machine has no such
levels, it is QEMU's core-id itself. A level that the machine does not report counts as its only member, 0. (The
original compared socket, core-id and thread alone: with two dies, two vCPUs had the same place and one was lost.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import QmpError
from .places import LEVELS, MAX_PINNED, Place

_IN_SOCKET = ("die", "cluster", "module")


class Ids(NamedTuple):
    """Where a vCPU sits: qapi/machine.json, CpuInstanceProperties, from the outside in, one for each of LEVELS."""

    drawer: int = 0
    book: int = 0
    socket: int = 0
    die: int = 0
    cluster: int = 0
    module: int = 0
    core: int = 0
    thread: int = 0


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU: its index, the host thread that runs it, its place as QEMU tells it, its core number in its socket."""

    index: int
    tid: int
    ids: Ids
    core: int

    def __str__(self) -> str:
        inner = "".join(f", {level} {number}" for level in _IN_SOCKET if (number := getattr(self.ids, level)))
        also = f"; core {self.ids.core}{inner}" if self.core != self.ids.core else ""
        return f"vCPU {self.index} (socket {self.ids.socket}, core {self.core}, thread {self.ids.thread}{also})"


@dataclass(frozen=True, slots=True)
class Iothread:
    """One iothread object and the host thread behind it."""

    id: str
    tid: int


@dataclass(frozen=True, slots=True)
class Threads:
    """All threads of a QEMU that have a name; every other one is an emulator thread.

    `slots`: where vCPUs are or can be plugged in, `possible`: how many there can be.
    """

    vcpus: tuple[Vcpu, ...]
    iothreads: tuple[Iothread, ...]
    slots: tuple[Ids, ...] = ()
    possible: int = 0
    _by_ids: dict[Ids, list[Vcpu]] = field(default_factory=dict, compare=False, repr=False)
    _by_place: dict[tuple[str, ...], dict[tuple[int, ...], list[Ids]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def can_grow(self) -> bool:
        """Whether vCPUs can be plugged in."""
        return self.possible > len(self.vcpus)

    def tids(self) -> dict[int, int]:
        """Index -> TID, of all vCPUs."""
        return {vcpu.index: vcpu.tid for vcpu in self.vcpus}

    def at(self, place: Place) -> list[Vcpu]:
        """The vCPUs there: one, none, or several where the machine's ids do not tell them apart."""
        if not self._by_ids:
            for vcpu in self.vcpus:
                self._by_ids.setdefault(vcpu.ids, []).append(vcpu)
        return [vcpu for ids in self._slots_at(place) for vcpu in self._by_ids.get(ids, ())]

    def can_be_at(self, place: Place) -> bool:
        """Whether a vCPU is there, or can be plugged in there."""
        return bool(self._slots_at(place))

    def _slots_at(self, place: Place) -> list[Ids]:
        named = tuple(level for level, _ in place if level not in ("core", "thread"))
        if named not in self._by_place:
            index = self._by_place[named] = {}
            for ids, core in _core_numbers(self.slots, named).items():
                container = tuple(getattr(ids, level) for level in named)
                index.setdefault((*container, core, ids.thread), []).append(ids)
        return self._by_place[named].get(tuple(number for _, number in place), [])


def read_threads(cpus: Any, possible: Any, iothreads: Any) -> Threads:
    """Values from the answers of query-cpus-fast, query-hotpluggable-cpus (or None) and query-iothreads.

    Without the possible vCPUs those that are there are all there can be.
    """
    entries = sorted(
        ((_integer(entry, "cpu-index"), _integer(entry, "thread-id"), _ids(entry)) for entry in _list(cpus)),
        key=lambda entry: entry[0],
    )
    present = [ids for _, _, ids in entries]
    if not any("thread-id" in entry.get("props", {}) for entry in cpus):
        present = _threads_counted(present)  # spapr tells the core alone
    empty = [entry for entry in _list(possible or []) if "qom-path" not in entry]
    slots = tuple(dict.fromkeys([*present, *(ids for entry in empty for ids in _slots(entry))]))
    cores = _core_numbers(slots, ("socket",))
    vcpus = tuple(Vcpu(index, tid, ids, cores[ids]) for (index, tid, _), ids in zip(entries, present, strict=True))
    return Threads(
        vcpus=vcpus,
        iothreads=tuple(Iothread(_text(entry, "id"), _integer(entry, "thread-id")) for entry in _list(iothreads)),
        slots=slots,
        possible=len(vcpus) + sum(_integer(entry, "vcpus-count") for entry in empty),
    )


def _slots(entry: Any) -> Iterable[Ids]:
    """Where the vCPUs will be that are plugged in together: one, or all threads of a core."""
    first, count = _ids(entry), min(_integer(entry, "vcpus-count"), MAX_PINNED)
    return (first._replace(thread=first.thread + number) for number in range(count))


def _threads_counted(present: Sequence[Ids]) -> list[Ids]:
    """The vCPUs of one core told apart by their order, where the machine does not number them."""
    met: dict[Ids, int] = {}
    counted = []
    for ids in present:
        thread = met[ids] = met.get(ids, -1) + 1
        counted.append(ids._replace(thread=thread))
    return counted


def _core_numbers(slots: Iterable[Ids], named: tuple[str, ...]) -> dict[Ids, int]:
    """The core number of each slot within the levels `named`, counted through those in the socket that are not."""
    open_levels = [level for level in _IN_SOCKET if level not in named]
    cores: dict[tuple[int, ...], set[tuple[tuple[int, ...], int]]] = {}

    def split(ids: Ids) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(getattr(ids, level) for level in named), tuple(getattr(ids, level) for level in open_levels)

    slots = list(slots)
    for ids in slots:
        container, group = split(ids)
        cores.setdefault(container, set()).add((group, ids.core))
    numbers = {
        container: {key: number for number, key in enumerate(sorted(keys))}
        for container, keys in cores.items()
        if len({group for group, _ in keys}) > 1
    }
    found = {}
    for ids in slots:
        container, group = split(ids)
        found[ids] = numbers[container][group, ids.core] if container in numbers else ids.core
    return found


def _ids(entry: Any) -> Ids:
    """The ids that QEMU reports; a level that the machine does not have counts as its only member, 0."""
    props = entry.get("props", {}) if isinstance(entry, dict) else None
    if not isinstance(props, dict):
        raise QmpError(f"QEMU described a vCPU as {entry!r}")
    return Ids(*(_integer(props, f"{level}-id") if f"{level}-id" in props else 0 for level in LEVELS))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise QmpError(f"QEMU answered {value!r} where a list belongs")
    return value


def _integer(entry: Any, name: str) -> int:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise QmpError(f"QEMU answered {entry!r} where a {name} belongs")
    return value


def _text(entry: Any, name: str) -> str:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise QmpError(f"QEMU answered {entry!r} where a {name} belongs")
    return value
