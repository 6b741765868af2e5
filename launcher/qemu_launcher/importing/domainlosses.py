"""What libvirt's XML asks for, and neither virsh's command line nor a definition has: by name, for a comment. Pure.

Left out are things that libvirt does for itself: its labels, its metadata, what it makes on the host.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from . import domainxml
from .domainplaces import attribute, safe

_TUNED = ("vcpupin", "emulatorpin", "iothreadpin", "vcpusched", "emulatorsched")
# What a guest's end leads to, where it is as with QEMU alone. on_reboot: destroy is an option of QEMU's.
_ENDS = {"on_poweroff": ("destroy",), "on_reboot": ("restart", "destroy"), "on_crash": ("destroy",)}
_WORD = re.compile(r"[a-z-]{1,32}")


def not_carried(root: ET.Element) -> tuple[str, ...]:
    """The names, each once. Raises DefinitionError for sizes of memory that cannot be."""
    return tuple(dict.fromkeys([*_of_threads(root), *_of_memory(root), *_of_disks(root), *_of_the_end(root)]))


def _of_threads(root: ET.Element) -> Iterator[str]:
    yield from (str(element.tag) for element in root.iterfind("cputune/*") if element.tag not in _TUNED)
    yield from ("placement=auto" for _element in root.iterfind("vcpu[@placement='auto']"))
    yield from (f"cpu {element.tag}" for element in root.iterfind("cpu/cache[@mode='emulate']"))


def _of_memory(root: ET.Element) -> Iterator[str]:
    yield from (str(element.tag) for element in root.iterfind("memtune/*") if element.tag != "hard_limit")
    yield from (f"numatune {element.tag} restrictive" for element in root.iterfind("numatune/*[@mode='restrictive']"))
    yield from ("placement=auto" for _element in root.iterfind("numatune/*[@placement='auto']"))
    whole, current = root.find("memory"), root.find("currentMemory")
    if whole is not None and current is not None and (domainxml.size(current) or 0) < (domainxml.size(whole) or 0):
        yield "currentMemory"


def _of_disks(root: ET.Element) -> Iterator[str]:
    """For their <iotune> see `domainthrottling`."""
    yield from ("blkiotune" for _element in root.iterfind("blkiotune"))
    yield from ("lease" for _element in root.iterfind("devices/lease"))
    for disk in root.iterfind("devices/disk[source]"):
        policy = attribute(disk, "source", "startupPolicy")
        if policy in ("optional", "requisite"):
            yield f"startupPolicy of {safe(attribute(disk, 'target', 'dev'), 'a disk')}"


def _of_the_end(root: ET.Element) -> Iterator[str]:
    for tag, same in _ENDS.items():
        what = root.findtext(tag) or same[0]
        if what not in same:
            yield f"{tag}={what}" if _WORD.fullmatch(what) else tag
