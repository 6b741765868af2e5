"""What the launcher reads out of QEMU's options is what QEMU itself makes of them."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher import cmdline, options, ram, threads
from qemu_launcher.check import asked, numa
from qemu_launcher.check.finding import Finding
from qemu_launcher.pinning import smp_for
from unit.other_host import OtherHost
from unit.reading import read, refusal

QEMU = "qemu-system-x86_64"
BACKEND = "object: [memory-backend-memfd, id: mem, size: 1G]"
TWO = f"{BACKEND}, object: [memory-backend-memfd, id: two, size: 2G]"


def ask(items: str, command: str) -> Any:
    """QEMU's answer to a QMP command, when it is started with these options."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    lines = "".join(json.dumps({"execute": name}) + "\n" for name in ("qmp_capabilities", command, "quit"))
    argv = [*cmdline.qemu_argv(read(definition(items))), "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"]
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, timeout=120, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    returns = [answer["return"] for answer in answers if "return" in answer]
    assert len(returns) == 3, done.stderr
    return returns[1]


@pytest.mark.parametrize(
    ("items", "argv"),
    [
        ("m: 4GB", ["-m", "4GB"]),
        ("m: 4 G", ["-m", "4 G"]),
        ("m: 4Gi", ["-m", "4Gi"]),
        ("m: [1G, maxmem: 8GB]", ["-m", "1G,maxmem=8GB"]),
        ("machine: [pc, accel:tcg]", ["-machine", "pc,accel:tcg"]),
        ("accel: [tcg, thread:multi]", ["-accel", "tcg,thread:multi"]),
        ("smp: [2, maxcpus:2]", ["-smp", "2,maxcpus:2"]),
        ("device: [virtio-rng-pci, bus:pci.0]", ["-device", "virtio-rng-pci,bus:pci.0"]),
        ("drive: [if: none, cache:none]", ["-drive", "if=none,cache:none"]),
        ("netdev: [user, id: n, net:on]", ["-netdev", "user,id=n,net:on"]),
        ("chardev: ['null', id: c, mux:on]", ["-chardev", "null,id=c,mux:on"]),
        ("object: [rng-builtin, id: r, opened:on]", ["-object", "rng-builtin,id=r,opened:on"]),
        ("m:256M", ["-m:256M"]),
    ],
)
def test_what_the_launcher_refuses_qemu_would_refuse(items: str, argv: list[str]) -> None:
    """It says where, and what to write; it takes away nothing."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    assert refusal(definition(items)).startswith("2:")
    command = [QEMU, *argv, "-S", "-display", "none", "-nodefaults", "-monitor", "stdio"]
    done = subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr


def definition(items: str) -> str:
    return f"launcher: {{binary: {QEMU}}}\nqemu: [{items}]\n"


@pytest.mark.parametrize(
    "items",
    [
        "",
        "m: 1G",
        "m: 1000",
        "m: 1.5g",
        "m: 0x10",
        "-m: 1048576K",
        "m: [1G, size: 2G]",
        "m: 1G, m: 2G",
        "m: 1G, m: 'maxmem=2G,slots=1'",
        "m: [slots: 1, maxmem: 2G]",
        f"machine: [q35, memory-backend: mem], {BACKEND}",
        f"M: 'q35,memory-backend=mem', {BACKEND}",
        f"m: 2G, {BACKEND}",
        f"machine: [q35, memory-backend: mem], M: [memory-backend: two], {TWO}",
        f"M: [memory-backend: two], machine: [q35, memory-backend: mem], {TWO}",
    ],
)
def test_guest_ram(items: str) -> None:
    assert ram.guest_ram(read(definition(items)).options) == ask(items, "query-memory-size-summary")["base-memory"]


DIMM = "device: [pc-dimm, memdev: mem]"
JSON_BACKEND = """object: '{"qom-type": "memory-backend-ram", "id": "mem", "size": 134217728}'"""
JSON_DIMM = """device: '{"driver": "pc-dimm", "memdev": "mem"}'"""


@pytest.mark.parametrize(
    "items",
    [f"{BACKEND}, {DIMM}", f"{JSON_BACKEND}, {DIMM}", f"{JSON_BACKEND}, {JSON_DIMM}", f"{BACKEND}, device: e1000"],
)
def test_guest_ram_that_is_plugged_in(items: str) -> None:
    items = f"m: [256M, slots: 2, maxmem: 4G], {items}"
    summary = ask(items, "query-memory-size-summary")
    assert ram.guest_ram(read(definition(items)).options) == summary["base-memory"] + summary["plugged-memory"]


needs_nodes = pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0").exists(), reason="optional: this kernel has no NUMA nodes"
)


@needs_nodes
@pytest.mark.parametrize(
    ("items", "more"),
    [
        ("m: 128M", ""),
        ("machine: [q35, accel: tcg], m: 128M", ""),
        ("machine: 'pc,accel=tcg'", ""),
        ("m: 128M", ", mem-path: /dev/shm"),
    ],
)
def test_lines_that_bind_memory(items: str, more: str, tmp_path: Path) -> None:
    """As `check` has them for a host with two nodes; of this host's they are on the first."""
    host = OtherHost(tmp_path)
    host.node(0, "0-3")
    host.node(1, "4-7")

    def looked_at(items: str) -> list[Finding]:
        found = read(f"launcher: {{binary: q, vcpu_pinning: [2]}}\nqemu: [{items}]\n")
        return list(numa.elsewhere(found, host.tree, asked.backends(found)))

    items += ", mem-prealloc"
    [one] = looked_at(items + more)
    words, *lines = (one.fix or "").splitlines()
    assert words.startswith("write in place of mem-path" if more else "add to the section qemu")
    written = ", ".join([items, *(line.removeprefix("- ") for line in lines)])
    [backend] = ask(written, "query-memdev")
    wanted = {"id": "ram0", "size": 128 << 20, "prealloc": True, "policy": "bind", "host-nodes": [0]}
    assert wanted.items() <= backend.items()
    assert looked_at(written) == []


@needs_nodes
@pytest.mark.parametrize(
    "backend",
    [
        "[memory-backend-ram, id: mem, size: 64M]",
        "[memory-backend-ram, id: mem, size: 64M, host-nodes: 0, policy: bind]",
        "'memory-backend-ram,id=mem,size=64M,host-nodes=0,host-nodes=0-0,policy=preferred'",
        """'{"qom-type": "memory-backend-ram", "id": "mem", "size": 67108864, "host-nodes": [0], "policy": "bind"}'""",
    ],
)
def test_nodes_of_memory(backend: str) -> None:
    items = f"machine: [q35, memory-backend: mem], object: {backend}"
    [told] = ask(items, "query-memdev")
    [found] = asked.backends(read(definition(items)))
    assert (sorted(found.nodes), found.policy) == (told["host-nodes"], told["policy"])


@pytest.mark.parametrize(
    "items",
    [
        "smp: 4",
        "smp: [2, maxcpus: 4]",
        "smp: [sockets: 2, cores: 3, threads: 2]",
        "smp: [sockets: 1, dies: 2, cores: 3]",
        "smp: [0, cores: 3]",
        "smp: 2, smp: [maxcpus: 6]",
        "smp: 4, smp: [sockets: 2]",
        "smp: 2, machine: [pc, smp.cpus: 4]",
        "machine: [pc, smp.cpus: 4], smp: 2",
        "M: [q35, smp.cpus: 2, smp.maxcpus: 4]",
    ],
)
def test_vcpu_limit(items: str) -> None:
    assert options.vcpu_limit(read(definition(items)).options) == len(ask(items, "query-hotpluggable-cpus"))


@pytest.mark.parametrize("machine", ["", "machine: pc", "machine: q35", "machine: isapc"])
def test_pc_without_smp_has_one_vcpu(machine: str) -> None:
    """Why two pinned ones are refused there before QEMU is asked."""
    assert options.smp_numbers(read(definition(machine)).options) == {}
    assert len(ask(machine, "query-hotpluggable-cpus")) == 1


@pytest.mark.parametrize(
    "pinning",
    ["[4, 5, 6]", "{0: {0: {0: 4, 1: 5}, 1: {0: 6}}}", "{1: {0: {0: 4}}}", "{0: {die 1: {2: {0: 4}}}}"],
)
def test_smp_that_is_suggested_has_the_places(pinning: str) -> None:
    keys = f"launcher: {{binary: q, vcpu_pinning: {pinning}}}\nqemu: []\n"
    wanted = read(keys).pinning
    assert wanted is not None
    found = threads.read_threads(
        ask(smp_for(wanted), "query-cpus-fast"), ask(smp_for(wanted), "query-hotpluggable-cpus"), []
    )
    if wanted.topology is None:
        assert len(found.vcpus) == len(wanted.sets)
    else:
        assert all(found.at(place) for place in wanted.topology)


@pytest.mark.parametrize("name", ["a,b", ",", ",,", "a,process=b", "ü ,=x"])
def test_commas_arrive(name: str) -> None:
    assert ask(f"name: [guest: {json.dumps(name, ensure_ascii=False)}]", "query-name") == {"name": name}
