"""Of which NUMA node the guest's memory will be, on hosts with one node and with two."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, numa
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only, told, with_memory, with_nodes
from unit.reading import launcher

MEMFD = "memory-backend-memfd,id=ram,size=4G,hugetlb=on"


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    return with_memory(tmp_path)


@pytest.fixture
def nodes(host: OtherHost) -> OtherHost:
    """Two nodes of 8 CPUs, with half of the huge pages each."""
    return with_nodes(host)


EARLY = "overcommit: mem-lock=on"
USED = "machine: [memory-backend: ram0]"


def elsewhere(host: OtherHost, *options: str, pinning: str = "[8, 9]") -> list[Finding]:
    definition = launcher(f"vcpu_pinning: {pinning}", "".join(f"\n  - {option}" for option in ("smp: 2", *options)))
    return list(numa.elsewhere(definition, host.tree, asked.backends(definition)))


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


MEMINFO = (
    "Node {0} MemTotal:       16777216 kB\nNode {0} MemFree:         2097152 kB\nNode {0} Active(file):    1048576 kB\n"
    "Node {0} Inactive(file):  524288 kB\nNode {0} SReclaimable:    524288 kB\n"
)
BOUND = "object: [memory-backend-{}, id: {}, size: {}, host-nodes: {}, policy: {}]"


def enough(host: OtherHost, *objects: str) -> list[str]:
    for node in (0, 1):
        host.write(f"/sys/devices/system/node/node{node}/meminfo", MEMINFO.format(node))
    definition = launcher("", f"[{', '.join(objects)}]")
    return told(list(numa.enough(host.tree, asked.backends(definition))))


def test_nodes_that_have_what_must_be_theirs(nodes: OtherHost) -> None:
    assert enough(nodes, BOUND.format("ram", "a", "4G", "1", "bind")) == []
    assert enough(nodes, BOUND.format("ram", "a", "8G", "0-1", "bind")) == []
    assert enough(nodes, BOUND.format("ram", "a", "9G", "1", "preferred")) == [], "the rest is from elsewhere"
    assert enough(nodes, BOUND.format("memfd, hugetlb: on", "a", "9G", "1", "bind")) == [], "set aside already"
    assert enough(nodes, BOUND.format("ram", "a", "9G", "7", "bind")) == [], "QEMU says so itself"


def test_nodes_that_have_too_little_of_what_must_be_theirs(nodes: OtherHost) -> None:
    both = [BOUND.format("ram", "a", "3G", "1", "bind"), BOUND.format("memfd", "b", "2G", "1", "bind")]
    assert enough(nodes, *both) == ["warning: 5 GiB must be of node 1 (policy: bind), with 4 GiB to spare now"]
    wide = BOUND.format("ram", "c", "9G", "0-1", "bind")
    assert enough(nodes, wide) == ["warning: 9 GiB must be of nodes 0-1 (policy: bind), with 8 GiB to spare now"]
