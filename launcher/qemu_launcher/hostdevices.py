"""The host's devices that a guest drives, or QEMU itself: which options bring them, and how they pin the guest's RAM.

Why it exists: VFIO and vDPA let a device read and write the guest's RAM, so all of that must stay where it is; how
often the kernel counts it against RLIMIT_MEMLOCK differs with the way. Pure, over options alone.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from .options import DRIVE_LETTERS, QemuOption, called, drivers, known_settings, settings

_IOMMUS = ("intel-iommu", "amd-iommu", "virtio-iommu", "arm-smmuv3")
_VFIO_BLOCK_DRIVERS = ("nvme", "virtio-blk-vfio-pci")
# A UUID is the device's name. The quotation mark is one of JSON that we cannot read.
_MEDIATED = re.compile(r"/[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}/*(['\"]|$)")


def has_vfio(options: Iterable[QemuOption]) -> bool:
    """Whether a device of the host is passed through with VFIO."""
    return any(is_vfio(driver) for option in called(options, "device") for driver in drivers(option))


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
    devices = (driver for option in called(options, "device") for driver in drivers(option))
    machines = (known_settings(option).get("iommu", "none") for option in called(options, "machine", "M"))
    if not any(driver.startswith(_IOMMUS) for driver in devices) and all(kind == "none" for kind in machines):
        return 0
    found = (known_settings(device) for device in _whole_devices(options))
    cards = {(one.get("host") or one.get("sysfsdev", "")).rpartition(".")[0] for one in found}
    return max(0, len(cards) - 1)


def _whole_devices(options: Sequence[QemuOption]) -> Iterator[QemuOption]:
    """Those for which VFIO pins all of the guest's RAM, as this process's."""
    for device in called(options, "device"):
        found = settings(device)
        is_mediated = _MEDIATED.search(str(device.value) if found is None else found.get("sysfsdev", ""))
        is_pci = any(driver.startswith("vfio-pci") for driver in drivers(device))
        if is_pci and not is_mediated and not _has_iommufd(device):
            yield device


def has_iommufd(options: Iterable[QemuOption]) -> bool:
    """Whether a passed-through device is opened with iommufd=."""
    return any(has_vfio([device]) and _has_iommufd(device) for device in called(options, "device"))


def vdpa_devices(options: Iterable[QemuOption]) -> int:
    """How many devices pin the guest's RAM by vDPA, each anew (mm->pinned_vm, drivers/vhost/vdpa.c of Linux)."""
    return sum(
        any(driver.startswith("vhost-vdpa") or driver == "virtio-blk-vhost-vdpa" for driver in drivers(option))
        for option in called(options, "netdev", "nic", "device", "blockdev", "drive")
    )


def _nvme_drives(options: Iterable[QemuOption]) -> int:
    """How many drives are NVMe controllers, or others of PCI's, that QEMU drives itself, by way of VFIO."""
    return sum(
        any(driver in _VFIO_BLOCK_DRIVERS for driver in drivers(option))
        or any(str(value).startswith("nvme://") for value in (option.value, *known_settings(option).values()))
        for option in called(options, "blockdev", "drive", "cdrom", *DRIVE_LETTERS)
    )


def _has_iommufd(device: QemuOption) -> bool:
    found = settings(device)
    return "iommufd" in (str(device.value) if found is None else found)
