"""The devices that libvirt gives to QEMU by descriptors, or by programs of its own: taken out, and replaced.

domxml-to-native opens a tap device for every network interface, of whatever kind, and prints the descriptor's number;
it wants USB devices plugged in and secrets and hugetlbfs at hand. None of that is of use to who starts QEMU himself.
So `prepared` makes an XML without them for virsh, and `replacements` has QEMU's own options instead.
"""

import copy
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..errors import DefinitionError
from ..options import Property
from .drafting import Option

# Nothing of this is on a command line, and a libvirt that is not root's refuses some of it.
_NOT_FOR_VIRSH = ("metadata", "seclabel", "resource", "cputune", "memtune", "blkiotune", "memoryBacking/hugepages")
_CARRIED = ("mac", "source", "model", "address", "alias", "target", "boot")  # of an interface
_SAFE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


def prepared(root: ET.Element) -> bytes:
    """The XML that virsh shall see. Raises DefinitionError for disks that would not be what they are."""
    for disk in root.iterfind("devices/disk[transient]"):
        name = _safe(_attribute(disk, "target", "dev"), "?")
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
    devices = whole.find("devices")
    for element in [] if devices is None else list(devices):
        if _is_replaced(element):
            devices.remove(element)  # type: ignore[union-attr]  # as above
        elif element.tag == "hostdev" and element.get("type") == "pci" and element.find("driver") is None:
            element.append(ET.Element("driver", {"name": "vfio"}))  # what libvirt chooses when it starts it
    return ET.tostring(whole)


def _without_numad(whole: ET.Element) -> None:
    """placement=auto means that numad says where, and only to a libvirt that starts the VM."""
    numatune, vcpu = whole.find("numatune"), whole.find("vcpu")
    for memory in [] if numatune is None else numatune.findall("memory"):
        if memory.get("nodeset") is None:
            numatune.remove(memory)  # type: ignore[union-attr]  # as above
    if vcpu is not None and vcpu.get("placement") == "auto":
        del vcpu.attrib["placement"]


def _is_replaced(element: ET.Element) -> bool:
    match element.tag:
        case "interface":
            return True
        case "hostdev":
            return element.get("type") == "usb" and element.find("source/address") is None
        case "tpm":
            return element.find("backend[@type='emulator']") is not None
        case "filesystem":
            return element.find("driver[@type='virtiofs']") is not None
    return False


def replacements(root: ET.Element) -> Iterator[Option]:
    """QEMU's options for what `prepared` leaves out, with what there is to choose."""
    number = 0
    for element in root.iterfind("devices/*"):
        if not _is_replaced(element):
            continue
        match element.tag:
            case "interface":
                yield from _interface(root, element, number)
                number += 1
            case "hostdev":
                yield _usb(element)
            case "tpm":
                yield Option("tpmdev", None, (_TPM,), left_out=True)
            case _:
                yield Option("device", None, (_VIRTIOFS,), left_out=True)


_TPM = (
    "Left out: the emulated TPM. Start swtpm socket --tpm2 --tpmstate dir=DIR --ctrl type=unixio,path=DIR/sock "
    "yourself, and add - chardev: [socket, id: tpm, path: DIR/sock], - tpmdev: [emulator, id: tpm0, chardev: tpm] "
    "and - device: [tpm-crb, tpmdev: tpm0]"
)
_VIRTIOFS = (
    "Left out: a folder shared with virtiofs. Start virtiofsd --socket-path=DIR/sock --shared-dir=FOLDER yourself, and "
    "add - chardev: [socket, id: fs0, path: DIR/sock] and - device: [vhost-user-fs-pci, chardev: fs0, tag: TAG]"
)


def _interface(root: ET.Element, element: ET.Element, number: int) -> Iterator[Option]:
    if element.get("type") == "hostdev":
        yield Option("device", ("vfio-pci", Property("host", _pci_name(element.find("source/address")))))
        return
    ident, net = f"hostnet{number}", f"net{number}"
    yield Option("netdev", ("user", Property("id", ident)), _network_remark(element, ident))
    model = _safe(_attribute(element, "model", "type"), "rtl8139")
    properties = [Property("netdev", ident), Property("id", net)]
    properties += [Property("mac", mac)] if (mac := _safe(_attribute(element, "mac", "address"))) else []
    properties += [Property("bootindex", n)] if (n := _safe(_attribute(element, "boot", "order"))) else []
    properties += _place(root, element.find("address"))
    left = [str(part.tag) for part in element if part.tag not in _CARRIED]
    remark = (f"Not carried over from the interface: {', '.join(dict.fromkeys(left))}.",) if left else ()
    yield Option("device", (model if model != "virtio" else "virtio-net-pci", *properties), remark)


def _network_remark(element: ET.Element, ident: str) -> tuple[str, ...]:
    """What it was in libvirt, unless it was just this."""
    source = element.find("source")
    kind = element.get("type", "")
    if kind == "user":
        return ()
    name = _safe(next(iter(source.attrib.values()), "")) if source is not None else ""
    bridge = (
        (name or "BRIDGE") if kind == "bridge" else "virbr0" if (kind, name) == ("network", "default") else "BRIDGE"
    )
    was = f"{_safe(kind, 'odd')} {name}".strip()
    return (
        f"In libvirt: {was}. QEMU's own network (user) needs no rights, and nobody can call in. For a bridge, if "
        f"/etc/qemu/bridge.conf allows it: - netdev: [bridge, id: {ident}, br: {bridge}], and no - sandbox.",
    )


def _usb(element: ET.Element) -> Option:
    found = [
        Property(f"{tag}id", value)
        for tag in ("vendor", "product")
        if (value := _safe(_attribute(element.find("source"), tag, "id")))
    ]
    return Option("device", ("usb-host", *found), ("You must be allowed to write to it: see lsusb, and /dev/bus/usb.",))


def _place(root: ET.Element, address: ET.Element | None) -> list[Property]:
    """bus and addr, as libvirt writes them. Nothing without an address: QEMU finds a place."""
    if address is None or address.get("type") != "pci":
        return []
    try:
        bus, slot, function = (int(address.get(name, "0"), 0) for name in ("bus", "slot", "function"))
    except ValueError:
        return []
    machine = _attribute(root, "os/type", "machine")
    is_express = "q35" in machine or root.find("devices/controller[@model='pcie-root']") is not None
    more = [Property("multifunction", "on")] if address.get("multifunction") == "on" else []
    name = f"pci.{bus}" if bus or not is_express else "pcie.0"
    return [Property("bus", name), *more, Property("addr", f"{slot:#x}" + (f".{function:#x}" if function else ""))]


def _pci_name(address: ET.Element | None) -> str:
    try:
        numbers = [int((address.attrib if address is not None else {}).get(name, "0"), 0) for name in _PCI]
    except ValueError:
        return "0000:00:00.0"
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


_PCI = ("domain", "bus", "slot", "function")


def _attribute(element: ET.Element | None, path: str, name: str) -> str:
    found = element.find(path) if element is not None else None
    return found.get(name, "") if found is not None else ""


def _safe(text: str, default: str = "") -> str:
    """`text` if it is a plain word, as all of these are."""
    return text if _SAFE.fullmatch(text) else default
