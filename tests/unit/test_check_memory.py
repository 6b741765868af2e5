"""RAM for the guest, and a login's memory lock: on hosts that have enough and too little."""

from pathlib import Path

import pytest

from qemu_launcher.check import memlock, memory
from qemu_launcher.plan import MemlockNeed
from qemu_launcher.sizes import INFINITY
from unit.other_host import OtherHost, the_only, with_memory
from unit.reading import launcher

GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    return with_memory(tmp_path)


def test_more_ram_than_there_is(host: OtherHost) -> None:
    assert list(memory.enough(host.tree, 16 * GIB, 0)) == []
    severity, text, _ = the_only(list(memory.enough(host.tree, 24 * GIB, 0)))
    assert (severity, text) == ("warning", "the guest's RAM is 24 GiB, and the host has 16 GiB to spare now")
    assert list(memory.enough(host.tree, 24 * GIB, 8 * GIB)) == [], "huge pages are set aside already"
    assert list(memory.enough(host.tree, None, 0)) == []


VFIO = "[m: 4G, device: 'vfio-pci,host=1:0.0']"


def test_memlock_of_this_login() -> None:
    definition = launcher("", VFIO)
    need = MemlockNeed(5 * GIB, 5 * GIB, unaided=True)
    found = the_only(list(memlock.own(definition, need, 1 << 20, 8 * GIB)))
    assert found[:2] == ("ok", "8 GiB may be locked in this login, without the helper")


def test_memlock_that_was_forbidden_and_is_needed() -> None:
    definition = launcher("rlimit_memlock: false", VFIO)
    severity, text, fix = the_only(list(memlock.own(definition, None, 8 << 20, 8 << 20)))
    assert severity == "error"
    assert text == "VFIO locks the guest's RAM, 4 GiB, and QEMU may lock 8 MiB"
    assert "rlimit_memlock: auto" in fix
    assert list(memlock.own(definition, None, 4 * GIB, 4 * GIB)) == []
    locked = launcher("rlimit_memlock: false", "[m: 4G, overcommit: mem-lock=on]")
    assert "mem-lock=on locks" in the_only(list(memlock.own(locked, None, 0, 0)))[1]
    assert list(memlock.own(launcher("", "[m: 4G]"), None, 0, 0)) == []
    vdpa = launcher("rlimit_memlock: false", "[m: 4G, netdev: vhost-vdpa, netdev: vhost-vdpa]")
    text = the_only(list(memlock.own(vdpa, None, 5 * GIB, 5 * GIB)))[1]
    assert text == "vDPA locks the guest's RAM more than once, together 8 GiB, and QEMU may lock 5 GiB"
    both = launcher("rlimit_memlock: false", "[m: 4G, overcommit: mem-lock=on, device: vfio-pci]")
    text = the_only(list(memlock.own(both, None, 5 * GIB, 5 * GIB)))[1]
    assert text == "VFIO and mem-lock=on each lock the guest's RAM, together 8 GiB, and QEMU may lock 5 GiB"


OTHERS = [("linux", 70), ("bsd", 71), ("plain", 72), ("gone", 73)]


@pytest.fixture
def beside(host: OtherHost) -> OtherHost:
    """Two VMs with iommufd, of 8 and 2 GiB, and one that has pinned its memory otherwise."""
    for pid, options, pinned in ((70, "-object\0iommufd,id=x", 8), (71, "iommufd", 2), (72, "-device\0vfio-pci", 4)):
        host.write(f"/proc/{pid}/cmdline", f"qemu-system-x86_64\0{options}\0")
        host.write(f"/proc/{pid}/status", f"Name:\tqemu\nVmLck:\t       0 kB\nVmPin:\t{pinned << 20} kB\n")
    return host


@pytest.mark.parametrize(
    ("limit", "may"), [(5 * GIB, "5 GiB"), (14 * GIB - 1, "14 GiB"), (None, "what the helper has left")]
)
def test_iommufd_counts_what_the_user_s_other_vms_have_pinned(beside: OtherHost, limit: int | None, may: str) -> None:
    found = memlock.pinned_together(beside.tree, 4 * GIB, limit, OTHERS)
    assert the_only(list(found)) == (
        "warning",
        "with iommufd= the kernel counts all VMs of yours together: linux and bsd have pinned 10 GiB, "
        f"this guest's RAM is 4 GiB, and QEMU may lock {may}",
        "leave out iommufd=: then each counts for itself\n"
        "or write rlimit_memlock: 15G, and have the administrator's memlock allow it beside theirs",
    )


def test_iommufd_with_room_for_all(beside: OtherHost) -> None:
    for limit in (14 * GIB, INFINITY):
        assert list(memlock.pinned_together(beside.tree, 4 * GIB, limit, OTHERS)) == []


def test_iommufd_alone(beside: OtherHost) -> None:
    assert list(memlock.pinned_together(beside.tree, 4 * GIB, 5 * GIB, OTHERS[2:])) == []
    [one] = memlock.pinned_together(beside.tree, None, 8 * GIB, [("linux", 70)])
    assert "linux has pinned 8 GiB, this guest's RAM comes to that, and QEMU may lock 8 GiB" in one.text
    assert (one.fix or "").endswith("rlimit_memlock: true, and have the administrator's memlock allow it beside theirs")
