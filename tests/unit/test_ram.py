"""How often the kernel counts the guest's RAM against what QEMU may lock."""

import pytest

from qemu_launcher import locking, options, ram
from unit.reading import launcher

GIB = 1 << 30
CARD = "device: [vfio-pci, host: '01:00.0']"
LOCK = "overcommit: [mem-lock: on]"
HUGE = "object: [memory-backend-memfd, id: ram, size: 4G, hugetlb: on], machine: [q35, memory-backend: ram]"


def lockable(items: str) -> int | None:
    return locking.lockable(launcher("", f"[m: 4G, {items}]").options)


@pytest.mark.parametrize(
    ("items", "gib"),
    [
        (CARD, 4),
        (LOCK, 4),
        (f"{CARD}, {LOCK}", 8),
        (f"{LOCK}, device: [vfio-pci, host: '01:00.0'], {CARD}", 8),
        (f"{CARD}, overcommit: mem-lock=on-fault", 8),
        (f"{CARD}, overcommit: mem-lock=off", 4),
        (f'{LOCK}, device: \'{{"driver": "vfio-pci", "host": "01:00.0"}}\'', 8),
        (f"{LOCK}, device: \"{{'driver': 'vfio-pci', 'host': '01:00.0'}}\"", 8),
        (f"{CARD}, device: [vfio-pci, host: '01:00.1']", 4),
        (f"device: intel-iommu, {CARD}, device: [vfio-pci, host: '02:00.0']", 4),  # more, maybe: test_launcher_plan.py
        # QEMU's NVMe driver has a container of its own for each drive (util/vfio-helpers.c of QEMU)
        ("drive: [file: nvme://0000:44:00.0/1]", 4),
        (f"drive: [file: nvme://0000:44:00.0/1], {CARD}", 8),
        (f"drive: [file: nvme://0000:44:00.0/1], hda: nvme://0000:45:00.0/1, {CARD}, {HUGE}", 12),
        (f"drive: [file: nvme://0000:44:00.0/1], {LOCK}", 8),
        (f"drive: [file: nvme://0000:44:00.0/1], {CARD}, {LOCK}", 12),
        # Each vDPA device pins anew, and that is compared alone (mm->pinned_vm in drivers/vhost/vdpa.c of Linux)
        ("netdev: [vhost-vdpa, id: n]", 4),
        ("netdev: [vhost-vdpa, id: n], netdev: [vhost-vdpa, id: m]", 8),
        (f"netdev: [vhost-vdpa, id: n], {CARD}", 4),
        (f"netdev: [vhost-vdpa, id: n], {LOCK}", 4),
        (f"netdev: [vhost-vdpa, id: n], {CARD}, {LOCK}", 8),
        ("netdev: [vhost-vdpa, id: n], device: [vfio-pci, host: '01:00.0', iommufd: io]", 8),
        # Pinned pages that are not counted as this process's
        (f"{LOCK}, object: [iommufd, id: io], device: [vfio-pci, host: '01:00.0', iommufd: io]", 4),
        (f"{LOCK}, device: [vfio-pci, host: '01:00.0', iommufd: io], {CARD}", 8),
        (f'{LOCK}, device: \'{{"driver": "vfio-pci", "host": "01:00.0", "iommufd": "io"}}\'', 4),
        (f"{LOCK}, device: \"{{'driver': 'vfio-pci', 'iommufd': 'io'}}\"", 4),
        # Not pinned as a whole: the driver of a mediated device asks for the pages that it wants
        (f"{LOCK}, device: [vfio-pci, sysfsdev: /sys/bus/mdev/devices/b1ddf2ae-5b9b-4b5e-ae07-0e8a4f3c8a9b]", 4),
        (f"{LOCK}, device: \"{{'driver': 'vfio-pci', 'sysfsdev': '/sys/b1ddf2ae-5b9b-4b5e-ae07-0e8a4f3c8a9b'}}\"", 4),
        (f"{LOCK}, device: [vfio-pci, sysfsdev: /sys/bus/pci/devices/0000:01:00.0]", 8),
        (f"{LOCK}, device: vfio-ap", 4),
        # Huge pages, which mlockall(2) leaves out
        (f"{CARD}, {LOCK}, {HUGE}", 4),
        (f"{CARD}, {LOCK}, {HUGE.replace('on', 'off', 1)}", 8),
        (
            f"{CARD}, {LOCK}, machine: [q35, memory-backend: ram], "
            'object: \'{"qom-type": "memory-backend-memfd", "id": "ram", "size": 4294967296, "hugetlb": true}\'',
            4,
        ),
        (f"{CARD}, {LOCK}, {HUGE.replace('machine: [q35, memory-backend:', 'device: [ivshmem-plain, memdev:')}", 12),
        (f"{CARD}, {LOCK}, object: [memory-backend-memfd, id: other, size: 4G, hugetlb: on]", 8),
        (f"{CARD}, {LOCK}, mem-path: /dev/hugepages", 4),
        (f"{CARD}, {LOCK}, mem-path: /dev/shm", 8),
        (f"{CARD}, {LOCK}, mem-path: /dev/shm/vm.ram", 8),
        (
            f"{CARD}, {LOCK}, object: [memory-backend-file, id: a, size: 4G, mem-path: /mnt/huge], M: memory-backend=a",
            4,
        ),
        (
            f"{CARD}, {LOCK}, object: [memory-backend-memfd, id: a, size: 1G, hugetlb: on], numa: [node, memdev: a], "
            "object: [memory-backend-ram, id: b, size: 3G], numa: [node, memdev: b]",
            7,
        ),
        (f"{CARD}, {LOCK}, {HUGE}, object: [memory-backend-ram, id: b, size: 2G], device: [pc-dimm, memdev: b]", 8),
        (
            f"{CARD}, {LOCK}, object: [memory-backend-memfd, id: b, size: 2G, hugetlb: on], "
            "device: [pc-dimm, memdev: b]",
            10,
        ),
        ("readconfig: file", None),
        (f"{CARD}, {LOCK}, device: [pc-dimm, memdev: b]", None),
    ],
)
def test_lockable(items: str, gib: int | None) -> None:
    assert lockable(items) == (gib and gib * GIB)


def test_larger_than_the_ram_that_it_is_part_of() -> None:
    """QEMU would refuse it."""
    assert lockable(f"{CARD}, {LOCK}, {HUGE.replace('4G', '8G')}") == 4 * GIB


def test_options_cost_no_more_than_they_are_long() -> None:
    """A name stands before all that is within it, and definitions of other people's are read too."""
    inner = ", ".join(f'"a{number}": 1' for number in range(6000))
    option = launcher("", f"""[device: '{{"driver": "x", "{"k" * 60000}": {{{inner}}}}}']""").options[0]
    found = options.settings(option)
    assert found == {"driver": "x"}


@pytest.mark.parametrize(
    ("items", "gib"),
    [
        ("machine: [q35, memory-backend: large], M: [memory-backend: small]", 1),  # they are one, and the last one wins
        ("M: [memory-backend: small], machine: [q35, memory-backend: large]", 2),
        ("M: [memory-backend: small], machine: q35", 1),
        ("machine: [q35, memory-backend: small], m: [slots: 2, size: 3G]", 3),
        ("machine: [q35, memory-backend: small], m: [3G, slots: 2], m: [maxmem: 9G]", 3),
        ("machine: [q35, memory-backend: small], m: [slots: 2]", 1),
        ("M: [q35, memory.size: 3G], m: 1G", None),  # which of the two wins is not told
        ("machine: [q35, memory-backend: none]", None),
        # No form of -m's
        ("m: '{\"size\": 3221225472}'", None),
    ],
)
def test_the_machine_s_own_ram(items: str, gib: int | None) -> None:
    objects = "object: [memory-backend-ram, id: small, size: 1G], object: [memory-backend-ram, id: large, size: 2G]"
    wanted = launcher("", f"[{objects}, {items}]").options
    assert ram.machine_ram(wanted) == (None if gib is None else gib * GIB)
