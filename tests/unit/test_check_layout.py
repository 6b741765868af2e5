"""vCPUs on CPUs that do not go together: several L3 caches, kinds of core, NUMA nodes; and where it must be so."""

from pathlib import Path

import pytest

from qemu_launcher.check import layout
from qemu_launcher.check.finding import Finding
from qemu_launcher.definition import VmDefinition
from unit.other_host import OtherHost, the_only, told
from unit.reading import launcher


@pytest.fixture
def x3d(tmp_path: Path) -> OtherHost:
    """A 7950X3D: two chips of 8 cores, of which the first has more cache; CPU n and n + 16 are one core."""
    host = OtherHost(tmp_path)
    host.cache("0-7,16-23", "98304K")
    host.cache("8-15,24-31")
    host.node(0, "0-31")
    return host


@pytest.fixture
def hybrid(tmp_path: Path) -> OtherHost:
    """8 performance cores of two threads, 4 efficiency cores, all with one L3 cache."""
    host = OtherHost(tmp_path)
    host.cache("0-19")
    host.write("/sys/devices/cpu_core/cpus", "0-15\n")
    host.write("/sys/devices/cpu_atom/cpus", "16-19\n")
    host.node(0, "0-19")
    return host


@pytest.fixture
def sockets(tmp_path: Path) -> OtherHost:
    """Two sockets of 8 CPUs, each a node with one L3 cache."""
    host = OtherHost(tmp_path)
    for number, cpus in enumerate(("0-7", "8-15")):
        host.cache(cpus)
        host.node(number, cpus)
    return host


def pinned(where: str, qemu: str = "[]", more: str = "") -> VmDefinition:
    return launcher(f"vcpu_pinning: {where}\n{more}", qemu)


def looked_at(host: OtherHost, definition: VmDefinition) -> list[Finding]:
    return list(layout.layout(definition, host.tree))


# L3 caches


def test_across_two_caches(x3d: OtherHost) -> None:
    severity, text, fix = the_only(looked_at(x3d, pinned("[6, 22, 7, 23, 8, 24]", "[smp: 6]")))
    assert severity == "note"
    assert text == (
        "the vCPUs are on 2 L3 caches: vCPUs 0-3 on CPUs 6-7,22-23 (96 MiB), vCPUs 4-5 on CPUs 8,24 (32 MiB)"
    )
    assert fix == (
        "what they share is slow from one to the other, and the guest knows nothing of it: "
        "pin all to CPUs of one, 0-7,16-23 (96 MiB) or 8-15,24-31 (32 MiB); lscpu -e=CPU,CORE,CACHE shows them"
    )


def test_by_topology_host_cpus_are_named(x3d: OtherHost) -> None:
    definition = pinned("{0: {0: {0: 7, 1: 23}, 1: {0: 8, 1: 24}}}")
    assert the_only(looked_at(x3d, definition))[1] == (
        "the vCPUs are on 2 L3 caches: CPUs 7,23 (96 MiB), CPUs 8,24 (32 MiB)"
    )


def test_a_vcpu_that_may_run_on_either(x3d: OtherHost) -> None:
    [one] = looked_at(x3d, pinned("['7-8', 9]"))
    assert "vCPU 0 on CPU 7 (96 MiB), vCPUs 0-1 on CPUs 8-9 (32 MiB)" in one.text


def test_only_caches_that_are_large_enough_are_offered(tmp_path: Path) -> None:
    """And sizes are told where they differ."""
    host = OtherHost(tmp_path)
    for cpus in ("0-3", "4-7", "8-9"):
        host.cache(cpus)
    fix = the_only(looked_at(host, pinned("[2, 3, 4]")))[2]
    assert "pin all to CPUs of one, 0-3 or 4-7; lscpu" in fix


def test_many_caches_are_not_all_told(tmp_path: Path) -> None:
    host = OtherHost(tmp_path)
    for first in range(0, 64, 8):
        host.cache(f"{first}-{first + 7}")
    _, text, fix = the_only(looked_at(host, pinned("[0, 8, 16, 24, 32, 40]")))
    assert text == (
        "the vCPUs are on 6 L3 caches: vCPU 0 on CPU 0, vCPU 1 on CPU 8, vCPU 2 on CPU 16, vCPU 3 on CPU 24, ..."
    )
    assert "0-7 or 8-15 or 16-23 or 24-31 or ...; lscpu" in fix


@pytest.mark.parametrize(
    ("where", "qemu"),
    [
        ("[0, 16, 7, 23]", "[smp: 4]"),
        ("[12, 28]", "[smp: 2]"),
        # More than one cache has CPUs.
        (str([*range(16), 16]), "[smp: 17]"),
        # The guest has a die, or a socket, for each.
        ("[6, 7, 8, 9]", "[smp: [4, dies: 2, cores: 2]]"),
        ("[6, 7, 8, 9]", "[smp: [4, sockets: 2]]"),
        ("[6, 7, 8, 9]", "[smp: [4, maxcpus: 4, sockets: 2, cores: 2]]"),
        ("{0: {0: {0: 6}}, 1: {0: {0: 8}}}", "[smp: 'sockets=2']"),
        ("{socket 0: {die 0: {0: {0: 6}}, die 1: {0: {0: 8}}}}", "[smp: 'dies=2']"),
        # The core number counts through both dies.
        ("{0: {0: {0: 6}, 1: {0: 7}, 2: {0: 8}, 3: {0: 9}}}", "[smp: 'dies=2,cores=2']"),
    ],
)
def test_what_goes_together(x3d: OtherHost, where: str, qemu: str) -> None:
    assert looked_at(x3d, pinned(where, qemu)) == []


@pytest.mark.parametrize(
    ("where", "qemu"),
    [
        ("[6, 8, 7, 9]", "[smp: [4, dies: 2, cores: 2]]"),
        ("{0: {0: {0: 6}, 1: {0: 8}, 2: {0: 7}, 3: {0: 9}}}", "[smp: 'dies=2,cores=2']"),
        ("[6, 7, 8, 9]", "[smp: many]"),
        ("[6, 7, 8, 9]", "[smp: 2, readconfig: x]"),
    ],
)
def test_dies_of_the_guest_that_are_not_the_hosts(x3d: OtherHost, where: str, qemu: str) -> None:
    assert told(looked_at(x3d, pinned(where, qemu)))[0].startswith("note: the vCPUs are on 2 L3 caches: ")


# Kinds of core


def test_across_two_kinds(hybrid: OtherHost) -> None:
    severity, text, fix = the_only(looked_at(hybrid, pinned("[14, 15, 16, 17]")))
    assert severity == "note"
    assert text == (
        "the vCPUs are on 2 kinds of core: vCPUs 0-1 on CPUs 14-15 (performance), vCPUs 2-3 on CPUs 16-17 (efficiency)"
    )
    assert fix == (
        "a guest takes all its vCPUs for equally fast: "
        "pin all to CPUs of one, 0-15 (performance) or 16-19 (efficiency); lscpu -e=CPU,CORE,MAXMHZ shows them"
    )


def test_a_third_kind(hybrid: OtherHost) -> None:
    """Cores outside of the chip with the L3 cache, which have none."""
    hybrid.write("/sys/devices/cpu_lowpower/cpus", "20-21\n")
    assert "vCPU 1 on CPU 20 (low power)" in the_only(looked_at(hybrid, pinned("[0, 20]")))[1]


@pytest.mark.parametrize("where", ["[0, 1]", "[16, 17]", str(list(range(17)))])
def test_one_kind_or_more_than_one_kind_has(hybrid: OtherHost, where: str) -> None:
    assert looked_at(hybrid, pinned(where)) == []


# NUMA nodes


def test_across_two_nodes(sockets: OtherHost) -> None:
    """Of which each has a cache of its own: told once."""
    severity, text, fix = the_only(looked_at(sockets, pinned("[6, 7, 8, 9]")))
    assert severity == "warning"
    assert text == "the vCPUs are on 2 NUMA nodes: vCPUs 0-1 on CPUs 6-7 (node 0), vCPUs 2-3 on CPUs 8-9 (node 1)"
    assert fix == (
        "memory of one is slow from the other, and the guest knows nothing of it: "
        "pin all to CPUs of one, 0-7 (node 0) or 8-15 (node 1); lscpu -e=CPU,CORE,NODE shows them"
    )


def test_more_than_one_node_has(sockets: OtherHost) -> None:
    severity, text, fix = the_only(looked_at(sockets, pinned(str(list(range(3, 13))))))
    assert severity == "note"
    assert text == "the vCPUs are on 2 NUMA nodes: vCPUs 0-4 on CPUs 3-7 (node 0), vCPUs 5-9 on CPUs 8-12 (node 1)"
    assert fix == (
        "no node has as many CPUs: tell the guest which vCPUs are on which, with memory of each, as in "
        "qemu-launcher.yml(5), NUMA"
    )


@pytest.mark.parametrize("count", [4, 10])
def test_a_guest_with_nodes_of_its_own(sockets: OtherHost, count: int) -> None:
    first = 8 - count // 2
    told_guest = "[numa: 'node,memdev=a', numa: [node, memdev: b], numa: [dist, src: 0, dst: 1, val: 20]]"
    assert looked_at(sockets, pinned(str(list(range(first, first + count))), told_guest)) == []
    one = "[numa: [node, memdev: a], numa: [dist, src: 0, dst: 0, val: 10]]"
    assert len(looked_at(sockets, pinned(str(list(range(first, first + count))), one))) == 1


def test_a_node_without_cpus(sockets: OtherHost) -> None:
    sockets.node(2, "")
    assert looked_at(sockets, pinned("[8, 9]")) == []


# Hosts that say nothing


@pytest.mark.parametrize("where", ["[0, 1, 2, 3]", "{0: {0: {0: 0}, 1: {0: 2}}}"])
def test_nothing_is_known(tmp_path: Path, where: str) -> None:
    host = OtherHost(tmp_path)
    host.cpus("0-15", siblings=8)
    assert looked_at(host, pinned(where)) == []


def test_no_vcpu_is_pinned(x3d: OtherHost) -> None:
    assert looked_at(x3d, launcher("emulator_pinning: [7, 8]")) == []


def test_files_that_make_no_sense(x3d: OtherHost) -> None:
    x3d.write("/sys/devices/system/cpu/cpu6/cache/index3/shared_cpu_list", "?")
    x3d.write("/sys/devices/system/node/node1/cpulist", "x")
    x3d.write("/sys/devices/system/node/nodes/cpulist", "0")
    x3d.write("/sys/devices/system/cpu/cpu7/cache/index3/size", "much")
    assert len(looked_at(x3d, pinned("[6, 7, 8]"))) == 1
