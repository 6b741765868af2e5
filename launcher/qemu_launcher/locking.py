"""How much of the guest's RAM the kernel counts as locked: for QEMU's own mem-lock, and for devices that pin it.

Why it exists: it counts the same page more than once, and a limit that leaves that out ends QEMU. Pure, over options
alone.
"""

from collections.abc import Iterable, Sequence

from . import ram
from .hostdevices import has_iommufd, vdpa_devices, vfio_containers
from .options import QemuOption, is_on


def lockable(options: Sequence[QemuOption]) -> int | None:
    """Bytes that the guest's RAM counts against RLIMIT_MEMLOCK of QEMU, if it is locked at all.

    VFIO adds what it pins to what mlockall(2) has locked before (vfio_pin_pages_remote in vfio_iommu_type1.c of Linux),
    so that ordinary pages count twice. mlockall leaves out huge pages (mlock_fixup in mm/mlock.c), VFIO does not. vDPA
    has a sum of its own, to which iommufd adds, too (do_update_pinned in drivers/iommu/iommufd/pages.c).
    """
    whole = ram.guest_ram(options)
    if whole is None:
        return None
    locked = vfio_containers(options) * whole
    if has_mem_lock(options):
        locked += max(0, whole - ram.in_huge_pages(options))
    vdpa = vdpa_devices(options)
    pinned = (vdpa + has_iommufd(options)) * whole if vdpa else 0
    most = max(whole, locked, pinned)
    return most if most < ram.MOST_RAM else None


def is_locked_twice(options: Sequence[QemuOption]) -> bool:
    """Whether the machine's own RAM, or some of it, counts for VFIO and for mem-lock, whatever its size."""
    return has_mem_lock(options) and vfio_containers(options) > 0 and ram.has_ordinary_pages(options)


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
