"""libvirt's XML of a VM: read with care, and asked what no command line says: pinning, scheduling, locked memory.

The file may come from anywhere. Refused, each with a message: what is no XML, has a document type (entities can make
much out of little, and a domain has none), is nested too deep, or holds numbers that mean nothing. Pure.
"""

import xml.etree.ElementTree as ET
from typing import Any, NamedTuple

from ..cpulist import MAX_CPU
from ..errors import DefinitionError, shortened
from ..keys import POLICIES, Scheduling
from ..places import MAX_PINNED

MAX_DEPTH = 64  # libvirt's own go about ten levels deep
MAX_NODE = 1023  # of a guest's NUMA nodes; QEMU has up to 128
NO_LIMIT = 1 << 60  # bytes; libvirt writes 2^53-1 KiB
QEMU_NAMESPACE = "{http://libvirt.org/schemas/domain/qemu/1.0}"
_UNITS = {"b": 1, "bytes": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4} | {
    name: 1 << shift
    for names, shift in (("k KiB", 10), ("M MiB", 20), ("G GiB", 30), ("T TiB", 40))
    for name in names.split()
}


class HugePage(NamedTuple):
    """Huge pages of `size` bytes (None: the host's usual one) for these nodes of the guest's; None: for all others."""

    size: int | None
    nodes: frozenset[int] | None


class Tuning(NamedTuple):
    """What the XML says about threads and memory."""

    started: frozenset[int]  # the vCPUs that are there when the guest starts
    plugged: frozenset[int]  # those of them that libvirt plugs in just before
    topology: tuple[int, int]  # cores of a socket over all its dies and clusters, threads of a core
    vcpu_pins: dict[int, frozenset[int]]  # by vCPU, those too that may be plugged in later
    emulator_pin: frozenset[int] | None
    iothread_pins: dict[str, frozenset[int]]  # by the id that QEMU gets
    vcpu_schedules: dict[int, Scheduling]
    emulator_schedule: Scheduling | None
    memory_limit: int | None  # bytes, memtune's hard_limit
    huge_pages: tuple[HugePage, ...]
    device_pages: tuple[int | None, ...]  # of the memory devices, bytes; None: as for their node


class _Shallow(ET.TreeBuilder):
    """Refuses depth as it comes: what walks the tree later may recurse."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.depth = 0

    def start(self, tag: Any, attrs: dict[Any, Any]) -> ET.Element:  # the stubs of two Pythons differ
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise DefinitionError(f"{self.where} is nested more than {MAX_DEPTH} levels deep")
        return super().start(tag, attrs)

    def end(self, tag: str) -> ET.Element:
        self.depth -= 1
        return super().end(tag)


def parse(text: str, where: str) -> ET.Element:
    """The root of the domain in `text`. Raises DefinitionError; `where` is what it calls the text."""
    if "<!DOCTYPE" in text:
        raise DefinitionError(f"{where} has a document type, which no domain of libvirt's has", "remove <!DOCTYPE ...>")
    parser = ET.XMLParser(target=_Shallow(where))  # noqa: S314  see above: no document type, no depth, 1 MiB
    try:
        parser.feed(text)
        root: ET.Element | None = parser.close()
    except (ET.ParseError, ValueError) as err:  # ValueError: an encoding that Python does not know, a lone surrogate
        raise DefinitionError(f"{where} is no XML: {err}", "virsh dumpxml --inactive NAME prints it") from err
    if root is None or root.tag != "domain":
        what = "nothing" if root is None else f"<{shortened(str(root.tag))}>"
        raise DefinitionError(
            f"{where} is no domain of libvirt's, but {what}", "virsh dumpxml --inactive NAME prints it"
        )
    return root


def environment(root: ET.Element) -> dict[str, str]:
    """The variables that the XML itself asks for."""
    elements = root.iterfind(f"{QEMU_NAMESPACE}commandline/{QEMU_NAMESPACE}env")
    return {element.get("name", ""): element.get("value", "") for element in elements}


def tuning(root: ET.Element) -> Tuning:
    """Raises DefinitionError for CPU sets and numbers that cannot be."""
    vcpu = root.find("vcpu")
    most = number((vcpu.text if vcpu is not None else None) or "1", "vcpu", 1, MAX_PINNED)
    started, plugged = _started(root, most)
    everything = _cpus(vcpu.get("cpuset"), "vcpu cpuset") if vcpu is not None and vcpu.get("cpuset") else None
    pins = dict.fromkeys(range(most), everything) if everything else {}
    for element in root.iterfind("cputune/vcpupin"):
        pins[number(element.get("vcpu"), "vcpupin vcpu", 0, MAX_PINNED)] = _cpus(element.get("cpuset"), "vcpupin")
    emulator = root.find("cputune/emulatorpin")
    schedules = {
        index: schedule
        for element in root.iterfind("cputune/vcpusched")
        for schedule in [_schedule(element)]
        for index in _members(element.get("vcpus"), "vcpusched vcpus")
    }
    emulator_schedule = root.find("cputune/emulatorsched")
    limit = root.find("memtune/hard_limit")
    return Tuning(
        started=started,
        plugged=plugged,
        topology=_topology(root),
        vcpu_pins={index: cpus for index, cpus in sorted(pins.items()) if cpus and index < most},
        emulator_pin=everything if emulator is None else _cpus(emulator.get("cpuset"), "emulatorpin"),
        iothread_pins={
            f"iothread{number(element.get('iothread'), 'iothreadpin', 1, 1 << 31)}": _cpus(
                element.get("cpuset"), "iothreadpin"
            )
            for element in root.iterfind("cputune/iothreadpin")
        },
        vcpu_schedules={index: schedule for index, schedule in schedules.items() if index in started},
        emulator_schedule=None if emulator_schedule is None else _schedule(emulator_schedule),
        memory_limit=None if limit is None else size(limit),
        huge_pages=_huge_pages(root.find("memoryBacking/hugepages")),
        device_pages=tuple(
            None if page is None else size(page)
            for device in root.iterfind("devices/memory")
            if device.get("model") != "sgx-epc"
            for page in [device.find("source/pagesize")]
        ),
    )


def _started(root: ET.Element, most: int) -> tuple[frozenset[int], frozenset[int]]:
    found = {
        number(element.get("id"), "vcpus id", 0, most - 1): element.get("hotpluggable") == "yes"
        for element in root.iterfind("vcpus/vcpu")
        if element.get("enabled") == "yes"
    }
    if found:
        return frozenset(found), frozenset(index for index, is_plugged in found.items() if is_plugged)
    vcpu = root.find("vcpu")
    now = most if vcpu is None else number(vcpu.get("current", str(most)), "vcpu current", 1, most)
    return frozenset(range(now)), frozenset()


def _huge_pages(element: ET.Element | None) -> tuple[HugePage, ...]:
    if element is None:
        return ()
    found = (
        HugePage(size(page) or None, None if nodes is None else _set(nodes, "page nodeset", MAX_NODE, "node"))
        for page in element.iterfind("page")
        for nodes in [page.get("nodeset")]
    )
    return tuple(found) or (HugePage(None, None),)


def _topology(root: ET.Element) -> tuple[int, int]:
    found = root.find("cpu/topology")
    if found is None:
        return 1, 1  # each vCPU is a socket of its own then
    dies, clusters, cores, threads = (
        number(found.get(name, "1"), f"topology {name}", 1, MAX_PINNED)
        for name in ("dies", "clusters", "cores", "threads")
    )
    return dies * clusters * cores, threads


def _schedule(element: ET.Element) -> Scheduling:
    policy = element.get("scheduler", "")
    if policy not in POLICIES:
        raise DefinitionError(f"{element.tag} has the scheduler {shortened(policy)!r}, which is none that libvirt has")
    return Scheduling(policy, number(element.get("priority", "0"), f"{element.tag} priority", 0, 99))


def size(element: ET.Element) -> int | None:
    """A scaled integer of libvirt's, in bytes; None for libvirt's way of saying no limit."""
    unit = element.get("unit", "KiB")
    if unit not in _UNITS:
        raise DefinitionError(f"{element.tag} has the unit {shortened(unit)!r}, which is none that libvirt has")
    text = element.text if element.tag != "page" else element.get("size")
    found = number(text, str(element.tag), 0, 1 << 63) * _UNITS[unit]
    return found if found < NO_LIMIT else None


def number(text: str | None, what: str, least: int, most: int) -> int:
    """Raises DefinitionError, with `what` it is, for anything else."""
    digits = (text or "").strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 20 or not least <= int(digits) <= most:
        raise DefinitionError(f"{what} in the XML is {shortened(text or '')!r}, and must be a number ({least}-{most})")
    return int(digits)


def _cpus(text: str | None, what: str) -> frozenset[int]:
    return _set(text, what, MAX_CPU, "CPU")


def _members(text: str | None, what: str) -> frozenset[int]:
    return _set(text, what, MAX_PINNED, "CPU")


def _set(text: str | None, what: str, most: int, member: str) -> frozenset[int]:
    """`0-3,^2,8`, in the order in which it is written: libvirt's "cpuset"."""
    found: set[int] = set()
    for part in (text or "").split(","):
        first, dash, last = part.strip().removeprefix("^").partition("-")
        low = number(first, f"a {member} of {what}", 0, most)
        high = number(last, f"a {member} of {what}", low, most) if dash else low
        (found.difference_update if part.strip().startswith("^") else found.update)(range(low, high + 1))
    if not found:
        raise DefinitionError(f"{what} in the XML is {shortened(text or '')!r}, which leaves no {member}")
    return frozenset(found)
