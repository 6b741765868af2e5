"""What virsh prints for a start at this very moment, or leaves for libvirtd to fill in: here the form that lasts. Pure.

A clock that is ahead is printed as the date that it has just now, and the guest would start with that date for ever.
A number that libvirt chooses at the start is printed as one that QEMU refuses.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from ..options import Property
from .domainplaces import attribute, safe
from .drafting import Option

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}")
_AHEAD = (
    "In libvirt this clock is another: adjustment={} to {}. That cannot be written here, so it is {} itself until the "
    "guest sets it, at each start."
)
_CID = "libvirt chooses a free number when it starts the VM: no other VM may have this guest-cid."
_VSOCK = "libvirt opens /dev/vhost-vsock for QEMU: you must be allowed to write to it."


def lasting(options: Sequence[Option], root: ET.Element) -> Iterator[Option]:
    """The same options, none of them for this moment alone."""
    for option in options:
        value = option.value
        driver = value[0] if isinstance(value, tuple) else ""
        if option.bare_name == "rtc":
            yield _clock(option, root.find("clock"))
        elif option.bare_name == "vnc":
            # libvirt takes the first free port from 5700 on; QEMU's own choice is 5700 and its display's number.
            yield _with(option, {Property("websocket", "-1"): Property("websocket", "on")})
        elif option.bare_name == "device" and isinstance(driver, str) and driver.startswith("vhost-vsock-"):
            yield _vsock(option)
        else:
            yield option


def environment(root: ET.Element) -> dict[str, str]:
    """What libvirt says in QEMU's environment: the local time of a clock with a zone, and what SDL plays by."""
    said = {
        "TZ": attribute(root, "clock[@offset='timezone']", "timezone"),
        "SDL_AUDIODRIVER": attribute(root, "devices/audio[@type='sdl']", "driver"),
    }
    return {name: value for name, value in said.items() if value}


def _with(option: Option, new: dict[Property, Property | None], *comments: str) -> Option:
    if not isinstance(option.value, tuple):
        return option
    value = (new.get(element, element) if isinstance(element, Property) else element for element in option.value)
    return option._replace(
        value=tuple(element for element in value if element is not None), comments=(*option.comments, *comments)
    )


def _clock(option: Option, clock: ET.Element | None) -> Option:
    if clock is None or clock.get("offset") == "absolute" or not isinstance(option.value, tuple):
        return option
    base = next((e for e in option.value if isinstance(e, Property) and e.name == "base"), None)
    if base is None or not _DATE.fullmatch(base.value):
        return option
    basis = clock.get("basis", "utc") if clock.get("offset") == "variable" else clock.get("offset", "utc")
    basis = basis if basis in ("utc", "localtime") else "localtime"  # with the zone of `environment`
    seconds = safe(clock.get("adjustment", "0"), "?")
    said = () if seconds == "0" else (_AHEAD.format(seconds, basis, basis),)
    return _with(option, {base: Property("base", basis)}, *said)


def _vsock(option: Option) -> Option:
    elements = [element for element in option.value or () if isinstance(element, Property)]
    automatic = Property("guest-cid", "0")
    new: dict[Property, Property | None] = {element: None for element in elements if element.name == "vhostfd"}
    comments = (_VSOCK, _CID) if automatic in elements else (_VSOCK,)
    return _with(option, {**new, automatic: Property("guest-cid", "3")}, *comments)
