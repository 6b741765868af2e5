"""What libvirt's XML says of a virtio network card, in <driver>, as QEMU's properties (qemuBuildNicDevProps). Pure."""

import re
import xml.etree.ElementTree as ET

from ..options import Property
from .domainplaces import attribute, safe

_OFFLOADS = ("csum", "gso", "tso4", "tso6", "ecn", "ufo")
_NAMES = {  # of <driver>
    "txmode": "tx",
    "ioeventfd": "ioeventfd",
    "event_idx": "event_idx",
    "rss": "rss",
    "rss_hash_report": "hash",
    "rx_queue_size": "rx_queue_size",
    "iommu": "iommu_platform",
    "ats": "ats",
    "packed": "packed",
    "page_per_vq": "page-per-vq",
}
_WAYS = {"iothread": "bh", "timer": "timer"}
_OF_THE_HOST = ("name",)  # where the packets are worked on


def properties(element: ET.Element, *, is_vhost_user: bool) -> list[Property]:
    """Several queues and large packets, only what is connected to vhost-user has."""
    driver = element.find("driver")
    attributes = dict(driver.attrib) if driver is not None else {}
    found = [(_NAMES[name], _WAYS.get(value, value)) for name, value in attributes.items() if name in _NAMES]
    for whose in ("host", "guest"):
        part = element.find(f"driver/{whose}")
        for name, value in part.attrib.items() if part is not None else ():
            if name in _OFFLOADS:
                found.append((name if whose == "host" and name in ("csum", "gso") else f"{whose}_{name}", value))
            elif name == "mrg_rxbuf":
                found.append((name, value))
    if element.find("teaming[@type='persistent']") is not None:
        found.append(("failover", "on"))
    if is_vhost_user:
        count = queues(element)
        found += [("mq", "on"), ("vectors", str(2 * count + 2))] if count > 1 else []
        found += [("tx_queue_size", attributes.get("tx_queue_size", ""))]
        found += [("host_mtu", attribute(element, "mtu", "size"))]
    return [Property(name, value) for name, value in found if safe(value)]


def queues(element: ET.Element) -> int:
    """What is no number, libvirt has refused; 0 is 1 to it."""
    text = attribute(element, "driver", "queues")
    return int(text) if re.fullmatch("[0-9]{1,5}", text) else 1


def lost(element: ET.Element, *, is_vhost_user: bool) -> tuple[str, ...]:
    """Those of <driver> that have no place there."""
    driver = element.find("driver")
    kept = (*_NAMES, *_OF_THE_HOST, *(("queues", "tx_queue_size") if is_vhost_user else ()))
    return tuple(f"driver {name}" for name in (driver.attrib if driver is not None else ()) if name not in kept)
