"""Huge pages, files shared with other programs, a login's memory lock: on hosts that have enough and too little."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, memory
from qemu_launcher.check.finding import Finding
from qemu_launcher.plan import MemlockNeed
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher, read

MEMFD = "memory-backend-memfd,id=ram,size=4G,hugetlb=on"
GIB = 1 << 30
MOUNTS = (
    "22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw\n"
    "30 22 0:27 / /dev/hugepages rw,relatime shared:11 - hugetlbfs hugetlbfs rw,pagesize=2M\n"
    "31 22 0:28 / /mnt/huge\\040pages rw - hugetlbfs none rw,pagesize=1024M\n"
    "32 22 0:29 / /dev/shm rw,nosuid - tmpfs tmpfs rw\n"
)


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    host = OtherHost(tmp_path)
    host.write("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nHugepagesize:       2048 kB\n")
    host.write("/proc/self/mountinfo", MOUNTS)
    host.huge_pages(2048, total=2048, free=2048)
    host.huge_pages(1048576, total=0, free=0)
    host.folder("/dev/hugepages")
    host.folder("/dev/shm")
    return host


def huge(host: OtherHost, *options: str) -> list[Finding]:
    definition = read("launcher: {binary: q}\nqemu:\n" + "".join(f"  - {option}\n" for option in options))
    return list(memory.huge_pages(host.tree, asked.backends(definition)))


def test_enough_and_no_mount_needed(host: OtherHost) -> None:
    host.forbid("/dev/hugepages")
    found = huge(host, f"object: {MEMFD}")
    assert told(found) == ["ok: 2048 huge pages of 2 MiB are wanted, 2048 can be had"]


def test_too_few(host: OtherHost) -> None:
    host.huge_pages(2048, total=2048, free=1000, reserved=10)
    severity, text, fix = the_only(huge(host, f"object: {MEMFD},hugetlbsize=2M"))
    assert (severity, text) == ("error", "2048 huge pages of 2 MiB are wanted, and 990 can be had")
    assert fix.startswith("sudo sysctl vm.nr_hugepages=3106; ")
    assert fix.endswith("hugepagesz=2M hugepages=3106")


def test_too_few_of_a_size_that_sysctl_does_not_mean(host: OtherHost) -> None:
    severity, text, fix = the_only(huge(host, f"object: {MEMFD},hugetlbsize=1G"))
    assert (severity, text) == ("error", "4 huge pages of 1 GiB are wanted, and 0 can be had")
    assert fix.startswith("echo 4 | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages; ")
    assert fix.endswith("hugepagesz=1G hugepages=4")


def test_what_the_kernel_may_add_by_itself_counts(host: OtherHost) -> None:
    host.huge_pages(2048, total=0, free=0, overcommit=2048)
    assert huge(host, f"object: {MEMFD}")[0].severity == "ok"


def test_backends_add_up(host: OtherHost) -> None:
    options = [f"object: {MEMFD}", "object: [memory-backend-memfd, id: more, size: 1M, hugetlb: on]"]
    assert the_only(huge(host, *options))[1] == "2049 huge pages of 2 MiB are wanted, and 2048 can be had"


def test_a_size_that_the_host_does_not_have(host: OtherHost) -> None:
    severity, text, fix = the_only(huge(host, f"object: {MEMFD},hugetlbsize=16M"))
    assert severity == "error"
    assert text == "256 huge pages of 16 MiB are wanted, and this host has none of that size"
    assert fix == "it has 2 MiB, 1 GiB: write hugetlbsize: to match"


def test_a_kernel_without_huge_pages(host: OtherHost) -> None:
    host.write("/proc/meminfo", "MemTotal: 1 kB\n")
    assert the_only(huge(host, f"object: {MEMFD}"))[1] == "this kernel has no huge pages"


@pytest.mark.parametrize(
    "options",
    [("m: 4G", "mem-path: /dev/hugepages"), ("object: [memory-backend-file, size: 4G, mem-path: /dev/hugepages]",)],
)
def test_mount(host: OtherHost, options: tuple[str, ...]) -> None:
    assert told(huge(host, *options)) == [
        "ok: /dev/hugepages is yours to write",
        "ok: 2048 huge pages of 2 MiB are wanted, 2048 can be had",
    ]
    host.forbid("/dev/hugepages")
    closed, enough = huge(host, *options)
    assert (closed.severity, closed.text) == ("error", "/dev/hugepages is not yours to write")
    assert "memory-backend-memfd" in (closed.fix or "")
    assert "sudo chgrp kvm /dev/hugepages; sudo chmod 1770 /dev/hugepages" in (closed.fix or "")
    assert enough.severity == "ok"


def test_file_in_a_mount_of_another_page_size(host: OtherHost) -> None:
    host.folder("/mnt/huge pages")
    found = huge(host, "object: [memory-backend-file, size: 2G, mem-path: /mnt/huge pages/win11]")
    assert told(found) == [
        "ok: /mnt/huge pages is yours to write",
        "error: 2 huge pages of 1 GiB are wanted, and 0 can be had",
    ]


@pytest.mark.parametrize(
    "option",
    [
        "m: 4G",
        "object: [memory-backend-ram, size: 4G]",
        "object: [memory-backend-file, size: 4G, mem-path: /dev/shm/x]",
    ],
)
def test_ordinary_memory_wants_none(host: OtherHost, option: str) -> None:
    assert huge(host, option) == []


# ivshmem


def shared(host: OtherHost, path: str, size: str = "32M") -> list[Finding]:
    definition = launcher("", f"[object: [memory-backend-file, id: s, share: on, mem-path: {path}, size: {size}]]")
    return list(memory.shared_files(host.tree, asked.backends(definition), "alice"))


LOOKING_GLASS = "/dev/shm/looking-glass"
TMPFILES = "echo 'f /dev/shm/looking-glass 0660 alice kvm -' | sudo tee -a /etc/tmpfiles.d/qemu-memory.conf"


def test_file_that_is_ours(host: OtherHost) -> None:
    host.write(LOOKING_GLASS)
    assert told(shared(host, LOOKING_GLASS)) == [f"ok: {LOOKING_GLASS} is yours to use"]


def test_file_that_is_not_there_yet(host: OtherHost) -> None:
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert severity == "note"
    assert text == f"there is no {LOOKING_GLASS} yet; QEMU makes it, for you alone to write"
    assert TMPFILES in fix


def test_file_that_cannot_be_made(host: OtherHost) -> None:
    host.forbid("/dev/shm")
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"there is no {LOOKING_GLASS}, and QEMU may not make it in /dev/shm")
    assert fix.startswith(TMPFILES)


def test_file_of_somebody_else(host: OtherHost) -> None:
    host.write(LOOKING_GLASS)
    host.forbid(LOOKING_GLASS)
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"{LOOKING_GLASS} is not yours to read and write")
    assert TMPFILES in fix


def test_file_of_another_size(host: OtherHost) -> None:
    host.write(LOOKING_GLASS, "x" * 4096)
    severity, text, fix = the_only(shared(host, LOOKING_GLASS))
    assert (severity, text) == ("error", f"{LOOKING_GLASS} has 4 KiB, and the definition says 32 MiB")
    assert fix.startswith("write size: 4096, or remove the file")
    assert shared(host, LOOKING_GLASS, "4096")[0].severity == "ok"


def test_no_room_for_it(host: OtherHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(host.tree), "free_bytes", lambda *_: 16 << 20)
    host.write(LOOKING_GLASS)
    found = shared(host, LOOKING_GLASS)
    assert [one.severity for one in found] == ["ok", "warning"]
    assert found[1].text.startswith("/dev/shm has 16 MiB left")


def test_kvmfr(host: OtherHost) -> None:
    severity, text, fix = the_only(shared(host, "/dev/kvmfr0", "64M"))
    assert (severity, text) == ("error", "there is no /dev/kvmfr0")
    assert fix == "sudo modprobe kvmfr static_size_mb=64 (Looking Glass)"
    host.write("/dev/kvmfr0")
    host.write("/sys/module/kvmfr/parameters/static_size_mb", "32,0,0\n")
    assert the_only(shared(host, "/dev/kvmfr0", "64M"))[:2] == (
        "error",
        "/dev/kvmfr0 has 32 MiB, and the definition says 64 MiB",
    )
    assert the_only(shared(host, "/dev/kvmfr0"))[0] == "ok"
    host.forbid("/dev/kvmfr0")
    assert 'SUBSYSTEM=="kvmfr", OWNER="alice"' in the_only(shared(host, "/dev/kvmfr0"))[2]


# RAM


def test_more_ram_than_there_is(host: OtherHost) -> None:
    assert list(memory.enough(host.tree, 16 * GIB, 0)) == []
    severity, text, _ = the_only(list(memory.enough(host.tree, 24 * GIB, 0)))
    assert (severity, text) == ("warning", "the guest's RAM is 24 GiB, and the host has 16 GiB to spare now")
    assert list(memory.enough(host.tree, 24 * GIB, 8 * GIB)) == [], "huge pages are set aside already"
    assert list(memory.enough(host.tree, None, 0)) == []


def test_ram_in_huge_pages(host: OtherHost) -> None:
    definition = launcher("", f"[object: '{MEMFD}', object: 'memory-backend-ram,size=1G']")
    assert memory.in_huge_pages(host.tree, asked.backends(definition)) == 4 * GIB


VFIO = "[m: 4G, device: 'vfio-pci,host=1:0.0']"


def test_memlock_of_this_login() -> None:
    definition = launcher("", VFIO)
    need = MemlockNeed(5 * GIB, 5 * GIB, unaided=True)
    found = the_only(list(memory.own_memlock(definition, need, 1 << 20, 8 * GIB)))
    assert found[:2] == ("ok", "8 GiB may be locked in this login, without the helper")


def test_memlock_that_was_forbidden_and_is_needed() -> None:
    definition = launcher("rlimit_memlock: false", VFIO)
    severity, text, fix = the_only(list(memory.own_memlock(definition, None, 8 << 20, 8 << 20)))
    assert severity == "error"
    assert text == "VFIO locks the guest's RAM, 4 GiB, and QEMU may lock 8 MiB"
    assert "rlimit_memlock: auto" in fix
    assert list(memory.own_memlock(definition, None, 4 * GIB, 4 * GIB)) == []
    locked = launcher("rlimit_memlock: false", "[m: 4G, overcommit: mem-lock=on]")
    assert "mem-lock=on locks" in the_only(list(memory.own_memlock(locked, None, 0, 0)))[1]
    assert list(memory.own_memlock(launcher("", "[m: 4G]"), None, 0, 0)) == []
