"""A network interface of libvirt's -> QEMU's own network with the same card, or the function of a card, passed through.

virsh makes a tap device of whatever it is. What QEMU can do by itself, without a descriptor of libvirt's, is as in
libvirt: its own network, sockets, vhost-user. Pure.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from ..options import Property
from . import domaincard, domainplaces
from .domainplaces import attribute, safe
from .drafting import Option

_OF_CARDS = ("mac", "source", "model", "address", "alias", "target", "boot", "rom", "driver", "acpi", "teaming")
_OF_FUNCTIONS = ("mac", "vlan", "source", "driver", "address", "alias", "boot", "rom", "acpi", "teaming")
_VIRTIO = {
    "virtio": "virtio-net-pci",
    "virtio-transitional": "virtio-net-pci-transitional",
    "virtio-non-transitional": "virtio-net-pci-non-transitional",
}
_SOCKETS = {"mcast": "mcast", "udp": "udp", "server": "listen", "client": "connect"}


def interface(root: ET.Element, element: ET.Element, alias: str) -> Iterator[Option]:
    """QEMU's options for the interface; `alias` is the id of its device."""
    kind = element.get("type", "")
    if kind == "hostdev":
        yield _function(root, element, alias)
        return
    ident = f"host{alias}"
    is_vhost_user = kind == "vhostuser" and element.find("source[@path]") is not None
    carried: tuple[str, ...] = _OF_CARDS
    if is_vhost_user:
        yield from _vhost_user(element, ident, alias)
        carried += ("mtu",)
    elif sockets := _sockets(element, kind):
        yield Option("netdev", ("socket", Property("id", ident), *sockets))
    else:
        ranges = list(_ranges(element)) if kind == "user" else []
        carried += ("ip",) if ranges else ()
        yield Option("netdev", ("user", Property("id", ident), *ranges), _network_remark(element, ident))
    model = safe(attribute(element, "model", "type"), "virtio" if kind in ("vdpa", "vhostuser") else "rtl8139")
    properties = [Property("netdev", ident), Property("id", alias)]
    properties += [Property("mac", mac)] if (mac := safe(attribute(element, "mac", "address"))) else []
    card = domaincard.properties(element, is_vhost_user=is_vhost_user) if model.startswith("virtio") else []
    properties += [*card, *_as_any_card(root, element)]
    lost = domaincard.lost(element, is_vhost_user=is_vhost_user)
    yield Option("device", (_VIRTIO.get(model, model), *properties), _left(element, carried, lost))


def _as_any_card(root: ET.Element, element: ET.Element) -> list[Property]:
    index = safe(attribute(element, "acpi", "index"))
    place = domainplaces.pci(root, element.find("address"))
    named = [Property("acpi-index", index)] if index else []
    return [*domainplaces.network_boot(root, element), *place, *named, *domainplaces.rom(element)]


def _left(element: ET.Element, carried: tuple[str, ...], lost: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What is to be said of all else. A link that is up is nothing to say."""
    left = dict.fromkeys(str(part.tag) for part in element if part.tag not in carried and part.get("state") != "up")
    names = (*left, *lost)
    return (f"Not carried over from the interface: {', '.join(names)}.",) if names else ()


# What it is connected to


def _sockets(element: ET.Element, kind: str) -> list[Property]:
    """Empty without an address, which libvirt refuses: virsh is not shown it."""
    way = _SOCKETS.get(kind, "")
    where = _address(element.find("source"), any_host=way == "listen")
    if not way or not where:
        return []
    local = _address(element.find("source/local")) if way == "udp" else ""
    return [Property(way, where)] + ([Property("localaddr", local)] if local else [])


def _address(element: ET.Element | None, *, any_host: bool = False) -> str:
    """HOST:PORT; '' for less."""
    if element is None:
        return ""
    host, port = (safe(element.get(name, "")) for name in ("address", "port"))
    return f"{host}:{port}" if port and (host or any_host) else ""


def _ranges(element: ET.Element) -> Iterator[Property]:
    """The guest's addresses."""
    for found in element.iterfind("ip"):
        address, prefix = safe(found.get("address", "")), safe(found.get("prefix", ""))
        if not address:
            continue
        if found.get("family") == "ipv6" or ":" in address:
            yield Property("ipv6-prefix", address)
            yield from [Property("ipv6-prefixlen", prefix)] if prefix else []
        else:
            yield Property("net", f"{address}/{prefix}" if prefix else address)


def _vhost_user(element: ET.Element, ident: str, alias: str) -> Iterator[Option]:
    """A server waits for its client, as in libvirt."""
    source = element.find("source")
    path = source.get("path", "") if source is not None else ""
    is_server = source is not None and source.get("mode") == "server"
    char = [Property("id", f"char{alias}"), Property("path", path)] + [Property("server", "on")] * is_server
    wait = safe(attribute(element, "source/reconnect[@enabled='yes']", "timeout"))
    yield Option("chardev", ("socket", *char, *([Property("reconnect", wait)] if wait else [])))
    queues = domaincard.queues(element)
    more = [Property("queues", str(queues))] if queues > 1 else []
    yield Option("netdev", ("vhost-user", Property("chardev", f"char{alias}"), *more, Property("id", ident)))


def _function(root: ET.Element, element: ET.Element, alias: str) -> Option:
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
    pair = safe(attribute(element, "teaming[@type='transient']", "persistent"))
    team = [Property("failover_pair_id", pair)] if pair else []
    properties = [Property("host", host), Property("id", alias), *team, *_as_any_card(root, element)]
    return Option("device", ("vfio-pci", *properties), (*remarks, *_left(element, _OF_FUNCTIONS)))


def _network_remark(element: ET.Element, ident: str) -> tuple[str, ...]:
    """What it was in libvirt, unless it was just this."""
    source = element.find("source")
    kind = element.get("type", "")
    if kind == "user":
        return ()
    name = safe(next(iter(source.attrib.values()), "")) if source is not None else ""
    # Of a VM that runs, a bridge of the network's is told too.
    told = safe(attribute(element, "source", "bridge"))
    bridge = told or ("virbr0" if (kind, name) == ("network", "default") else "BRIDGE")
    was = f"{safe(kind, 'odd')} {name}".strip()
    return (
        f"In libvirt: {was}. QEMU's own network (user) needs no rights, and nobody can call in. For a bridge, if "
        f"/etc/qemu/bridge.conf allows it: - netdev: [bridge, id: {ident}, br: {bridge}], and no - sandbox.",
    )
