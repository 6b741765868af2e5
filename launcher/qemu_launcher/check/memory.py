"""Guest RAM: huge pages, files shared with other programs (ivshmem), whether there is enough of it, and its NUMA node.

Documentation/admin-guide/mm/hugetlbpage.rst has the files of the pools. Pure judgement over a Tree.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .. import cmdline, ram
from ..cpulist import format_cpulist
from ..definition import VmDefinition
from ..options import has_mem_lock, is_on, pinned_by, vfio_containers
from ..plan import MEMLOCK_OVERHEAD, MemlockNeed
from ..sizes import INFINITY, format_limit, format_size
from . import asked, nodes
from .asked import Backend
from .devices import udev_line
from .finding import Finding
from .tree import ENTER, READ, WRITE, Tree, cpus_in

POOLS = "/sys/kernel/mm/hugepages"
_SHM = "/dev/shm"  # noqa: S108  where QEMU's documentation, and everybody, puts ivshmem files
_KVMFR = "/dev/kvmfr"
_READ_AGAIN = "then read it again: the kernel gives as many as it finds unbroken memory for"
_PCI_FOLDER = re.compile(r":[0-9a-fA-F]{2}\.[0-7]/*$")  # a mediated device's ends in a UUID
_AT_BOOT = "surest from boot on, with the kernel arguments"

Nodes = frozenset[int]


class Mount(NamedTuple):
    """One line of proc_pid_mountinfo(5), as far as it matters here."""

    point: str
    kind: str
    options: str


class Pool(NamedTuple):
    """The huge pages of one size, in pages. `more`: what the kernel may add by itself (nr_overcommit_hugepages)."""

    page: int  # bytes
    total: int
    free: int
    more: int


def mounts(tree: Tree) -> list[Mount]:
    """All mounts, the topmost of a place last."""
    found = []
    for line in (tree.text("/proc/self/mountinfo") or "").splitlines():
        before, dash, after = line.partition(" - ")
        fields, about = before.split(), after.split()
        if dash and len(fields) > 4 and len(about) > 2:
            found.append(Mount(fields[4].replace("\\040", " "), about[0], about[2]))
    return found


def mount_of(path: str, all_mounts: Iterable[Mount]) -> Mount | None:
    """The mount that `path` is in."""
    within = [one for one in all_mounts if path == one.point or path.startswith(one.point.rstrip("/") + "/")]
    return max(reversed(within), key=lambda one: len(one.point), default=None)


def default_huge_page(tree: Tree) -> int | None:
    """Its size in bytes; None without huge pages."""
    found = re.search(r"^Hugepagesize:\s+([0-9]+) kB", tree.text("/proc/meminfo") or "", re.MULTILINE)
    return None if found is None else int(found[1]) << 10


def pool(tree: Tree, page: int) -> Pool | None:
    """The pool of this page size; None if the host has none of it."""
    folder = f"{POOLS}/hugepages-{page >> 10}kB"
    total, free = (tree.number(f"{folder}/{name}_hugepages") for name in ("nr", "free"))
    if total is None or free is None:
        return None
    reserved, over, surplus = (
        tree.number(f"{folder}/{name}_hugepages") or 0 for name in ("resv", "nr_overcommit", "surplus")
    )
    return Pool(page, total, free - reserved, max(0, over - surplus))


def huge_page_of(tree: Tree, backend: Backend, all_mounts: list[Mount]) -> int | None:
    """The size of the huge pages that this backend takes, in bytes; None if it takes ordinary ones, or none exist."""
    if backend.kind == "memory-backend-memfd" and backend.hugetlb:
        return backend.huge_page or default_huge_page(tree)
    if backend.path is None:
        return None
    mount = mount_of(tree.target(backend.path), all_mounts)
    if mount is None or mount.kind != "hugetlbfs":
        return None
    given = re.search(r"pagesize=([0-9]+)([KMG])", mount.options)
    return int(given[1]) << {"K": 10, "M": 20, "G": 30}[given[2]] if given else default_huge_page(tree)


def huge_pages(tree: Tree, wanted: list[Backend]) -> Iterator[Finding]:
    """Whether there are as many as all backends together take, and whether their mounts are this user's to write."""
    all_mounts = mounts(tree)
    needs: dict[int, dict[Nodes, int]] = {}  # pages, by size, and by the nodes that they must be from
    for backend in wanted:
        if backend.hugetlb and default_huge_page(tree) is None and backend.huge_page is None:
            yield Finding("error", "huge pages", "this kernel has no huge pages", "leave out hugetlb: on")
            continue
        page = huge_page_of(tree, backend, all_mounts)
        if page is None:
            continue
        if backend.path is not None:
            yield from _mount_rights(tree, backend.path)
        if backend.size is None:
            yield Finding("note", "huge pages", f"how many huge pages {_name(backend)} takes cannot be told")
        else:
            by_nodes = needs.setdefault(page, {})
            by_nodes[backend.bound_to] = by_nodes.get(backend.bound_to, 0) + -(-backend.size // page)
    for page, by_nodes in needs.items():
        yield from _all_enough(tree, page, by_nodes)


def _all_enough(tree: Tree, page: int, by_nodes: dict[Nodes, int]) -> Iterator[Finding]:
    """Pages of one size; what must be from certain nodes first."""
    whole, bound = pool(tree, page), list[Finding]()
    if whole is not None:
        bound = [_enough_of(tree, whole, pages, wanted) for wanted, pages in by_nodes.items() if wanted]
        yield from bound
    together = _enough(tree, page, sum(by_nodes.values()))
    # What the kernel has promised to others it counts for all nodes together.
    if frozenset() in by_nodes or (together.severity == "error" and all(one.severity == "ok" for one in bound)):
        yield together


def _enough_of(tree: Tree, whole: Pool, pages: int, wanted: Nodes) -> Finding:
    """Pages of these nodes and no others: what policy=bind means."""
    what = f"{_pages(whole.page, pages)} are wanted of node{'s' * (len(wanted) != 1)} {format_cpulist(wanted)}"
    folders = {one: f"{nodes.FOLDER}/node{one}/hugepages/hugepages-{whole.page >> 10}kB" for one in sorted(wanted)}
    free = {one: tree.number(f"{folder}/free_hugepages") for one, folder in folders.items()}
    if absent := [one for one, number in free.items() if number is None]:
        fix = "lscpu shows the nodes; write host-nodes: to match"
        return Finding("error", "huge pages", f"{what}, and there is no node {format_cpulist(absent)}", fix)
    available = sum(number or 0 for number in free.values()) + whole.more
    if available >= pages:
        return Finding("ok", "huge pages", f"{what}, {available} can be had")
    node, folder = next(iter(folders.items()))
    total = (tree.number(f"{folder}/nr_hugepages") or 0) + pages - available
    fix = (
        f"echo {total} | sudo tee {folder}/nr_hugepages; {_READ_AGAIN}\n"
        f"{_AT_BOOT} hugepagesz={_unit(whole.page)} hugepages={node}:{total} (Linux 5.16; other nodes behind a comma)"
    )
    return Finding("error", "huge pages", f"{what}, and {available} can be had", fix)


def _pages(page: int, pages: int) -> str:
    return f"{pages} huge page{'s' * (pages != 1)} of {format_size(page)}"


def _enough(tree: Tree, page: int, pages: int) -> Finding:
    size = _pages(page, pages)
    found = pool(tree, page)
    if found is None:
        sizes = [
            int(match[1]) << 10 for name in tree.names(POOLS) if (match := re.fullmatch(r"hugepages-([0-9]+)kB", name))
        ]
        has = ", ".join(map(format_size, sorted(sizes)))
        return Finding(
            "error",
            "huge pages",
            f"{size} are wanted, and this host has none of that size",
            f"it has {has}: write hugetlbsize: to match" if has else "it has none at all: leave out hugetlb",
        )
    available = max(0, found.free) + found.more
    if available >= pages:
        return Finding("ok", "huge pages", f"{size} are wanted, {available} can be had")
    total = found.total + pages - available
    return Finding(
        "error", "huge pages", f"{size} are wanted, and {available} can be had", _how_to_have_pages(tree, page, total)
    )


def _how_to_have_pages(tree: Tree, page: int, total: int) -> str:
    now = f"echo {total} | sudo tee {POOLS}/hugepages-{page >> 10}kB/nr_hugepages"
    if page == default_huge_page(tree):
        now = f"sudo sysctl vm.nr_hugepages={total}"
    return f"{now}; {_READ_AGAIN}\n{_AT_BOOT} hugepagesz={_unit(page)} hugepages={total}"


def _unit(page: int) -> str:
    return f"{page >> 30}G" if page >= 1 << 30 else f"{page >> 20}M" if page >= 1 << 20 else f"{page >> 10}K"


def _mount_rights(tree: Tree, path: str) -> Iterator[Finding]:
    """A directory gets a file made in it, and removed again; a file is opened."""
    folder = path if tree.is_directory(path) else path.rpartition("/")[0] or "/"
    if tree.is_directory(path) or not tree.exists(path):
        may = tree.may(folder, WRITE | ENTER)
    else:
        folder, may = path, tree.may(path, READ | WRITE)
    if may:
        yield Finding("ok", "huge pages", f"{folder} is yours to write")
        return
    yield Finding(
        "error",
        "huge pages",
        f"{folder} is not yours to write",
        "use a memfd, which needs no mount: - object: [memory-backend-memfd, id: ram, size: ..., hugetlb: on], "
        "with memory-backend: ram in machine:\n"
        f"or: sudo chgrp kvm {folder}; sudo chmod 1770 {folder}",
    )


def _name(backend: Backend) -> str:
    return f"{backend.kind} {backend.id}".strip() if backend.id else "-mem-path"


# Files that other programs open too


def shared_files(tree: Tree, wanted: list[Backend], user: str) -> Iterator[Finding]:
    """memory-backend-file outside hugetlbfs: exists, is large enough, is ours to write."""
    all_mounts = mounts(tree)
    for backend in wanted:
        if backend.path is None or backend.kind != "memory-backend-file" or huge_page_of(tree, backend, all_mounts):
            continue
        if backend.path.startswith(_KVMFR):
            yield from _kvmfr(tree, backend, user)
        elif not tree.is_directory(backend.path):
            yield from _shared_file(tree, backend, user)


def _shared_file(tree: Tree, backend: Backend, user: str) -> Iterator[Finding]:
    path, size = backend.path or "", backend.size
    about = f"memory file {path}"
    made = f"f {path} 0660 {user} kvm -"
    tmpfiles = f"echo '{made}' | sudo tee -a /etc/tmpfiles.d/qemu-memory.conf; sudo systemd-tmpfiles --create"
    state = tree.stat(path)
    if state is None:
        folder = path.rpartition("/")[0] or "."
        if not tree.may(folder, WRITE | ENTER):
            yield Finding("error", about, f"there is no {path}, and QEMU may not make it in {folder}", tmpfiles)
            return
        fix = f"if another user's program opens it: {tmpfiles}"
        yield Finding("note", about, f"there is no {path} yet; QEMU makes it, for you alone to write", fix)
    elif not tree.may(path, READ if backend.readonly else READ | WRITE):
        fix = f"remove it, if no VM uses it: sudo rm {path}; and have it made as yours: {tmpfiles}"
        yield Finding("error", about, f"{path} is not yours to read and write", fix)
    elif size is not None and 0 < state.st_size < size:
        fix = f"write size: {state.st_size}, or remove the file, if no VM uses it: rm {path}"
        text = f"{path} has {format_size(state.st_size)}, and the definition says {format_size(size)}"
        yield Finding("error", about, text, fix)
    else:
        yield Finding("ok", about, f"{path} is yours to use")
    free = tree.free_bytes(path.rpartition("/")[0] or ".")
    held = state.st_blocks * 512 if state is not None else 0
    if size is not None and free is not None and free + held < size:
        where = path.rpartition("/")[0]
        fix = f"sudo mount -o remount,size=... {_SHM}" if path.startswith(f"{_SHM}/") else "make room there"
        text = f"{where} has {format_size(free)} left, and {path} may take {format_size(size)}: the guest may die of it"
        yield Finding("warning", about, text, fix)


def _kvmfr(tree: Tree, backend: Backend, user: str) -> Iterator[Finding]:
    """Looking Glass's kernel module: a device that is memory of a fixed size."""
    path = backend.path or ""
    about = f"memory file {path}"
    if not tree.exists(path):
        size = -(-(backend.size or 32 << 20) >> 20)
        yield Finding(
            "error", about, f"there is no {path}", f"sudo modprobe kvmfr static_size_mb={size} (Looking Glass)"
        )
    elif not tree.may(path, READ | WRITE):
        rule = udev_line(f'SUBSYSTEM=="kvmfr", OWNER="{user}"', "/etc/udev/rules.d/70-qemu-kvmfr.rules", "kvmfr")
        yield Finding("error", about, f"{path} is not yours to read and write", rule)
    else:
        has = tree.text("/sys/module/kvmfr/parameters/static_size_mb") or ""
        index = path.removeprefix(_KVMFR)
        sizes = [int(word) for word in has.split(",") if word.isdigit()]
        if backend.size and index.isdigit() and int(index) < len(sizes) and 0 < sizes[int(index)] << 20 < backend.size:
            text = f"{path} has {sizes[int(index)]} MiB, and the definition says {format_size(backend.size)}"
            yield Finding(
                "error", about, text, f"write size: {sizes[int(index)]}M, or load kvmfr with a larger static_size_mb="
            )
        else:
            yield Finding("ok", about, f"{path} is yours to use")


def enough(tree: Tree, ram: int | None, in_huge_pages: int) -> Iterator[Finding]:
    """Whether the guest's RAM, less what lies in huge pages, is there now. Bytes."""
    found = re.search(r"^MemAvailable:\s+([0-9]+) kB", tree.text("/proc/meminfo") or "", re.MULTILINE)
    if ram is None or found is None:
        return
    wanted, available = max(0, ram - in_huge_pages), int(found[1]) << 10
    if wanted > available:
        text = f"the guest's RAM is {format_size(wanted)}, and the host has {format_size(available)} to spare now"
        yield Finding("warning", "memory", text, "give the guest less (-m), or end something else first")


def in_huge_pages(tree: Tree, wanted: list[Backend]) -> int:
    """How many bytes of these backends lie in huge pages, which MemAvailable leaves out."""
    all_mounts = mounts(tree)
    return sum(backend.size or 0 for backend in wanted if huge_page_of(tree, backend, all_mounts))


# Of which NUMA node it is


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


# What this user may lock


def own_memlock(definition: VmDefinition, need: MemlockNeed | None, soft: int, hard: int) -> Iterator[Finding]:
    """What this user may lock without the helper: RLIMIT_MEMLOCK of this login, in bytes."""
    options = definition.options
    locked = ram.lockable(options)
    if need is not None and need.unaided:
        text = f"{format_limit(hard, 'all memory')} may be locked in this login, without the helper"
        yield Finding("ok", "memlock", text)
    elif need is None and locked is not None and soft < locked:
        if ram.is_locked_twice(options):
            locks = "VFIO and mem-lock=on each lock the guest's RAM, together"
        elif (who := pinned_by(options)) or has_mem_lock(options):
            several = " more than once, together" if locked > (ram.guest_ram(options) or 0) else ","
            locks = f"{who or 'mem-lock=on'} locks the guest's RAM{several}"
        else:
            return
        text = f"{locks} {format_size(locked)}, and QEMU may lock {format_limit(soft, 'all memory')}"
        yield Finding("error", "memlock", text, "leave out rlimit_memlock, or write rlimit_memlock: auto")


def pinned_together(
    tree: Tree, size: int | None, limit: int | None, others: Iterable[tuple[str, int]]
) -> Iterator[Finding]:
    """Whether a VM with iommufd= has room beside the user's `others`, which are (name, PID of QEMU).

    The limit is each process's own, and what is compared with it is the user's (incr_user_locked_vm in
    drivers/iommu/iommufd/pages.c of Linux). Bytes: `size` of the guest's RAM, None if it cannot be told; `limit`, None
    for what the helper has left.
    """
    held = {name: pinned for name, pid in others if (pinned := _pinned_by_iommufd(tree, pid))}
    total = sum(held.values()) + (size or 0)
    if not held or limit == INFINITY or (size is not None and limit is not None and total <= limit):
        return
    names = " and ".join(held)
    has = "has" if len(held) == 1 else "have"
    text = (
        f"with iommufd= the kernel counts all VMs of yours together: {names} {has} pinned "
        f"{format_size(sum(held.values()))}, this guest's RAM "
        f"{'comes to that' if size is None else f'is {format_size(size)}'}, and QEMU may lock "
        f"{'what the helper has left' if limit is None else format_size(limit)}"
    )
    enough = "true" if size is None else f"{-(-(total + MEMLOCK_OVERHEAD) >> 30)}G"
    fix = (
        "leave out iommufd=: then each counts for itself\n"
        f"or write rlimit_memlock: {enough}, and have the administrator's memlock allow it beside theirs"
    )
    yield Finding("warning", "memlock", text, fix)


def _pinned_by_iommufd(tree: Tree, pid: int) -> int:
    if "iommufd" not in (tree.text(f"/proc/{pid}/cmdline") or ""):
        return 0
    found = re.search(r"^VmPin:\s+([0-9]+) kB", tree.text(f"/proc/{pid}/status") or "", re.MULTILINE)
    return int(found[1]) << 10 if found else 0
