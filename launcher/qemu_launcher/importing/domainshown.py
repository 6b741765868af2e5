"""The XML of a VM as virsh shall see it: without what it would want to have at hand, or take from the host.

domxml-to-native opens tap devices; it wants USB devices plugged in, and secrets, numad and hugetlbfs at hand. None of
that is of use to who starts QEMU himself. `domaindevices`, `domainmemory` and `domainkeys` have what is left out here.
Pure.
"""

import copy
import xml.etree.ElementTree as ET

from ..errors import DefinitionError
from .domainaliases import aliases
from .domaindevices import ids_shown, is_replaced
from .domainplaces import attribute, safe
from .domainxml import QEMU_NAMESPACE

# Nothing of this is on a command line, and a libvirt that is not root's refuses some of it.
_NOT_FOR_VIRSH = ("metadata", "seclabel", "resource", "cputune", "memtune", "blkiotune", "memoryBacking/hugepages")


def prepared(root: ET.Element) -> bytes:
    """The XML that virsh shall see. Raises DefinitionError for disks that would not be what they are."""
    for disk in root.iterfind("devices/disk[transient]"):
        name = safe(attribute(disk, "target", "dev"), "?")
        raise DefinitionError(
            f"the disk {name} is transient in libvirt, which throws away what the guest writes: here it would stay",
            "if it may, take <transient/> out of a copy of the XML, and import the copy; QEMU's own way to throw it "
            "away is - drive: [..., snapshot: on] in place of the disk's blockdevs",
        )
    whole = copy.deepcopy(root)
    for path in _NOT_FOR_VIRSH:
        folder, _slash, tag = path.rpartition("/")
        parent = whole if not folder else whole.find(folder)
        for element in [] if parent is None else parent.findall(tag):
            parent.remove(element)  # type: ignore[union-attr]  # None has no elements
    _without_numad(whole)
    _with_ids_of_virsh(whole)
    devices = whole.find("devices")
    for element in [] if devices is None else list(devices):
        if is_replaced(element):
            devices.remove(element)  # type: ignore[union-attr]  # as above
        elif element.tag == "memory":
            _without_pagesize(element)
        elif element.tag == "hostdev" and element.get("type") == "pci" and element.find("driver") is None:
            element.append(ET.Element("driver", {"name": "vfio"}))  # what libvirt chooses when it starts it
    return ET.tostring(whole)


def _with_ids_of_virsh(whole: ET.Element) -> None:
    """<qemu:override> of what virsh is not shown is not for it: to virsh the same id is another device's."""
    names = ids_shown(whole)
    hidden = {ident for element, ident in aliases(whole).items() if is_replaced(element)}
    for override in whole.iterfind(f"{QEMU_NAMESPACE}override"):
        for device in override.findall(f"{QEMU_NAMESPACE}device"):
            alias = device.get("alias", "")
            if alias in hidden:
                override.remove(device)
            else:
                device.set("alias", names.get(alias, alias))


def _without_pagesize(device: ET.Element) -> None:
    """Pages of a memory device's own, which are hugetlbfs to libvirt as all others are."""
    source = device.find("source")
    for page in [] if source is None else source.findall("pagesize"):
        source.remove(page)  # type: ignore[union-attr]  # as above


def _without_numad(whole: ET.Element) -> None:
    """placement=auto means that numad says where, and only to a libvirt that starts the VM."""
    numatune, vcpu = whole.find("numatune"), whole.find("vcpu")
    for memory in [] if numatune is None else numatune.findall("memory"):
        if memory.get("nodeset") is None:
            numatune.remove(memory)  # type: ignore[union-attr]  # as above
    if vcpu is not None and vcpu.get("placement") == "auto":
        del vcpu.attrib["placement"]
