"""What QEMU's options ask of the host: KVM, devices, files, memory backends, a display, audio.

Why it exists: the checks of single topics want facts such as "PCI device 0000:01:00.0 is passed through", and QEMU
takes each of these in several spellings (text, list, JSON). Pure, and no judge of options: what is not understood is
QEMU's business, and is not looked at. Nothing here is refused.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from typing import Literal, NamedTuple

from .. import cmdline, options, ram
from ..cpulist import parse_cpulist
from ..definition import QemuOption, VmDefinition
from ..errors import Mark
from ..hostdevices import is_vfio
from ..options import DRIVE_LETTERS, is_on, known_settings, smp_numbers

Settings = Mapping[str, str]

# strtoul(3), as QEMU reads them (set_pci_host_devaddr): with 0x or leading zeros, if one likes.
_HEX = "(?:0[xX])?[0-9a-fA-F]+"
_PCI = re.compile(rf"(?:({_HEX}):)?({_HEX}):({_HEX})\.([0-9]+)")
_LARGEST = (0xFFFFFFFF, 0xFF, 0x1F, 7)  # domain, bus, slot, function
_PROTOCOL = re.compile(r"[^/:]+:")  # path_has_protocol of QEMU's block.c


class Image(NamedTuple):
    """A file that QEMU opens. `option` as the user wrote it, without its dash."""

    path: str
    option: str
    writable: bool


class VfioDevice(NamedTuple):
    """One passed-through device: `address` of a PCI device (0000:01:00.0), or `sysfs`, the path of another."""

    address: str | None
    sysfs: str | None
    iommufd: bool

    @property
    def folder(self) -> str:
        """Its directory in /sys."""
        return f"/sys/bus/pci/devices/{self.address}" if self.address is not None else self.sysfs or ""


class Backend(NamedTuple):
    """A memory backend. Bytes; `size` None: it cannot be told; `huge_page` None: the host's default.

    `nodes`: NUMA nodes of the host's; what `policy` means by them is in set_mempolicy(2).
    """

    kind: str  # memory-backend-file, -memfd, -ram
    id: str
    size: int | None
    path: str | None
    hugetlb: bool
    huge_page: int | None
    readonly: bool
    prealloc: bool
    nodes: frozenset[int] = frozenset()
    policy: str = "default"

    @property
    def bound_to(self) -> frozenset[int]:
        """The nodes that its memory must be from, none if it may be from any."""
        return self.nodes if self.policy == "bind" else frozenset()


def each(definition: VmDefinition, *names: str) -> Iterator[Settings]:
    """The settings of every option with one of these names, in their order."""
    return options.each(definition.options, *names)


def kvm(definition: VmDefinition) -> Literal["needed", "preferred"] | None:
    """Whether it needs KVM; "preferred" where another accelerator is named to fall back to."""
    wanted = ["kvm"] if cmdline.has_option(definition, "enable-kvm") else []
    for found in each(definition, "machine", "M"):
        wanted += found.get("accel", "").split(":") if found.get("accel") else []
    wanted += [found["accel"] for found in each(definition, "accel") if "accel" in found]
    if wanted and wanted[0] == "kvm":
        return "needed" if len(set(wanted)) == 1 else "preferred"
    if "kvm" in wanted:
        return "preferred"
    # -cpu host has no meaning under emulation, and a binary of this name begins with KVM by itself.
    if any(found.get("model") == "host" for found in each(definition, "cpu")):
        return "needed"
    return "preferred" if definition.binary.rpartition("/")[2] in ("kvm", "qemu-kvm") and not wanted else None


def vfio(definition: VmDefinition) -> list[VfioDevice]:
    """The devices that are passed through, each once."""
    found = []
    for device in each(definition, "device"):
        if not is_vfio(device.get("driver", "")):
            continue
        host, sysfs = _pci_address(device.get("host", "")), device.get("sysfsdev")
        if host is not None or sysfs is not None:
            found.append(VfioDevice(host, None if host else sysfs, "iommufd" in device))
    return list(dict.fromkeys(found))


def _pci_address(text: str) -> str | None:
    """`01:00.0` as /sys writes it, with its domain."""
    parts = _PCI.fullmatch(text)
    if parts is None:
        return None
    domain, bus, slot, function = numbers = [int(part or "0", 16) for part in parts.groups()]
    if any(number > largest for number, largest in zip(numbers, _LARGEST, strict=True)):
        return None
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"


def no_addresses(definition: VmDefinition) -> list[tuple[Mark, str]]:
    """What stands where a PCI device of the host's is to be named and is no address, and in which option."""
    devices = [(option.mark, known_settings(option)) for option in definition.options if option.bare_name == "device"]
    return [
        (mark, one["host"])
        for mark, one in devices
        if one.get("driver", "").startswith("vfio-pci") and "host" in one and _pci_address(one["host"]) is None
    ]


def evdev(definition: VmDefinition) -> list[str]:
    """Input devices of the host that QEMU reads itself."""
    objects = [found for found in each(definition, "object") if found.get("qom-type") == "input-linux"]
    devices = [found for found in each(definition, "device") if found.get("driver", "").startswith("virtio-input-host")]
    return list(dict.fromkeys(found["evdev"] for found in (*objects, *devices) if "evdev" in found))


def backends(definition: VmDefinition) -> list[Backend]:
    """All memory backends, and -mem-path, which is one for all of the guest's own RAM."""
    found = [
        _backend(one, option)
        for option in definition.options
        if option.bare_name == "object"
        and (one := known_settings(option)).get("qom-type", "").startswith("memory-backend-")
    ]
    paths = [option.value for option in definition.options if option.bare_name == "mem-path"]
    if paths and isinstance(paths[-1], str):
        prealloc = cmdline.has_option(definition, "mem-prealloc")
        whole = ram.guest_ram(definition.options)
        found.append(Backend("memory-backend-file", "", whole, paths[-1], False, None, False, prealloc))
    return found


def _backend(found: Settings, option: QemuOption) -> Backend:
    return Backend(
        kind=found["qom-type"],
        id=found.get("id", ""),
        size=ram.parse_size(found.get("size", ""), default_unit="B"),
        path=found.get("mem-path"),
        hugetlb=found["qom-type"] == "memory-backend-memfd" and is_on(found.get("hugetlb", "off")),
        huge_page=ram.parse_size(found.get("hugetlbsize", ""), default_unit="B"),
        readonly=is_on(found.get("readonly", "off")),
        prealloc=is_on(found.get("prealloc", "off")),
        nodes=_nodes(found, option),
        policy=found.get("policy", "default"),
    )


def _nodes(found: Settings, option: QemuOption) -> frozenset[int]:
    """All host-nodes of an object, which may be given several times (QEMU's OptsVisitor), or as a list in JSON."""
    given = [value for name, value in option.properties() if name == "host-nodes" and value is not None]
    given += [value for name, value in found.items() if name.startswith("host-nodes.")]
    nodes: set[int] = set()
    for value in given:
        with suppress(ValueError):  # which QEMU will have a word for
            nodes |= parse_cpulist(value)
    return frozenset(nodes)


def images(definition: VmDefinition) -> list[Image]:
    """The disk images and boot files of this host, each once; what is read over a network is not among them."""
    snapshot = cmdline.has_option(definition, "snapshot")
    found: dict[str, Image] = {}
    for option in definition.options:
        for path, writable in _files(option):
            local = path.removeprefix("file:")
            if local and not _PROTOCOL.match(local):
                before = found.get(local)
                wanted = writable and not snapshot
                found[local] = Image(local, option.bare_name, wanted or (before is not None and before.writable))
    return list(found.values())


def _files(option: QemuOption) -> Iterator[tuple[str, bool]]:
    """(path, whether it is written) of the files that one option names."""
    name = option.bare_name
    if name in (*DRIVE_LETTERS, "cdrom", "kernel", "initrd", "dtb") and isinstance(option.value, str):
        yield option.value, name in DRIVE_LETTERS
    elif name == "drive":
        given = known_settings(option)
        readonly = any(is_on(given.get(key, "off")) for key in ("readonly", "read-only", "snapshot"))
        for key in ("file", "file.filename"):
            if key in given and given.get("format") != "vvfat":
                yield given[key], not readonly and given.get("media") != "cdrom"
    elif name == "blockdev":
        given = known_settings(option)
        for key in ("filename", "file.filename"):
            if key in given:
                yield given[key], not is_on(given.get("read-only", "off"))


def sockets(definition: VmDefinition) -> list[str]:
    """Sockets in the file system on which another program must listen already: swtpm, virtiofsd, ..."""
    found = [
        one["path"]
        for one in each(definition, "chardev")
        if one.get("backend") == "socket"
        and "path" in one
        and not is_on(one.get("server", "off"))
        and not is_on(one.get("abstract", "off"))
        and not any(one.get(name, "0") != "0" for name in ("reconnect", "reconnect-ms"))  # QEMU waits for it by itself
    ]
    return list(dict.fromkeys(found))


def leaves_display_open(definition: VmDefinition) -> bool:
    """Whether QEMU chooses by itself where the guest's screen is to be seen. The file of -readconfig may say it too."""
    named = ("nographic", "vnc", "spice", "sdl", "curses", "readconfig")  # sdl and curses: of older QEMUs
    ends_at_once = ("version", "help", "h")
    if any(cmdline.has_option(definition, name) for name in (*named, *ends_at_once)):
        return False
    return all(one.get("type") == "default" for one in each(definition, "display"))


def displays(definition: VmDefinition) -> list[str]:
    """The kinds of display that are asked for by name: gtk, sdl, ..."""
    return [found["type"] for found in each(definition, "display") if "type" in found]


def audio(definition: VmDefinition) -> list[Settings]:
    """The audio backends, each with its "driver"."""
    return [found for found in each(definition, "audiodev", "audio") if "driver" in found]


def vcpus(definition: VmDefinition) -> int | None:
    """How many vCPUs the guest begins with, None where the options do not tell (hw/core/machine-smp.c)."""
    given = smp_numbers(definition.options)
    return None if given is None else given.get("cpus") or given.get("maxcpus") or prod(given.values())


def threads_per_core(definition: VmDefinition) -> int:
    """The guest's own SMT, as -smp says it; 1 where the options do not tell."""
    return (smp_numbers(definition.options) or {}).get("threads", 1)
