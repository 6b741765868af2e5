"""The ids that libvirt gives to network interfaces and passed-through devices, which -set and <qemu:override> go by.

virsh is not shown all of these, and counts those that it is shown; the numbers are libvirt's own again here. What
<qemu:override> says of a device that virsh has not seen, is done here too. As in libvirt's qemu_alias.c. Pure.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..options import Property
from .domainplaces import own_alias
from .domainxml import QEMU_NAMESPACE
from .drafting import Option


def aliases(root: ET.Element) -> dict[ET.Element, str]:
    """The ids, by the elements of the XML."""
    interfaces = root.findall("devices/interface")
    functions = [element for element in interfaces if element.get("type") == "hostdev"]
    cards = [element for element in interfaces if element.get("type") != "hostdev"]
    hostdevs = [*functions, *root.iterfind("devices/hostdev")]
    return dict([*_numbered("hostdev", hostdevs), *_numbered("net", cards)])


def _numbered(prefix: str, elements: Iterable[ET.Element]) -> Iterator[tuple[ET.Element, str]]:
    number = 0
    for element in elements:
        if own := own_alias(element):
            yield element, own
        else:
            yield element, f"{prefix}{number}"
            number += 1


def shown(root: ET.Element, hidden: Sequence[ET.Element]) -> dict[str, str]:
    """libvirt's ids of what virsh is shown -> the ids that virsh gives. `hidden` are elements of `root`."""
    unseen = set(hidden)
    visible = [element for element in root.iterfind("devices/hostdev") if element not in unseen]
    ids = aliases(root)
    return {ids[element]: ident for element, ident in _numbered("hostdev", visible)}


def renamed(options: Sequence[Option], names: dict[str, str]) -> Iterator[Option]:
    """The options that virsh has printed, with libvirt's ids; `names` as `shown` gives them."""
    back = {Property("id", given): Property("id", own) for own, given in names.items()}
    for option in options:
        if option.bare_name != "device" or not isinstance(option.value, tuple):
            yield option
        else:
            value = (back.get(e, e) if isinstance(e, Property) else e for e in option.value)
            yield option._replace(value=tuple(value))


def overrides(root: ET.Element) -> dict[str, list[ET.Element]]:
    """What <qemu:override> says, by the ids of the devices."""
    found: dict[str, list[ET.Element]] = {}
    for device in root.iterfind(f"{QEMU_NAMESPACE}override/{QEMU_NAMESPACE}device"):
        properties = device.findall(f"{QEMU_NAMESPACE}frontend/{QEMU_NAMESPACE}property")
        found.setdefault(device.get("alias", ""), []).extend(properties)
    return found


def overridden(option: Option, said: Mapping[str, Sequence[ET.Element]]) -> Option:
    """A device that virsh has not seen, with what <qemu:override> says of it; `said` as `overrides` gives it."""
    if option.bare_name != "device" or not isinstance(option.value, tuple):
        return option
    driver, *given = option.value
    properties = {element.name: element.value for element in given if isinstance(element, Property)}
    for element in said.get(properties.get("id", ""), ()):
        name, kind, value = (element.get(what, "") for what in ("name", "type", "value"))
        if kind == "remove":
            properties.pop(name, None)
        else:
            properties[name] = {"true": "on", "false": "off"}.get(value, value) if kind == "bool" else value
    return option._replace(value=(driver, *(Property(*pair) for pair in properties.items())))
