"""Huge pages, files shared with other programs, a login's memory lock: on hosts that have enough and too little."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, memory
from qemu_launcher.check.finding import Finding
from qemu_launcher.plan import MemlockNeed
from qemu_launcher.sizes import INFINITY
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


# Huge pages of a node


@pytest.fixture
def nodes(host: OtherHost) -> OtherHost:
    """Two nodes of 8 CPUs, with half of the huge pages each."""
    for number, cpus in enumerate(("0-7", "8-15")):
        host.node(number, cpus)
        host.huge_pages(2048, total=1024, free=1024, node=number)
    return host


def bound(size: str, more: str) -> str:
    return f"object: [memory-backend-memfd, id: r{len(more)}, size: {size}, hugetlb: on, {more}]"


def test_pages_of_one_node(nodes: OtherHost) -> None:
    assert told(huge(nodes, bound("2G", "host-nodes: 1, policy: bind"))) == [
        "ok: 1024 huge pages of 2 MiB are wanted of node 1, 1024 can be had"
    ]
    severity, text, fix = the_only(huge(nodes, bound("4G", "host-nodes: 1, policy: bind")))
    assert (severity, text) == ("error", "2048 huge pages of 2 MiB are wanted of node 1, and 1024 can be had")
    place = "/sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
    assert fix.startswith(f"echo 2048 | sudo tee {place}; then read it again: ")
    assert fix.endswith("hugepagesz=2M hugepages=1:2048 (Linux 5.16; other nodes behind a comma)")


def test_pages_of_two_nodes_together(nodes: OtherHost) -> None:
    assert told(huge(nodes, bound("4G", "host-nodes: 0-1, policy: bind"))) == [
        "ok: 2048 huge pages of 2 MiB are wanted of nodes 0-1, 2048 can be had"
    ]


def test_what_is_bound_is_taken_from_the_rest(nodes: OtherHost) -> None:
    assert told(huge(nodes, bound("2G", "host-nodes: 1, policy: bind"), f"object: {MEMFD}")) == [
        "ok: 1024 huge pages of 2 MiB are wanted of node 1, 1024 can be had",
        "error: 3072 huge pages of 2 MiB are wanted, and 2048 can be had",
    ]


def test_pages_of_a_node_that_are_promised_to_others(nodes: OtherHost) -> None:
    """The kernel counts promises for all nodes together."""
    nodes.huge_pages(2048, total=2048, free=2048, reserved=1536)
    assert told(huge(nodes, bound("2G", "host-nodes: 1, policy: bind"))) == [
        "ok: 1024 huge pages of 2 MiB are wanted of node 1, 1024 can be had",
        "error: 1024 huge pages of 2 MiB are wanted, and 512 can be had",
    ]


def test_a_preference_is_no_must(nodes: OtherHost) -> None:
    assert told(huge(nodes, bound("4G", "host-nodes: 1, policy: preferred"))) == [
        "ok: 2048 huge pages of 2 MiB are wanted, 2048 can be had"
    ]


def test_a_node_that_is_not_there(nodes: OtherHost) -> None:
    severity, text, fix = the_only(huge(nodes, bound("2G", "host-nodes: 2, policy: bind")))
    assert (severity, text) == ("error", "1024 huge pages of 2 MiB are wanted of node 2, and there is no node 2")
    assert fix == "lscpu shows the nodes; write host-nodes: to match"
    both = huge(nodes, bound("2G", "host-nodes: 0-2, policy: bind"))
    assert the_only(both)[1].endswith("of nodes 0-2, and there is no node 2")


def test_a_size_that_no_node_has(nodes: OtherHost) -> None:
    found = huge(nodes, bound("2G", "host-nodes: 1, policy: bind, hugetlbsize: 16M"))
    assert the_only(found)[1] == "128 huge pages of 16 MiB are wanted, and this host has none of that size"


# Which node the guest's RAM is from

EARLY = "overcommit: mem-lock=on"
USED = "machine: [memory-backend: ram0]"


def elsewhere(host: OtherHost, *options: str, pinning: str = "[8, 9]") -> list[Finding]:
    definition = launcher(f"vcpu_pinning: {pinning}", "".join(f"\n  - {option}" for option in ("smp: 2", *options)))
    return list(memory.elsewhere(definition, host.tree, asked.backends(definition)))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("mem-prealloc",), "QEMU takes it (prealloc) before its threads are pinned, wherever it runs then"),
        ((EARLY,), "QEMU takes it (mem-lock) before its threads are pinned, wherever it runs then"),
        (("device: 'vfio-pci,host=1:0.0'", "mem-prealloc"), "QEMU takes it (prealloc, VFIO) before"),
        ((EARLY, "mem-prealloc"), "QEMU takes it (prealloc, mem-lock) before"),
        (("drive: 'file=nvme://0000:01:00.0/1'",), "QEMU takes it (VFIO) before"),
        (("device: 'vfio-pci,host=1:0.0,iommufd=fd0'",), "QEMU takes it (VFIO) before"),
        (("device: 'vfio-pci,sysfsdev=/sys/bus/pci/devices/0000:01:00.0,iommufd=fd0'",), "QEMU takes it (VFIO) before"),
    ],
)
def test_memory_that_may_be_of_the_other_node(nodes: OtherHost, options: tuple[str, ...], why: str) -> None:
    severity, text, fix = the_only(elsewhere(nodes, "m: 16G", *options))
    assert severity == "warning"
    assert text.startswith(f"all vCPUs are on NUMA node 1, and nothing keeps the guest's memory there: {why}")
    assert fix == (
        "add to the section qemu, where the lines of machine are taken together:\n"
        "- object: [memory-backend-ram, id: ram0, size: 16G, host-nodes: 1, policy: bind]\n"
        "- machine: [memory-backend: ram0]"
    )


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("memory-backend-ram,id=ram,size=2G,prealloc=on", "QEMU takes it (prealloc) before"),
        (MEMFD, "huge pages come from any node that has them"),
    ],
)
@pytest.mark.parametrize(
    "use", ["machine: 'q35,memory-backend=ram'", "numa: 'node,memdev=ram'", "device: 'pc-dimm,memdev=ram'"]
)
def test_a_backend_of_which_ram_consists(nodes: OtherHost, backend: str, why: str, use: str) -> None:
    _, text, fix = the_only(elsewhere(nodes, "m: 2G", f"object: '{backend}'", use))
    assert why in text
    assert fix == "add host-nodes: 1, policy: bind to the object ram"
    assert elsewhere(nodes, "m: 2G", f"object: '{backend}'") == [], "it is not the guest's RAM"


IVSHMEM = "object: 'memory-backend-file,id=shm,size=32M,mem-path=/dev/shm/x,share=on{}'"


def test_a_backend_that_is_no_ram(nodes: OtherHost) -> None:
    """Looking Glass's, of any node."""
    device = "device: [ivshmem-plain, memdev: shm]"
    for more in (",host-nodes=0,policy=bind", ",host-nodes=1,policy=preferred"):
        [one] = elsewhere(nodes, "m: 1G", EARLY, IVSHMEM.format(more), device)
        assert "id: ram0, size: 1G, host-nodes: 1" in (one.fix or "")
    assert elsewhere(nodes, "m: 1G", IVSHMEM.format(",prealloc=on"), device) == []


def test_one_part_of_ram_that_is_bound(nodes: OtherHost) -> None:
    own = "object: 'memory-backend-ram,id=own,size=1G{}'"
    more = "object: 'memory-backend-ram,id=more,size=1G{}'"
    use = ("m: 1G", EARLY, "machine: [memory-backend: own]", "device: [virtio-mem-pci, memdev: more]")
    where = ",host-nodes=1,policy=bind"
    _, text, fix = the_only(elsewhere(nodes, *use, own.format(where), more.format("")))
    assert "nothing keeps all of the guest's memory there" in text
    assert fix == "add host-nodes: 1, policy: bind to the object more"
    assert the_only(elsewhere(nodes, *use, own.format(""), more.format(where)))[2].endswith("to the object own")
    assert the_only(elsewhere(nodes, *use, own.format(""), more.format("")))[2].endswith("to the objects own and more")
    assert elsewhere(nodes, *use, own.format(where), more.format(where)) == []


def test_mem_path_beside_a_backend(nodes: OtherHost) -> None:
    """It is of what has no other, and here is nothing left."""
    own = "object: 'memory-backend-ram,id=own,size=1G,host-nodes=1,policy=bind'"
    assert elsewhere(nodes, EARLY, own, "numa: 'node,memdev=own'", "mem-path: /dev/hugepages") == []


@pytest.mark.parametrize("more", ["", ", iommufd: fd0"])
def test_a_mediated_device(nodes: OtherHost, more: str) -> None:
    """Its driver pins what it needs, when the guest says so."""
    device = f"device: [vfio-pci, sysfsdev: /sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001{more}]"
    assert elsewhere(nodes, "m: 1G", device) == []


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (
            ("machine: 'pc,accel=kvm'", "machine: [q35, accel: kvm]", "m: 1536M"),
            "- object: [memory-backend-ram, id: ram0, size: 1536M, host-nodes: 1, policy: bind]\n"
            "- machine: [q35, memory-backend: ram0]",
        ),
        (
            ("object: [iothread, id: ram0]", "m: 1048K"),
            "- object: [memory-backend-ram, id: ram1, size: 1048K, host-nodes: 1, policy: bind]\n"
            "- machine: [memory-backend: ram1]",
        ),
        # What is plugged in has a backend of its own.
        (
            ("m: 1G", "object: 'memory-backend-ram,id=d,size=2G'", "device: [pc-dimm, memdev: d]"),
            "- object: [memory-backend-ram, id: ram0, size: 1G, host-nodes: 1, policy: bind]\n"
            "- machine: [memory-backend: ram0]\n"
            "and add host-nodes: 1, policy: bind to the object d",
        ),
        (
            ("m: much",),
            "- object: [memory-backend-ram, id: ram0, size: ..., host-nodes: 1, policy: bind]\n- machine: [",
        ),
    ],
)
def test_the_lines_to_write(nodes: OtherHost, options: tuple[str, ...], lines: str) -> None:
    [one] = elsewhere(nodes, EARLY, *options)
    assert (one.fix or "").partition("\n")[2].startswith(lines)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        (
            ("m: 4G", "machine: [q35, memory-backend: ram]", "object: [memory-backend-memfd, id: ram, size: 4G]"),
            "add host-nodes: 1, policy: bind to the object ram",
        ),
        (
            (
                "m: 2G",
                "object: 'memory-backend-ram,id=a,size=1G'",
                "object: 'memory-backend-ram,id=b,size=1G'",
                "numa: [node, memdev: a]",
                "numa: 'node,memdev=b'",
            ),
            "add host-nodes: 1, policy: bind to the objects a and b",
        ),
        (
            ("m: 2G", "mem-path: /dev/hugepages"),
            "write in place of mem-path, where the lines of machine are taken together:\n"
            "- object: [memory-backend-file, id: ram0, size: 2G, mem-path: /dev/hugepages, host-nodes: 1, policy: bind]"
            "\n- machine: [memory-backend: ram0]",
        ),
    ],
)
def test_memory_that_has_an_object_already(nodes: OtherHost, options: tuple[str, ...], fix: str) -> None:
    [one] = elsewhere(nodes, EARLY, *options)
    assert one.fix == fix


@pytest.mark.parametrize(
    "options",
    [
        (),  # the guest takes it itself, on its own vCPUs
        ("overcommit: mem-lock=on-fault",),
        (EARLY, USED, "object: [memory-backend-ram, id: ram0, size: 1G, host-nodes: 0, policy: preferred]"),
        (EARLY, USED, "object: 'memory-backend-ram,id=ram0,size=1G,policy=interleave'"),
        (EARLY, "readconfig: x"),
    ],
)
def test_memory_that_is_said_to_be_somewhere(nodes: OtherHost, options: tuple[str, ...]) -> None:
    assert elsewhere(nodes, "m: 1G", *options) == []


@pytest.mark.parametrize("pinning", ["[7, 8]", "['0-15', 8]"])
def test_vcpus_on_both(nodes: OtherHost, pinning: str) -> None:
    assert elsewhere(nodes, "m: 1G", EARLY, pinning=pinning) == []


def test_a_launcher_that_is_kept_on_a_node(nodes: OtherHost) -> None:
    """By numactl(8), taskset(1), or systemd's NUMAPolicy= and CPUAffinity=: QEMU inherits all of it."""
    nodes.write("/proc/self/numa_maps", "5651688c4000 default file=/usr/bin/python3 mapped=1 N0=1\n")
    nodes.write("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-15\nMems_allowed_list:\t0-1\n")
    assert len(elsewhere(nodes, "m: 1G", EARLY)) == 1
    nodes.write("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-7\nMems_allowed_list:\t0-1\n")
    assert len(elsewhere(nodes, "m: 1G", EARLY)) == 1, "on the other one"
    nodes.write("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t8-15\nMems_allowed_list:\t0-1\n")
    assert elsewhere(nodes, "m: 1G", EARLY) == []
    nodes.write("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-15\nMems_allowed_list:\t0\n")
    assert elsewhere(nodes, "m: 1G", EARLY) == [], "no other can be had"
    nodes.write("/proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-15\nMems_allowed_list:\t0-1\n")
    nodes.write("/proc/self/numa_maps", "5651688c4000 bind:1 file=/usr/bin/python3 mapped=1 N0=1\n")
    assert elsewhere(nodes, "m: 1G", EARLY) == []


def test_hosts_without_a_choice(host: OtherHost) -> None:
    assert elsewhere(host, "m: 1G", EARLY) == []
    host.node(0, "0-15")
    assert elsewhere(host, "m: 1G", EARLY) == []
    host.node(1, "")  # memory alone, which nobody is near to
    assert elsewhere(host, "m: 1G", EARLY) == []


def test_a_node_without_memory(nodes: OtherHost) -> None:
    """Some Threadrippers: there is none to bind to."""
    nodes.node(2, "16-23")
    nodes.write("/sys/devices/system/node/has_memory", "0-1\n")
    assert elsewhere(nodes, "m: 1G", EARLY, pinning="[16, 17]") == []


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
    vdpa = launcher("rlimit_memlock: false", "[m: 4G, netdev: vhost-vdpa, netdev: vhost-vdpa]")
    text = the_only(list(memory.own_memlock(vdpa, None, 5 * GIB, 5 * GIB)))[1]
    assert text == "vDPA locks the guest's RAM more than once, together 8 GiB, and QEMU may lock 5 GiB"
    both = launcher("rlimit_memlock: false", "[m: 4G, overcommit: mem-lock=on, device: vfio-pci]")
    text = the_only(list(memory.own_memlock(both, None, 5 * GIB, 5 * GIB)))[1]
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
    found = memory.pinned_together(beside.tree, 4 * GIB, limit, OTHERS)
    assert the_only(list(found)) == (
        "warning",
        "with iommufd= the kernel counts all VMs of yours together: linux and bsd have pinned 10 GiB, "
        f"this guest's RAM is 4 GiB, and QEMU may lock {may}",
        "leave out iommufd=: then each counts for itself\n"
        "or write rlimit_memlock: 15G, and have the administrator's memlock allow it beside theirs",
    )


def test_iommufd_with_room_for_all(beside: OtherHost) -> None:
    for limit in (14 * GIB, INFINITY):
        assert list(memory.pinned_together(beside.tree, 4 * GIB, limit, OTHERS)) == []


def test_iommufd_alone(beside: OtherHost) -> None:
    assert list(memory.pinned_together(beside.tree, 4 * GIB, 5 * GIB, OTHERS[2:])) == []
    [one] = memory.pinned_together(beside.tree, None, 8 * GIB, [("linux", 70)])
    assert "linux has pinned 8 GiB, this guest's RAM comes to that, and QEMU may lock 8 GiB" in one.text
    assert (one.fix or "").endswith("rlimit_memlock: true, and have the administrator's memlock allow it beside theirs")
