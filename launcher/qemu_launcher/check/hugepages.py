"""Huge pages: whether the host has as many as the guest's RAM takes, and whether their mounts are this user's.

Documentation/admin-guide/mm/hugetlbpage.rst has the files of the pools. Pure judgement over a Tree.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..cpulist import format_cpulist
from ..sizes import format_size
from . import nodes
from .asked import Backend
from .finding import Finding
from .tree import ENTER, READ, WRITE, Tree

POOLS = "/sys/kernel/mm/hugepages"
_READ_AGAIN = "then read it again: the kernel gives as many as it finds unbroken memory for"
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


def in_huge_pages(tree: Tree, wanted: list[Backend]) -> int:
    """How many bytes of these backends lie in huge pages, which MemAvailable leaves out."""
    all_mounts = mounts(tree)
    return sum(backend.size or 0 for backend in wanted if huge_page_of(tree, backend, all_mounts))
