"""The options of the `qemu` section as values, and the questions the launcher asks about them.

What an option means is QEMU's business, save for the few that change how the launcher itself must act. `optionlist`
reads them, and `cmdline` is the one place that writes them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from .errors import Mark

# The name that the first element has where it is written without one: qemu_*_opts.implied_opt_name of QEMU.
IMPLIED = {
    "device": "driver", "object": "qom-type", "machine": "type", "M": "type", "accel": "accel", "display": "type",
    "chardev": "backend", "audiodev": "driver", "audio": "driver", "blockdev": "driver", "cpu": "model",
    "smp": "cpus", "netdev": "type", "nic": "type", "numa": "type", "m": "size",
}  # fmt: skip
_NEVER_JSON = ("m", "machine", "M")  # qemu_init of QEMU's system/vl.c
_ON = "on"
_LONGEST_NAME = 256  # characters, of one that has others in it. QEMU has none of 100; each is a part of all within it
_JSON_DRIVER = re.compile(r"""["'](?:driver|type)["']\s*:\s*["']([a-z0-9-]+)["']""")
_IOMMUS = ("intel-iommu", "amd-iommu", "virtio-iommu", "arm-smmuv3")
_VFIO_BLOCK_DRIVERS = ("nvme", "virtio-blk-vfio-pci")
DRIVE_LETTERS = ("hda", "hdb", "hdc", "hdd", "fda", "fdb", "sd", "mtdblock", "pflash")
# A UUID is the device's name. The quotation mark is one of JSON that we cannot read.
_MEDIATED = re.compile(r"/[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}/*(['\"]|$)")


class Property(NamedTuple):
    """`name: value` inside an option's list form. The value is plain text: commas in it are not doubled yet."""

    name: str
    value: str


class QemuOption(NamedTuple):
    """One item of the `qemu` section.

    `value` is None for a flag, text that goes to QEMU as it stands, or the elements of the list form in their order:
    text as it stands, or a Property.
    """

    name: str
    value: str | tuple[str | Property, ...] | None
    mark: Mark

    @property
    def bare_name(self) -> str:
        """The name as QEMU sees it: `-m` and `--m` are the same option."""
        return self.name.removeprefix("-")

    def size(self) -> int:
        """The length of the value on the command line in bytes, doubled commas left out of account."""
        if self.value is None or isinstance(self.value, str):
            return len((self.value or self.name).encode())
        return sum(len("=".join(e) if isinstance(e, Property) else e) + 1 for e in self.value)

    def properties(self) -> Iterator[tuple[str, str | None]]:
        """What QEMU's option parser makes of the value: (name, value); (text, None) where there is no `=`."""
        elements = (self.value,) if isinstance(self.value, str) else self.value or ()
        for element in elements:
            if isinstance(element, Property):
                yield element.name, element.value
                continue
            for part in _split(element):
                name, equals, value = part.partition("=")
                yield name, value if equals else None


def _split(text: str) -> list[str]:
    """Split at single commas; a doubled comma is a comma in the text (QEMU's get_opt_value)."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def settings(option: QemuOption) -> dict[str, str] | None:
    """The properties of one option by name, however it is written; a nested JSON object's as outer.inner.

    None for JSON that we cannot read.
    """
    if is_json(option) and option.bare_name not in _NEVER_JSON:
        import json  # noqa: PLC0415  few write options so, and `command` is to be quick

        try:
            return dict(_flat(json.loads(str(option.value)), ""))
        except (ValueError, RecursionError):  # single quotes, which QEMU takes, or nothing that it would take
            return None
    found: dict[str, str] = {}
    for position, (name, value) in enumerate(option.properties()):
        if value is not None:
            found[name] = value
        elif position == 0 and option.bare_name in IMPLIED:
            found[IMPLIED[option.bare_name]] = name
        else:  # `-device x,foo` is foo=on, `nofoo` was foo=off
            found[name] = _ON
    return found


def known_settings(option: QemuOption) -> dict[str, str]:
    """The same; none of what we cannot read."""
    return settings(option) or {}


def is_json(option: QemuOption) -> bool:
    """Whether it is written in QEMU's JSON form."""
    return isinstance(option.value, str) and option.value.lstrip().startswith("{")


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members if len(prefix) <= _LONGEST_NAME else ():
        if isinstance(member, dict | list):
            yield from _flat(member, f"{prefix}{name}.")
        elif isinstance(member, bool):
            yield f"{prefix}{name}", _ON if member else "off"
        elif member is not None:
            yield f"{prefix}{name}", str(member)


def is_on(value: str | None) -> bool:
    """Whether a boolean property is set: QEMU takes these words, and a name without a value, for yes."""
    return value is None or value in ("on", "yes", "true", "y")


def has_vfio(options: Iterable[QemuOption]) -> bool:
    """Whether a device of the host is passed through with VFIO."""
    return any(is_vfio(driver) for option in _named(options, "device") for driver in _drivers(option))


def drives_host_devices(options: Sequence[QemuOption]) -> bool:
    """Whether the guest, or QEMU itself, drives a device of the host's, of whose state the host knows nothing."""
    return has_vfio(options) or _nvme_drives(options) > 0


def is_vfio(driver: str) -> bool:
    """Whether a -device of this driver is one of the host's. That of vfio-user-pci is another program's."""
    return driver.startswith("vfio-") and not driver.startswith("vfio-user-")


def pinned_by(options: Sequence[QemuOption]) -> str | None:
    """Who locks all of the guest's RAM to have devices read and write it, as the subject of a sentence."""
    if has_vfio(options):
        return "VFIO"
    if _nvme_drives(options):
        return "QEMU's NVMe driver"
    return "vDPA" if vdpa_devices(options) else None


def vfio_containers(options: Sequence[QemuOption]) -> int:
    """How often VFIO adds the guest's RAM to what QEMU has locked itself (mm->locked_vm, vfio_iommu_type1.c of Linux).

    All devices share one container, and each NVMe drive has its own (util/vfio-helpers.c of QEMU). With iommufd= it
    counts as the user's; for a mediated device, and for s390's, its driver locks only what it needs.
    """
    return _nvme_drives(options) + any(True for _ in _whole_devices(options))


def vfio_more_containers(options: Sequence[QemuOption]) -> int:
    """How many more there may be: with an IOMMU of the guest's, devices have a view of the RAM, and a container, each.

    Functions of one card are taken for one IOMMU group, which has one container in any case.
    """
    devices = (driver for option in _named(options, "device") for driver in _drivers(option))
    machines = (known_settings(option).get("iommu", "none") for option in _named(options, "machine", "M"))
    if not any(driver.startswith(_IOMMUS) for driver in devices) and all(kind == "none" for kind in machines):
        return 0
    found = (known_settings(device) for device in _whole_devices(options))
    cards = {(one.get("host") or one.get("sysfsdev", "")).rpartition(".")[0] for one in found}
    return max(0, len(cards) - 1)


def _whole_devices(options: Sequence[QemuOption]) -> Iterator[QemuOption]:
    """Those for which VFIO pins all of the guest's RAM, as this process's."""
    for device in _named(options, "device"):
        found = settings(device)
        is_mediated = _MEDIATED.search(str(device.value) if found is None else found.get("sysfsdev", ""))
        is_pci = any(driver.startswith("vfio-pci") for driver in _drivers(device))
        if is_pci and not is_mediated and not _has_iommufd(device):
            yield device


def has_iommufd(options: Iterable[QemuOption]) -> bool:
    """Whether a passed-through device is opened with iommufd=."""
    return any(has_vfio([device]) and _has_iommufd(device) for device in _named(options, "device"))


def vdpa_devices(options: Iterable[QemuOption]) -> int:
    """How many devices pin the guest's RAM by vDPA, each anew (mm->pinned_vm, drivers/vhost/vdpa.c of Linux)."""
    return sum(
        any(driver.startswith("vhost-vdpa") or driver == "virtio-blk-vhost-vdpa" for driver in _drivers(option))
        for option in _named(options, "netdev", "nic", "device", "blockdev", "drive")
    )


def _nvme_drives(options: Iterable[QemuOption]) -> int:
    """How many drives are NVMe controllers, or others of PCI's, that QEMU drives itself, by way of VFIO."""
    return sum(
        any(driver in _VFIO_BLOCK_DRIVERS for driver in _drivers(option))
        or any(str(value).startswith("nvme://") for value in (option.value, *known_settings(option).values()))
        for option in _named(options, "blockdev", "drive", "cdrom", *DRIVE_LETTERS)
    )


def each(options: Iterable[QemuOption], *names: str) -> Iterator[dict[str, str]]:
    """The settings of every option with one of these names, in their order."""
    return map(known_settings, _named(options, *names))


def _named(options: Iterable[QemuOption], *names: str) -> Iterator[QemuOption]:
    return (option for option in options if option.bare_name in names)


def _drivers(option: QemuOption) -> list[str]:
    """The drivers, or types, that the option names, also those of block devices below."""
    text = str(option.value)
    found = settings(option)
    if found is None:  # JSON with single quotes
        return _JSON_DRIVER.findall(text)
    below = _JSON_DRIVER.findall(text) if "json:" in text else []  # a file's name can be JSON too
    return below + [value for name, value in found.items() if name.rpartition(".")[2] in ("driver", "type")]


def _has_iommufd(device: QemuOption) -> bool:
    found = settings(device)
    return "iommufd" in (str(device.value) if found is None else found)


def has_mem_lock(options: Iterable[QemuOption]) -> bool:
    """Whether QEMU locks its memory on its own account: `-overcommit mem-lock=on`, or `on-fault` from QEMU 10."""
    return any(
        name == "mem-lock" and (value == "on-fault" or is_on(value))
        for option in options
        if option.bare_name == "overcommit"
        for name, value in option.properties()
    )


def mem_lock_option(options: Iterable[QemuOption]) -> QemuOption | None:
    """The last option by which QEMU locks its memory on its own account."""
    found = [option for option in options if has_mem_lock([option])]
    return found[-1] if found else None


def iothread_ids(options: Sequence[QemuOption]) -> tuple[str, ...] | None:
    """The ids of all iothreads that QEMU will start with; None where the options do not tell."""
    ids = []
    for option in options:
        if option.bare_name == "readconfig":
            return None  # it may say anything
        if option.bare_name != "object":
            continue
        if is_json(option):
            if '"iothread"' in str(option.value):
                return None  # it is asked itself, once it runs
            continue
        properties = list(option.properties())
        if properties[:1] == [("iothread", None)] or ("qom-type", "iothread") in properties:
            ids += [value for name, value in properties if name == "id" and value is not None][-1:]
    return tuple(ids)


def smp_numbers(options: Sequence[QemuOption]) -> dict[str, int] | None:
    """What all -smp say, as QEMU reads them: repeated ones add up, the last wins. None where they do not tell.

    Empty without any: then the number is the machine's own. `-smp 2` is short for `-machine smp.cpus=2`, which counts
    as well.
    """
    numbers: dict[str, int] = {}
    for option in options:
        if option.bare_name == "readconfig":
            return None  # it may say anything
        if option.bare_name == "smp":
            given = list(option.properties())
        elif option.bare_name in ("machine", "M"):
            given = [(name[4:], value or "") for name, value in option.properties() if name.startswith("smp.")]
        else:
            continue
        for position, (name, value) in enumerate(given):
            number = name if value is None else value
            if not (number.isascii() and number.isdigit()) or len(number) > 9 or (value is None and position > 0):
                return None
            numbers["cpus" if value is None else name] = int(number)
    return {name: number for name, number in numbers.items() if number > 0}  # QEMU takes 0 for not given


def vcpu_limit(options: Sequence[QemuOption]) -> int | None:
    """How many vCPUs the guest can ever have, hot-added ones included; None where the options do not tell.

    As hw/core/machine-smp.c: maxcpus, else cpus, else the product of the topology.
    """
    given = smp_numbers(options) or {}
    return given.get("maxcpus") or given.get("cpus") or (prod(given.values()) if given else None)
