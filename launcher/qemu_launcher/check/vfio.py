"""Devices handed to the guest with VFIO: the IOMMU group, its node, and what else is in it.

Why it exists: the kernel gives away groups, not devices, and says no in one of five places with the same EINVAL or
EPERM. Documentation/driver-api/vfio.rst: a group is viable when each device in it is bound to a VFIO driver, to
pci-stub, or to none. Since Linux 5.19 a driver says of itself that it leaves the group to others (driver_managed_dma);
those do, and so does pcieport ("PCI: portdrv: Set driver_managed_dma"). Any other driver claims the group for the host,
a bridge's too, while before then any bridge might keep its own.

Pure judgement over a Tree; nodes are not opened, since opening a group takes it from whoever comes second.
"""

from collections.abc import Generator, Iterable, Iterator

from ..errors import Mark, shortened
from .asked import VfioDevice
from .devices import udev_line
from .finding import Finding
from .tree import READ, WRITE, Tree, linux

PCI = "/sys/bus/pci/devices"
RULES = "/etc/udev/rules.d/70-qemu-vfio.rules"
_VFIO = "vfio"  # vfio-pci, and the drivers made from it for one kind of device: mlx5_vfio_pci, nvgrace-gpu-vfio-pci
_HARMLESS_DRIVERS = ("pci-stub", "pcieport")  # the kernel's name for portdrv
_BRIDGE = "0x0604"  # PCI-to-PCI bridge; the class is six digits, the last two its programming interface


def vfio(tree: Tree, devices: list[VfioDevice], user: str, release: str) -> Iterator[Finding]:
    """All that stands between `user` and these devices. `release`: of the kernel."""
    bridges_matter = linux(release) >= (5, 19)
    told: set[str] = set()  # groups
    given = {device.address for device in devices}
    for device in devices:
        group = yield from _device(tree, device)
        if group is None:
            continue
        if device.iommufd:
            yield from _cdev(tree, device, user)
        if group not in told:
            told.add(group)
            if not device.iommufd:
                yield from _node(tree, group, user)
            yield from _others(tree, group, given, bridges_matter=bridges_matter)


def addresses(wrong: Iterable[tuple[Mark, str]]) -> Iterator[Finding]:
    """What QEMU would not take for a device's address, each with its place."""
    for mark, text in wrong:
        said = f"{mark}: {shortened(text)!r} is no PCI address"
        yield Finding("error", f"vfio {shortened(text)}", said, "write it as lspci -D does: 0000:01:00.0")


def _device(tree: Tree, device: VfioDevice) -> Generator[Finding, None, str | None]:
    """Findings about the device itself. Returns its group, None where there is no point in going on."""
    name = device.address or device.sysfs or ""
    about = f"vfio {name}"
    if not tree.exists(device.folder):
        fix = "lspci -D shows what is there; addresses change when cards are moved or added"
        yield Finding("error", about, f"there is no device {name} on this host ({device.folder})", fix)
        return None
    group = tree.link(f"{device.folder}/iommu_group")
    if group is None:
        yield Finding("error", about, f"{name} is in no IOMMU group: the IOMMU is off", _iommu_on(tree))
        return None
    if device.address is None:  # a mediated device: its parent's driver makes it, and it is never bound by hand
        yield Finding("ok", about, f"{name} is there, IOMMU group {group}")
        return group
    driver = tree.link(f"{device.folder}/driver")
    if driver is not None and _VFIO in driver:
        yield Finding("ok", about, f"{name} ({_what(tree, name)}) is bound to {driver}, IOMMU group {group}")
    else:
        bound = f"bound to {driver}, not to vfio-pci" if driver else "bound to no driver, and must be to vfio-pci"
        yield Finding("error", about, f"{name} ({_what(tree, name)}) is {bound}", _bind(name, driver))
    return group


def _bind(address: str, driver: str | None, wanted: str = "vfio-pci") -> str:
    by_hand = [
        f"sudo modprobe {wanted}",
        f"echo {wanted} | sudo tee {PCI}/{address}/driver_override",
        *([f"echo {address} | sudo tee /sys/bus/pci/drivers/{driver}/unbind"] if driver else []),
        f"echo {address} | sudo tee /sys/bus/pci/drivers_probe",
    ]
    return f"for good: sudo driverctl set-override {address} {wanted}\nuntil the next boot: {'; '.join(by_hand)}"


def _iommu_on(tree: Tree) -> str:
    words = (tree.text("/proc/cmdline") or "").split()
    cpu = tree.text("/proc/cpuinfo") or ""
    argument = "intel_iommu=on" if "GenuineIntel" in cpu else "amd_iommu=on"
    if "AuthenticAMD" in cpu and "amd_iommu=off" not in words:  # on by itself
        return "switch the IOMMU on in the firmware (AMD-Vi, IOMMU), then boot again"
    if argument in words:
        return "it is on for the kernel: switch it on in the firmware too (Intel VT-d), then boot again"
    return (
        f"add {argument} to the kernel command line, and switch it on in the firmware (VT-d, AMD-Vi); then boot again"
    )


def _node(tree: Tree, group: str, user: str) -> Iterator[Finding]:
    node = f"/dev/vfio/{group}"
    noiommu = f"/dev/vfio/noiommu-{group}"
    about = f"vfio group {group}"
    if not tree.exists(node) and tree.exists(noiommu):
        fix = "switch the IOMMU on; without it the guest could write to all of the host's memory, and only root may try"
        yield Finding("error", about, f"{noiommu} is a group without an IOMMU", fix)
    elif not tree.exists(node):
        fix = "it comes when a device of the group is bound to vfio-pci; in a container it must be passed in"
        yield Finding("error", about, f"there is no {node}", fix)
    elif not tree.may(node, READ | WRITE):
        fix = udev_line(f'SUBSYSTEM=="vfio", OWNER="{user}"', RULES, "vfio")
        yield Finding("error", about, f"{node} is not yours to read and write", fix)
    else:
        yield Finding("ok", about, f"{node} is yours to use")
    container = "/dev/vfio/vfio"
    if tree.exists(container) and not tree.may(container, READ | WRITE):
        fix = f"sudo chmod 0666 {container} (its usual mode: what it allows is decided by the groups)"
        yield Finding("error", about, f"{container} is not yours to read and write", fix)


def _cdev(tree: Tree, device: VfioDevice, user: str) -> Iterator[Finding]:
    """With iommufd= the device has a node of its own, and the group's is not used."""
    about = f"vfio {device.address or device.sysfs}"
    if not tree.exists("/dev/iommu"):
        yield Finding(
            "error", about, "there is no /dev/iommu, which iommufd needs", "sudo modprobe iommufd (Linux 6.2)"
        )
    elif not tree.may("/dev/iommu", READ | WRITE):
        fix = udev_line(f'KERNEL=="iommu", SUBSYSTEM=="misc", OWNER="{user}"', RULES, "misc")
        yield Finding("error", about, "/dev/iommu is not yours to read and write", fix)
    for name in tree.names(f"{device.folder}/vfio-dev"):
        node = f"/dev/vfio/devices/{name}"
        if not tree.may(node, READ | WRITE):
            fix = udev_line(f'SUBSYSTEM=="vfio-dev", OWNER="{user}"', RULES, "vfio-dev")
            yield Finding("error", about, f"{node} is not yours to read and write", fix)
        else:
            yield Finding("ok", about, f"{node} is yours to use")


def _others(tree: Tree, group: str, given: set[str | None], *, bridges_matter: bool) -> Iterator[Finding]:
    """What else is in the group: each device of it that the host still uses keeps the guest from having any."""
    folder = f"/sys/kernel/iommu_groups/{group}/devices"
    held = []
    for address in tree.names(folder):
        if address in given:
            continue
        driver = tree.link(f"{folder}/{address}/driver")
        is_bridge = (tree.text(f"{folder}/{address}/class") or "").startswith(_BRIDGE)
        if driver is None or driver in _HARMLESS_DRIVERS or _VFIO in driver or (is_bridge and not bridges_matter):
            continue
        held.append((address, driver, "pci-stub" if is_bridge else "vfio-pci"))  # which takes no bridges
    about = f"vfio group {group}"
    for address, driver, wanted in held:
        yield Finding(
            "error",
            about,
            f"{address} ({_what(tree, address)}) is in IOMMU group {group} too, and the host uses it with {driver}",
            f"{_bind(address, driver, wanted)}\nor put the card into another slot, which may have a group of its own",
        )
    if not held and tree.names(folder):
        yield Finding("ok", about, f"nothing else in IOMMU group {group} is in use by the host")


_CLASSES = {
    "0x01": "storage", "0x02": "network", "0x03": "display", "0x04": "multimedia", "0x05": "memory", "0x06": "bridge",
    "0x07": "communication", "0x08": "system", "0x09": "input", "0x0c": "serial bus", "0x0d": "wireless",
    "0x12": "accelerator",
}  # fmt: skip


def _what(tree: Tree, address: str) -> str:
    """`display, 10de:2684`: what kind of device, and how lspci finds its name."""
    folder = f"{PCI}/{address}"
    kind = _CLASSES.get((tree.text(f"{folder}/class") or "")[:4], "device")
    vendor, model = ((tree.text(f"{folder}/{name}") or "").removeprefix("0x") for name in ("vendor", "device"))
    return f"{kind}, {vendor}:{model}" if vendor and model else kind
