"""A network interface of libvirt's -> QEMU's own network with the same card, or the function of a card, passed through.

libvirt opens a tap device for whatever it is, and prints the descriptor's number. Pure.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..options import Property
from . import domainplaces
from .domainplaces import attribute, safe
from .drafting import Option

_OF_CARDS = ("mac", "source", "model", "address", "alias", "target", "boot", "rom")
_OF_FUNCTIONS = ("mac", "vlan", "source", "driver", "address", "alias", "boot", "rom")
_VIRTIO = {
    "virtio": "virtio-net-pci",
    "virtio-transitional": "virtio-net-pci-transitional",
    "virtio-non-transitional": "virtio-net-pci-non-transitional",
}


def interface(root: ET.Element, element: ET.Element, number: int) -> Iterator[Option]:
    """QEMU's options for the interface, which is the `number`-th of the VM."""
    if element.get("type") == "hostdev":
        yield _function(root, element)
        return
    ident, net = f"hostnet{number}", f"net{number}"
    yield Option("netdev", ("user", Property("id", ident)), _network_remark(element, ident))
    model = safe(attribute(element, "model", "type"), "rtl8139")
    properties = [Property("netdev", ident), Property("id", net)]
    properties += [Property("mac", mac)] if (mac := safe(attribute(element, "mac", "address"))) else []
    properties += _as_any_card(root, element)
    yield Option("device", (_VIRTIO.get(model, model), *properties), _left(element, _OF_CARDS))


def _as_any_card(root: ET.Element, element: ET.Element) -> list[Property]:
    place = domainplaces.pci(root, element.find("address"))
    return [*domainplaces.boot(element), *place, *domainplaces.rom(element)]


def _left(element: ET.Element, carried: tuple[str, ...]) -> tuple[str, ...]:
    left = dict.fromkeys(str(part.tag) for part in element if part.tag not in carried)
    return (f"Not carried over from the interface: {', '.join(left)}.",) if left else ()


def _function(root: ET.Element, element: ET.Element) -> Option:
    """SR-IOV: what the card shall do for its function, libvirt tells it by netlink before the guest starts."""
    host = domainplaces.pci_name(element.find("source/address"))
    mac, vlan = safe(attribute(element, "mac", "address")), safe(attribute(element, "vlan/tag", "id"))
    words = [f"{name} {value}" for name, value in (("mac", mac), ("vlan", vlan)) if value]
    remarks: tuple[str, ...] = ()
    if words:
        remarks = (
            f"libvirt tells the card before the start, and you must now: ip link set PF vf N {' '.join(words)}. PF is "
            f"the card, N the number of its function {host}: see virtfnN in /sys/class/net/PF/device.",
        )
    properties = [Property("host", host), *_as_any_card(root, element)]
    return Option("device", ("vfio-pci", *properties), (*remarks, *_left(element, _OF_FUNCTIONS)))


def _network_remark(element: ET.Element, ident: str) -> tuple[str, ...]:
    """What it was in libvirt, unless it was just this."""
    source = element.find("source")
    kind = element.get("type", "")
    if kind == "user":
        return ()
    name = safe(next(iter(source.attrib.values()), "")) if source is not None else ""
    bridge = (
        (name or "BRIDGE") if kind == "bridge" else "virbr0" if (kind, name) == ("network", "default") else "BRIDGE"
    )
    was = f"{safe(kind, 'odd')} {name}".strip()
    return (
        f"In libvirt: {was}. QEMU's own network (user) needs no rights, and nobody can call in. For a bridge, if "
        f"/etc/qemu/bridge.conf allows it: - netdev: [bridge, id: {ident}, br: {bridge}], and no - sandbox.",
    )
