"""What libvirt's XML says of any device, as properties of QEMU's: its place, its turn at the boot, its ROM. Pure."""

import re
import xml.etree.ElementTree as ET

from ..options import Property

_SAFE = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_OWN_ALIAS = re.compile("ua-[A-Za-z0-9_-]+")
_PCI = {"domain": 1 << 32, "bus": 256, "slot": 32, "function": 8}  # how many there are; a domain is Linux's number


def attribute(element: ET.Element | None, path: str, name: str) -> str:
    """An attribute of what stands below `element`; '' if there is none."""
    found = element.find(path) if element is not None else None
    return found.get(name, "") if found is not None else ""


def safe(text: str, default: str = "") -> str:
    """`text` if it is a plain word, as nearly all attributes are."""
    return text if _SAFE.fullmatch(text) else default


def own_alias(element: ET.Element) -> str:
    """The id that the user has given to it; '' if libvirt chooses one, as it does in place of odd ones."""
    name = attribute(element, "alias", "name")
    return name if _OWN_ALIAS.fullmatch(name) else ""


def boot(element: ET.Element) -> list[Property]:
    """bootindex."""
    return [Property("bootindex", order)] if (order := safe(attribute(element, "boot", "order"))) else []


def network_boot(root: ET.Element, element: ET.Element) -> list[Property]:
    """The same of an interface: <os><boot dev='network'/> is for the first (qemuProcessPrepareDeviceBootorder)."""
    devices = [found.get("dev") for found in root.iterfind("os/boot")]
    is_first = element is root.find("devices/interface")
    turn = [Property("bootindex", str(devices.index("network") + 1))] if is_first and "network" in devices else []
    return boot(element) or turn


def rom(element: ET.Element) -> list[Property]:
    """rombar and romfile."""
    found = element.find("rom")
    if found is None:
        return []
    if found.get("enabled") == "no":
        return [Property("romfile", "")]
    bar = {"on": [Property("rombar", "1")], "off": [Property("rombar", "0")]}.get(found.get("bar", ""), [])
    return bar + ([Property("romfile", file)] if (file := found.get("file")) else [])


def pci(root: ET.Element, address: ET.Element | None) -> list[Property]:
    """bus and addr, as libvirt writes them. Nothing without an address: QEMU finds a place."""
    if address is None or address.get("type") != "pci":
        return []
    numbers = _numbers(address)
    if numbers is None:
        return []
    _domain, bus, slot, function = numbers
    machine = attribute(root, "os/type", "machine")
    is_express = "q35" in machine or root.find("devices/controller[@model='pcie-root']") is not None
    more = [Property("multifunction", "on")] if address.get("multifunction") == "on" else []
    name = f"pci.{bus}" if bus or not is_express else "pcie.0"
    return [Property("bus", name), *more, Property("addr", f"{slot:#x}" + (f".{function:#x}" if function else ""))]


def pci_name(address: ET.Element | None) -> str:
    """A device of the host's, 0000:01:00.0."""
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*(_numbers(address) or (0, 0, 0, 0)))


def _numbers(address: ET.Element | None) -> tuple[int, ...] | None:
    """Domain, bus, slot and function; None for what PCI does not have."""
    try:
        found = tuple(int((address.attrib if address is not None else {}).get(name, "0"), 0) for name in _PCI)
    except ValueError:
        return None
    return found if all(0 <= number < end for number, end in zip(found, _PCI.values(), strict=True)) else None


def usb(address: ET.Element | None) -> list[Property]:
    """bus and port: the controller of index 0 is `usb`, the next ones are `usb1`, `usb2`."""
    if address is None or address.get("type") != "usb":
        return []
    bus, port = safe(address.get("bus", "0")), safe(address.get("port", ""))
    if not bus or not port:
        return []
    return [Property("bus", f"usb{'' if bus == '0' else bus}.0"), Property("port", port)]


def disk_ids(disk: ET.Element) -> list[str]:
    """The ids, one of which libvirt gives to the device of this disk (qemuAssignDeviceDiskAlias, qemu_alias.c)."""
    if own := own_alias(disk):
        return [own]
    index = _disk_index(attribute(disk, "target", "dev"))
    bus = attribute(disk, "target", "bus") or _BUSES.get(attribute(disk, "target", "dev")[:2], "")
    if index is None or bus not in _DISKS_OF_A_CONTROLLER:
        return [] if index is None else [f"{bus}-disk{index}"]
    controller, unit = divmod(index, _DISKS_OF_A_CONTROLLER[bus])
    place = {"controller": str(controller), "bus": "0", "target": "0", "unit": str(unit)}
    if bus == "ide":
        place |= {"bus": str(unit // 2), "unit": str(unit % 2)}
    address = disk.find("address[@type='drive']")
    if address is not None:
        place = {name: address.get(name, "0") for name in place}
    ids = [f"{bus}{place['controller']}-{place['bus']}-{place['unit']}"]
    # SCSI has targets too, but for one kind of controller.
    return ids if bus != "scsi" else [f"{bus}{'-'.join(place.values())}", *ids]


_BUSES = {"hd": "ide", "sd": "scsi", "vd": "virtio", "fd": "fdc"}
_DISKS_OF_A_CONTROLLER = {"ide": 4, "sata": 6, "fdc": 2, "scsi": 7}


def _disk_index(target: str) -> int | None:
    """`a` of vda is 0, `aa` is 26."""
    found = re.fullmatch("(?:fd|hd|vd|sd|xvd|ubd)([a-z]{1,3})", target)
    if found is None:
        return None
    index = 0
    for letter in found[1]:
        index = index * 26 + ord(letter) - ord("a") + 1
    return index - 1
