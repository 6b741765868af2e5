"""The guest's memory as QEMU makes it by itself: huge pages and shared memory by memfd, in no folder of libvirt's.

libvirt has QEMU put such memory into files, in hugetlbfs or in a folder that it makes for each start. Both are its own.
A memfd is the same memory without a place. Which nodes of the guest's get which pages, and that huge pages are taken
before the guest runs, is as in libvirt (qemuBuildMemoryGetPagesize in its src/qemu/qemu_command.c). Pure.
"""

import re
from collections.abc import Iterator, Sequence
from mmap import PAGESIZE
from typing import NamedTuple

from ..options import Property
from .domainxml import HugePage
from .drafting import Option

_RAM, _MEMFD, _FILE = "memory-backend-ram", "memory-backend-memfd", "memory-backend-file"
_OF_FILES = ("mem-path", "discard-data")  # what the others do not have
_REMARK = "Huge pages: as many must be free as this needs, see HugePages_Free in /proc/meminfo."


class _Use(NamedTuple):
    """What a memory object is the guest's RAM by: the machine, one of its nodes, or a device."""

    node: int | None  # the guest's, None if it has none
    grows: bool  # takes no more than the guest wants
    page: HugePage | None = None


def in_no_folder(
    options: Sequence[Option], pages: Sequence[HugePage], own: Sequence[int | None] = ()
) -> Iterator[Option]:
    """The same options, their memory in huge pages where `pages` says so. Virsh has not been shown those.

    `own`: for each memory device the size of the pages that it has for itself, small ones too; None for none.
    """
    uses: dict[str, _Use] = {}
    devices = iter(own)  # virsh prints them in the XML's order
    for option in options:
        name, use = _used(option)
        size = next(devices, None) if _is_memory_device(option) else None
        if name:
            uses[name] = use._replace(page=_huge(HugePage(size, None)) if size else _page(use.node, pages))
    for option in options:
        yield _growing(_backed(option, uses), uses)


def _used(option: Option) -> tuple[str, _Use]:
    """The memory that this option makes RAM, by its id; '' if it does not."""
    found = _named(option)
    if option.bare_name == "machine":
        return found.get("memory-backend", ""), _Use(None, grows=False)
    driver = _driver(option)
    grows = driver.startswith("virtio-mem-")
    if option.bare_name != "numa" and driver != "pc-dimm" and not grows:
        return "", _Use(None, grows=False)
    number = found.get("nodeid" if option.bare_name == "numa" else "node", "")
    return found.get("memdev", ""), _Use(int(number) if re.fullmatch("[0-9]{1,4}", number) else None, grows)


def _driver(option: Option) -> str:
    return str(option.value[0]) if option.bare_name == "device" and isinstance(option.value, tuple) else ""


def _is_memory_device(option: Option) -> bool:
    return _driver(option) in ("pc-dimm", "nvdimm") or _driver(option).startswith(("virtio-mem-", "virtio-pmem-"))


def _named(option: Option) -> dict[str, str]:
    value = option.value if isinstance(option.value, tuple) else ()
    return {element.name: element.value for element in value if isinstance(element, Property)}


def _growing(option: Option, uses: dict[str, _Use]) -> Option:
    """A device that takes huge pages as it grows asks for them first, as in libvirt: without, QEMU dies of the lack."""
    name, use = _used(option)
    if not use.grows or uses[name].page is None or not isinstance(option.value, tuple) or "prealloc" in _named(option):
        return option
    return option._replace(value=(*option.value, Property("prealloc", "on")))


def _backed(option: Option, uses: dict[str, _Use]) -> Option:
    value = option.value
    if option.bare_name != "object" or not isinstance(value, tuple) or value[0] not in (_RAM, _MEMFD, _FILE):
        return option
    kind, found = value[0], _named(option)
    ident = found.get("id", "")
    if kind == _FILE and not _is_in_libvirts_folder(found.get("mem-path", ""), ident):
        return option
    rest = [e for e in value[1:] if not (kind == _FILE and isinstance(e, Property) and e.name in _OF_FILES)]
    use = uses.get(ident)
    if use is None or use.page is None:
        if kind == _FILE:
            kind = _MEMFD if found.get("share") == "on" else _RAM
        return option._replace(value=(kind, *rest))
    rest.append(Property("hugetlb", "on"))
    rest += [Property("hugetlbsize", str(use.page.size))] if use.page.size else []
    if "prealloc" not in found and not use.grows:
        rest.append(Property("prealloc", "on"))
    return option._replace(value=(_MEMFD, *rest), comments=(*option.comments, _REMARK))


def _is_in_libvirts_folder(path: str, ident: str) -> bool:
    """memory_backing_dir of its qemu.conf, a folder for the VM, which has no number yet, and the id or the device's."""
    folder, _slash, name = path.rpartition("/")
    return name in (ident, ident.removeprefix("mem")) and re.fullmatch(".*/-1-[^/]*", folder) is not None


def _page(node: int | None, pages: Sequence[HugePage]) -> HugePage | None:
    """The pages for this node."""
    found = next((page for page in pages if page.nodes is not None and node in page.nodes), None)
    return _huge(found or next((page for page in pages if page.nodes is None), None))


def _huge(page: HugePage | None) -> HugePage | None:
    """Small ones are none."""
    return None if page is None or page.size == PAGESIZE else page
