"""Who is who among QEMU's threads: the answers of query-cpus-fast and query-iothreads as values.

Why it exists: pinning needs TIDs, and the definition names vCPUs by place (socket, core, thread) or by index.
Pure: it takes QMP answers and returns values, and refuses answers of another shape.

Two things called `thread-id` come in one answer: the outer one is the host's TID, the one inside `props`
is the place of the vCPU in its core.

The core number of the map counts through the socket, over its dies, clusters and modules, as Linux counts the
cores of a package: with `-smp 8,sockets=1,dies=2,cores=2,threads=2` the cores of socket 0 are 0, 1 (die 0),
2, 3 (die 1). On a machine without such levels it is QEMU's core-id itself. (The original compared core-id alone:
with two dies, two vCPUs had the same place and one of them was lost.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import QmpError

# qapi/machine.json, CpuInstanceProperties: the levels between socket and core, from the outside in.
# drawer and book (s390x) lie outside the socket and are not part of a place.
_LEVELS_IN_SOCKET = ("die-id", "cluster-id", "module-id")

Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Vcpu:
    """One vCPU: its index, the host thread that runs it, its (socket, core, thread)."""

    index: int
    tid: int
    place: Place

    def __str__(self) -> str:
        return f"vCPU {self.index} (socket {self.place[0]}, core {self.place[1]}, thread {self.place[2]})"


@dataclass(frozen=True, slots=True)
class Iothread:
    """One iothread object and the host thread behind it."""

    id: str
    tid: int


@dataclass(frozen=True, slots=True)
class Threads:
    """All threads of a QEMU that have a name; every other one is an emulator thread."""

    vcpus: tuple[Vcpu, ...]
    iothreads: tuple[Iothread, ...]


@dataclass(frozen=True, slots=True)
class _Ids:
    socket: int
    group: tuple[int, ...]  # die, cluster, module
    core: int
    thread: int


def read_threads(cpus: Any, possible: Any, iothreads: Any) -> Threads:
    """Values from the answers of query-cpus-fast, query-hotpluggable-cpus (or None) and query-iothreads.

    The possible vCPUs matter only where a socket has dies, clusters or modules: a gap left by a vCPU that is not
    plugged in must not shift the cores behind it.
    """
    entries = [(_integer(entry, "cpu-index"), _integer(entry, "thread-id"), _ids(entry)) for entry in _list(cpus)]
    present = [ids for _, _, ids in entries]
    cores = _core_numbers([*present, *(_ids(entry) for entry in _list(possible or []))])
    vcpus = tuple(
        Vcpu(index, tid, (ids.socket, cores[ids.socket, ids.group, ids.core], ids.thread))
        for index, tid, ids in entries
    )
    return Threads(
        vcpus=tuple(sorted(vcpus, key=lambda vcpu: vcpu.index)),
        iothreads=tuple(Iothread(_text(entry, "id"), _integer(entry, "thread-id")) for entry in _list(iothreads)),
    )


def has_inner_levels(cpus: Any) -> bool:
    """Whether some socket has more than one die, cluster or module, so that `read_threads` wants the possible vCPUs."""
    return _has_groups([_ids(entry) for entry in _list(cpus)])


def _has_groups(ids: Sequence[_Ids]) -> bool:
    return len({(entry.socket, entry.group) for entry in ids}) > len({entry.socket for entry in ids})


def _core_numbers(ids: Sequence[_Ids]) -> dict[tuple[int, tuple[int, ...], int], int]:
    """(socket, group, core-id) to the core number of the map."""
    keys = {(entry.socket, entry.group, entry.core) for entry in ids}
    if not _has_groups(ids):
        return {key: key[2] for key in keys}
    return {
        key: number
        for socket in {key[0] for key in keys}
        for number, key in enumerate(sorted(key for key in keys if key[0] == socket))
    }


def _ids(entry: Any) -> _Ids:
    """The ids that QEMU reports; a level that the machine does not have counts as its only member, 0."""
    props = entry.get("props", {}) if isinstance(entry, dict) else None
    if not isinstance(props, dict):
        raise QmpError(f"QEMU described a vCPU as {entry!r}")

    def level(name: str) -> int:
        return _integer(props, name) if name in props else 0

    return _Ids(
        level("socket-id"), tuple(level(name) for name in _LEVELS_IN_SOCKET), level("core-id"), level("thread-id")
    )


def _list(value: Any) -> Iterable[Any]:
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
