"""The devices that libvirt gives to QEMU by descriptors, or by programs of its own, and QEMU's options instead.

Which they are is said here too: virsh is not shown them, see `domainshown`. Pure.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..options import Property
from . import domainplaces
from .domainnetwork import interface
from .domainplaces import attribute, safe
from .drafting import Option


def is_replaced(element: ET.Element) -> bool:
    """Whether `replacements` has options for it."""
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
    """QEMU's options for what virsh is not shown, with what there is to choose."""
    number = 0
    for element in root.iterfind("devices/*"):
        if not is_replaced(element):
            continue
        match element.tag:
            case "interface":
                yield from interface(root, element, number)
                number += 1
            case "hostdev":
                yield _usb(element)
            case "tpm":
                yield Option("tpmdev", None, (_TPM,), left_out=True)
            case _:
                yield Option("device", None, (_VIRTIOFS,), left_out=True)


_GUEST_RESET = {  # of <source>, as libvirt writes it
    "off": [Property("guest-reset", "off")],
    "uninitialized": [Property("guest-reset", "on"), Property("guest-resets-all", "off")],
    "on": [Property("guest-reset", "on"), Property("guest-resets-all", "on")],
}


def _usb(element: ET.Element) -> Option:
    """By vendor and product: QEMU takes it when it is there, and does not miss it."""
    source = element.find("source")
    properties = [
        Property(f"{tag}id", value) for tag in ("vendor", "product") if (value := safe(attribute(source, tag, "id")))
    ]
    name = safe(attribute(element, "alias", "name"))
    properties += [Property("id", name)] if name.startswith("ua-") else []
    properties += _GUEST_RESET.get(source.get("guestReset", ""), []) if source is not None else []
    properties += domainplaces.boot(element) + domainplaces.usb(element.find("address"))
    remarks = ["You must be allowed to write to it: see lsusb, and /dev/bus/usb."]
    if source is not None and source.get("startupPolicy") in (None, "mandatory", "requisite"):
        remarks.append("libvirt does not start the VM without it. QEMU does, and takes it when it is plugged in.")
    return Option("device", ("usb-host", *properties), tuple(remarks))


_TPM = (
    "Left out: the emulated TPM. Start swtpm socket --tpm2 --tpmstate dir=DIR --ctrl type=unixio,path=DIR/sock "
    "yourself, and add - chardev: [socket, id: tpm, path: DIR/sock], - tpmdev: [emulator, id: tpm0, chardev: tpm] "
    "and - device: [tpm-crb, tpmdev: tpm0]"
)
_VIRTIOFS = (
    "Left out: a folder shared with virtiofs. Start virtiofsd --socket-path=DIR/sock --shared-dir=FOLDER yourself, and "
    "add - chardev: [socket, id: fs0, path: DIR/sock] and - device: [vhost-user-fs-pci, chardev: fs0, tag: TAG]"
)
