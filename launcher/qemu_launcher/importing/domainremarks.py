"""What is to be said above QEMU's options of a VM of libvirt's: what libvirt does for them, and nobody now. Pure."""

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from .. import cmdline
from ..options import QemuOption
from .command_line import as_read
from .drafting import Option


def remarked(options: Sequence[Option], root: Element) -> Iterator[Option]:
    """The same options; the first of each kind that needs a choice with a comment."""
    said: set[str] = set()
    auto = root.find("devices/graphics[@autoport='yes']") is not None
    variables = root.find("os/nvram[@template]")
    for option in options:
        known = as_read(option)
        text = cmdline.option_argv(known)[-1]
        found = [*_of_files(option.bare_name, text), *_of_devices(option.bare_name, text)]
        found += _of_screens(option.bare_name, dict(known.properties()), auto_port=auto)
        if variables is not None and option.bare_name == "blockdev" and _is_file(known, variables.text or ""):
            found.append(_VARIABLES.format(variables.get("template")))
        if any(name in ("fd", "fds", "vhostfd", "vhostfds") for name, _value in known.properties()):
            found.append("A descriptor of libvirtd's, which QEMU is started without: name the file or device instead.")
        new = [remark for remark in found if remark not in said]
        said.update(new)
        yield option._replace(comments=(*option.comments, *new))


_VARIABLES = "The EFI's variables: libvirt makes this file at the first start, as a copy of {}."


def _is_file(option: QemuOption, path: str) -> bool:
    return dict(option.properties()).get("filename") == path.strip()


def _of_files(name: str, text: str) -> Iterator[str]:
    if name == "object" and text.startswith("pr-manager-helper,"):
        yield "libvirt starts qemu-pr-helper for this: start it yourself, with --socket=PATH, and name that path here."
    elif name == "display" and text.startswith("dbus,addr="):
        yield "libvirt starts a dbus-daemon for this: without addr, QEMU is on the bus of your session."
    elif name == "object" and "masterKey0" in text:
        yield "Encrypted with libvirt's key: put the secret into a file, and name that with file:."
    elif "/domain-" in text or "/libvirt/qemu/channel/" in text:
        yield "libvirt makes this folder when it starts the VM: choose a path of yours."
    elif "/libvirt/" in text or "/dev/disk/" in text:
        yield "libvirt gives QEMU access to this when it starts the VM: you must have it yourself."


def _of_devices(name: str, text: str) -> Iterator[str]:
    if name == "device" and "/mdev/" in text:
        yield (
            "An mdev, which is gone with each boot of the host: make it first, see mdevctl(8), and give yourself "
            "/dev/vfio/GROUP."
        )
    elif (name == "device" and "vfio-pci" in text) or (name == "blockdev" and text.startswith("nvme,device=")):
        yield "libvirt binds it to vfio-pci when it starts the VM: do that first, and give yourself /dev/vfio/GROUP."


def _of_screens(name: str, values: dict[str, str | None], *, auto_port: bool) -> Iterator[str]:
    if name not in ("spice", "vnc"):
        return
    if name == "spice" and not {"disable-ticketing", "password-secret"} & values.keys():
        yield "libvirt sets the password later: add disable-ticketing: on, or a secret with password-secret."
    if name == "vnc" and values.get("password", "off") in (None, "on"):
        yield (
            "libvirt sets the password later, and nobody gets in without: write password-secret: vnc for it, and in "
            "front of this - object: [secret, id: vnc, file: PATH]. Without either, anybody gets in."
        )
    if name == "spice" and values.get("port") == "0" and not {"tls-port", "unix"} & values.keys():
        yield "libvirt itself lets viewers in here. For them to connect: port: 5900, or unix: on and addr: PATH."
    elif auto_port and "unix" not in values:
        yield "virsh has chosen this port just now; no other VM may have it."
