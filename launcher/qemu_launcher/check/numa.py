"""Of which NUMA node the guest's memory will be: that of its vCPUs, or any; and whether it has that much.

Pure judgement over a Tree.
"""

import re
from collections.abc import Iterator

from .. import cmdline, ram
from ..cpulist import format_cpulist
from ..definition import VmDefinition
from ..hostdevices import vfio_containers
from ..options import is_on
from ..sizes import format_size
from . import asked, nodes
from .asked import Backend
from .finding import Finding
from .hugepages import huge_page_of, mounts
from .tree import Tree, cpus_in

_PCI_FOLDER = re.compile(r":[0-9a-fA-F]{2}\.[0-7]/*$")  # a mediated device's ends in a UUID


def enough(tree: Tree, wanted: list[Backend]) -> Iterator[Finding]:
    """Whether nodes have what must be theirs (policy=bind), of ordinary pages: there is no other way for the kernel."""
    all_mounts = mounts(tree)
    needs: dict[frozenset[int], int] = {}
    for backend in wanted:
        if backend.bound_to and not huge_page_of(tree, backend, all_mounts):
            needs[backend.bound_to] = needs.get(backend.bound_to, 0) + (backend.size or 0)
    for those, size in needs.items():
        spare = [_to_spare(tree, node) for node in those]
        available = sum(number or 0 for number in spare)
        if None not in spare and size > available:
            which = f"node{'s' * (len(those) != 1)} {format_cpulist(those)}"
            text = f"{format_size(size)} must be of {which} (policy: bind), with {format_size(available)} to spare now"
            fix = "write policy: preferred, give the guest less, or end something else first"
            yield Finding("warning", "memory", text, fix)


def _to_spare(tree: Tree, node: int) -> int | None:
    """The bytes that a node has free, or in caches that could go: never less than the kernel would find."""
    lines = tree.text(f"{nodes.FOLDER}/node{node}/meminfo") or ""
    found = dict(re.findall(r"^Node [0-9]+ (\S+):\s+([0-9]+) kB$", lines, re.MULTILINE))
    names = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
    return sum(int(found.get(name, "0")) for name in names) << 10 if "MemFree" in found else None


def elsewhere(definition: VmDefinition, tree: Tree, wanted: list[Backend]) -> Iterator[Finding]:
    """RAM that QEMU takes while it may run on any node, for vCPUs that are all on one.

    What the guest takes itself, when its vCPUs first touch it, is of their node.
    """
    node = _node_of_vcpus(definition, tree)
    if node is None or cmdline.has_option(definition, "readconfig"):
        return
    parts = _ram(definition, wanted)
    loose = [part for part in parts if not part.nodes and part.policy == "default"]
    if not loose or _is_kept(tree, node):
        return
    reasons = {  # for all of it
        "prealloc": cmdline.has_option(definition, "mem-prealloc"),
        "mem-lock": any(is_on(one.get("mem-lock", "off")) for one in asked.each(definition, "overcommit")),
        "VFIO": _vfio_pins_ram(definition),
    }
    if not any(reasons.values()):
        all_mounts = mounts(tree)
        loose = [part for part in loose if part.prealloc or huge_page_of(tree, part, all_mounts)]
    reasons["prealloc"] |= any(part.prealloc for part in loose)
    if early := [word for word, holds in reasons.items() if holds]:
        how = f"QEMU takes it ({', '.join(early)}) before its threads are pinned, wherever it runs then"
    elif loose:
        how = "huge pages come from any node that has them"
    else:
        return
    what = "the guest's memory" if len(loose) == len(parts) else "all of the guest's memory"
    text = f"all vCPUs are on NUMA node {node}, and nothing keeps {what} there: {how}"
    yield Finding("warning", "memory", text, _bound_to(definition, loose, node))


def _ram(definition: VmDefinition, wanted: list[Backend]) -> list[Backend]:
    """What the guest's RAM consists of: the machine's own, and what is plugged. Without an id: that of no object.

    ivshmem has a memdev as well, which is no RAM.
    """
    own = ram.machine_backends(definition.options)
    devices = [one for one in asked.each(definition, "device") if not one.get("driver", "").startswith("ivshmem")]
    plugged = {value for one in devices for name, value in one.items() if name.endswith("memdev")}
    found = [backend for backend in wanted if backend.id in own | plugged]
    if own:
        return found
    size = ram.machine_ram(definition.options)
    plain = Backend("memory-backend-ram", "", size, None, hugetlb=False, huge_page=None, readonly=False, prealloc=False)
    return [next((one for one in wanted if not one.id and one.path is not None), plain), *found]


def _vfio_pins_ram(definition: VmDefinition) -> bool:
    """Whether it does from the start, all of it; by iommufd= too, which only counts it elsewhere."""
    by_iommufd = (device.folder for device in asked.vfio(definition) if device.iommufd)
    return vfio_containers(definition.options) > 0 or any(map(_PCI_FOLDER.search, by_iommufd))


def _node_of_vcpus(definition: VmDefinition, tree: Tree) -> int | None:
    """The node that all of them are next to; None if there is none, or no other with CPUs and memory."""
    with_memory = cpus_in(tree.text(f"{nodes.FOLDER}/has_memory"))
    near = {node: cpus for node, cpus in nodes.nodes(tree).items() if node in with_memory}
    if definition.pinning is None or len(near) < 2:
        return None
    vcpus = definition.pinning.cpus
    return next((node for node, cpus in near.items() if vcpus <= cpus), None)


def _is_kept(tree: Tree, node: int) -> bool:
    """Whether we are, and so QEMU will be: by numactl(8) or taskset(1), or by systemd, systemd.exec(5)."""
    policy = (tree.text("/proc/self/numa_maps") or "").split()[1:2]  # of any mapping; numa(7)
    found = dict(re.findall(r"^(\w+)_allowed_list:\s+(\S+)$", tree.text("/proc/self/status") or "", re.MULTILINE))
    cpus, memory = cpus_in(found.get("Cpus")), cpus_in(found.get("Mems"))
    return policy not in ([], ["default"]) or len(memory) == 1 or (bool(cpus) and cpus <= nodes.nodes(tree)[node])


def _bound_to(definition: VmDefinition, parts: list[Backend], node: int) -> str:
    """What to write. Such a part of RAM has an object already, or gets one."""
    where = f"host-nodes: {node}, policy: bind"
    named = [part.id for part in parts if part.id]
    add = f"add {where} to the object{'s' * (len(named) != 1)} {' and '.join(named)}"
    own = next((part for part in parts if not part.id), None)
    if own is None:
        return add
    taken = {one.get("id") for one in asked.each(definition, "object")}
    name = next(name for name in (f"ram{number}" for number in range(len(taken) + 1)) if name not in taken)
    size = f"id: {name}, size: {_written(ram.machine_ram(definition.options))}"
    if own.path is not None:
        path = own.path if re.fullmatch(r"[\w/.-]+", own.path) else "'" + own.path.replace("'", "''") + "'"
        first, kind, size = "write in place of mem-path", "file", f"{size}, mem-path: {path}"
    else:
        first, kind = "add to the section qemu", "ram"
    kinds = [one["type"] for one in asked.each(definition, "machine", "M") if "type" in one][-1:]
    lines = (
        f"{first}, where the lines of machine are taken together:\n"
        f"- object: [memory-backend-{kind}, {size}, {where}]\n"
        f"- machine: [{', '.join([*kinds, f'memory-backend: {name}'])}]"
    )
    return f"{lines}\nand {add}" if named else lines


def _written(size: int | None) -> str:
    """Bytes, exactly, as a definition may have them."""
    if not size:
        return "..."
    units = [(shift, unit) for unit, shift in ram.SIZE_SUFFIXES.items() if size % (1 << shift) == 0]
    shift, unit = max(units)
    return f"{size >> shift}{unit if shift else ''}"
