"""Huge pages, of any node and of certain ones, on hosts that have enough and too few."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, hugepages
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only, told, with_memory, with_nodes
from unit.reading import launcher, read

MEMFD = "memory-backend-memfd,id=ram,size=4G,hugetlb=on"
GIB = 1 << 30


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """4 GiB in huge pages of 2 MiB, none of 1 GiB."""
    return with_memory(tmp_path)


def huge(host: OtherHost, *options: str) -> list[Finding]:
    definition = read("launcher: {binary: q}\nqemu:\n" + "".join(f"  - {option}\n" for option in options))
    return list(hugepages.huge_pages(host.tree, asked.backends(definition)))


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
    return with_nodes(host)


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


def test_ram_in_huge_pages(host: OtherHost) -> None:
    definition = launcher("", f"[object: '{MEMFD}', object: 'memory-backend-ram,size=1G']")
    assert hugepages.in_huge_pages(host.tree, asked.backends(definition)) == 4 * GIB
