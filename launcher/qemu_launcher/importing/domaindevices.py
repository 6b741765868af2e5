"""The devices that libvirt gives to QEMU by descriptors, or by programs of its own, and QEMU's options instead.

Which they are is said here too: virsh is not shown them, see `domainshown`. Pure.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from ..options import Property
from . import domainplaces, domaintpm
from .domainaliases import aliases, overridden, overrides, shown
from .domainnetwork import interface
from .domainplaces import attribute, disk_ids, safe
from .drafting import Option
from .members import member, without_member


def is_replaced(element: ET.Element) -> bool:
    """Whether `replacements` has options for it."""
    match element.tag:
        case "interface":
            return True
        case "hostdev":
            return element.get("type") == "usb" and element.find("source/address") is None
        case "tpm":
            return attribute(element, "backend", "type") in ("emulator", "passthrough")
        case "filesystem":
            return element.find("driver[@type='virtiofs']") is not None
    return False


def replacements(root: ET.Element) -> Iterator[Option]:
    """QEMU's options for what virsh is not shown, with what there is to choose."""
    said = overrides(root)
    for option in _replacements(root, aliases(root)):
        yield overridden(option, said)


def _replacements(root: ET.Element, ids: dict[ET.Element, str]) -> Iterator[Option]:
    folders = 0
    for element in filter(is_replaced, root.iterfind("devices/*")):
        match element.tag:
            case "interface":
                yield from interface(root, element, ids[element])
            case "hostdev":
                yield _usb(element, ids[element])
            case "tpm" if attribute(element, "backend", "type") == "passthrough":
                yield from domaintpm.of_the_host(root, element)
            case "tpm":
                yield domaintpm.emulated(root, element)
            case _:
                yield _virtiofs(root, element, folders)
                folders += 1


def without_default_boot(options: Sequence[Option], root: ET.Element) -> list[Option]:
    """The options that virsh has printed: it boots from a disk by default, where it sees no device with a turn.

    The first disk, as libvirt sorts them: that is one of these. All other turns are the user's own.
    """
    turns = [is_replaced(element) for element in root.iterfind("devices/*") if element.find("boot") is not None]
    if not turns or not all(turns):
        return list(options)
    disks = [disk for disk in root.iterfind("devices/disk") if disk.get("device", "disk") in ("disk", "lun")]
    said = overrides(root).items()
    told = {ident for ident, properties in said if any(element.get("name") == "bootindex" for element in properties)}
    ids = {ident for disk in disks for ident in disk_ids(disk)} - told
    return [without_member(option, "bootindex") if _is_first(option, ids) else option for option in options]


def _is_first(option: Option, ids: set[str]) -> bool:
    return option.bare_name == "device" and member(option, "bootindex") == "1" and member(option, "id") in ids


def ids_shown(root: ET.Element) -> dict[str, str]:
    """libvirt's ids of passed-through devices -> those that virsh gives, who sees fewer of them."""
    return shown(root, [element for element in root.iterfind("devices/hostdev") if is_replaced(element)])


_GUEST_RESET = {  # of <source>, as libvirt writes it
    "off": [Property("guest-reset", "off")],
    "uninitialized": [Property("guest-reset", "on"), Property("guest-resets-all", "off")],
    "on": [Property("guest-reset", "on"), Property("guest-resets-all", "on")],
}


def _usb(element: ET.Element, alias: str) -> Option:
    """By vendor and product: QEMU takes it when it is there, and does not miss it."""
    source = element.find("source")
    properties = [
        Property(f"{tag}id", value) for tag in ("vendor", "product") if (value := safe(attribute(source, tag, "id")))
    ]
    properties.append(Property("id", alias))
    properties += _GUEST_RESET.get(source.get("guestReset", ""), []) if source is not None else []
    properties += domainplaces.boot(element) + domainplaces.usb(element.find("address"))
    remarks = ["You must be allowed to write to it: see lsusb, and /dev/bus/usb."]
    if source is not None and source.get("startupPolicy") in (None, "mandatory", "requisite"):
        remarks.append("libvirt does not start the VM without it. QEMU does, and takes it when it is plugged in.")
    return Option("device", ("usb-host", *properties), tuple(remarks))


def _virtiofs(root: ET.Element, element: ET.Element, number: int) -> Option:
    """virtiofsd is started by libvirt too, unless the XML names its socket."""
    ident = f"fs{number}"
    tag = safe(attribute(element, "target", "dir"), "TAG")
    folder = _path(attribute(element, "source", "dir"), "FOLDER")
    given = attribute(element, "source", "socket")
    socket = _path(given, f"DIR/{ident}")
    words = " ".join(["virtiofsd", f"--socket-path={socket}", f"--shared-dir={folder}", *_of_virtiofsd(element)])
    start = "A" if given else f"Start {words} yourself, and a"
    place = [*domainplaces.boot(element), *domainplaces.pci(root, element.find("address"))]
    queue = safe(attribute(element, "driver", "queue"))
    more = "".join(f", {name}: {value}" for name, value in [*([("queue-size", queue)] if queue else []), *place])
    text = (
        f"Left out: a folder shared with virtiofs. {start}dd - chardev: [socket, id: {ident}, path: {socket}] and "
        f"- device: [vhost-user-fs-pci, chardev: {ident}, tag: {tag}{more}]"
    )
    left = [path for path in ("binary/lock", "idmap") if element.find(path) is not None]
    return Option("device", None, (text, *([f"Not carried over: {', '.join(left)}."] if left else [])), left_out=True)


def _of_virtiofsd(element: ET.Element) -> Iterator[str]:
    """The options of virtiofsd 1.12; older ones have no --readonly, and refuse it."""
    if element.find("readonly") is not None:
        yield "--readonly"
    if attribute(element, "binary", "xattr") == "on":
        yield "--xattr"
    for path, name, option in (("cache", "mode", "cache"), ("sandbox", "mode", "sandbox"), ("thread_pool", "size", "")):
        if value := safe(attribute(element, f"binary/{path}", name)):
            yield f"--{option or 'thread-pool-size'}={'never' if (path, value) == ('cache', 'none') else value}"


def _path(text: str, default: str) -> str:
    """`text` if it can be pasted as it is, into a shell's line too."""
    return text if re.fullmatch(r"[A-Za-z0-9_./+-]{1,256}", text) else default
