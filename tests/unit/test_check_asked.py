"""What options ask of the host, in all the ways in which QEMU lets them be written."""

import pytest

from qemu_launcher.check import asked
from qemu_launcher.check.asked import Image, VfioDevice
from qemu_launcher.definition import VmDefinition
from unit.reading import launcher, read

GIB = 1 << 30


def vm(qemu: str, binary: str = "qemu-system-x86_64") -> VmDefinition:
    return read(f"launcher: {{binary: {binary}}}\nqemu: {qemu}\n")


@pytest.mark.parametrize(
    ("qemu", "wanted"),
    [
        ("[enable-kvm]", "needed"),
        ("[-enable-kvm]", "needed"),
        ("[accel: kvm]", "needed"),
        ("[accel: [kvm, kernel-irqchip: split]]", "needed"),
        ("[machine: 'q35,accel=kvm']", "needed"),
        ("[machine: [q35, accel: kvm]]", "needed"),
        ("[M: [q35, accel: kvm]]", "needed"),
        ("[cpu: host]", "needed"),
        ("[cpu: 'host,migratable=off']", "needed"),
        ("[machine: [q35, accel: 'kvm:tcg']]", "preferred"),
        ("[accel: kvm, accel: tcg]", "preferred"),
        ("[accel: tcg]", None),
        ("[accel: 'tcg,thread=multi']", None),
        ("[cpu: max]", None),
        ("[machine: q35]", None),
        ("[]", None),
    ],
)
def test_kvm(qemu: str, wanted: str | None) -> None:
    assert asked.kvm(vm(qemu)) == wanted


def test_a_binary_that_begins_with_kvm() -> None:
    assert asked.kvm(vm("[]", "/usr/bin/qemu-kvm")) == "preferred"
    assert asked.kvm(vm("[accel: tcg]", "/usr/bin/qemu-kvm")) is None


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("[vfio-pci, host: '01:00.0', multifunction: on]", VfioDevice("0000:01:00.0", None, iommufd=False)),
        ("'vfio-pci,host=0000:0a:1f.7'", VfioDevice("0000:0a:1f.7", None, iommufd=False)),
        ("'driver=vfio-pci,host=A:0.1'", VfioDevice("0000:0a:00.1", None, iommufd=False)),
        ("[driver: vfio-pci, host: '01:00.0']", VfioDevice("0000:01:00.0", None, iommufd=False)),
        (
            '\'{"driver": "vfio-pci", "host": "10000:e1:00.0", "multifunction": true}\'',
            VfioDevice("10000:e1:00.0", None, iommufd=False),
        ),
        ("[vfio-pci, host: '01:00.0', iommufd: io0]", VfioDevice("0000:01:00.0", None, iommufd=True)),
        (
            "[vfio-pci, sysfsdev: /sys/bus/mdev/devices/4b20d080]",
            VfioDevice(None, "/sys/bus/mdev/devices/4b20d080", iommufd=False),
        ),
        ("[vfio-pci, host: '0x0:001:1f.07']", VfioDevice("0000:01:1f.7", None, iommufd=False)),
        ("[vfio-pci, host: nonsense]", None),
        ("[vfio-user-pci, host: '01:00.0', socket.path: /x]", None),
        ("[virtio-net-pci, host: '01:00.0']", None),
        ("'{broken'", None),
    ],
)
def test_vfio(device: str, found: VfioDevice | None) -> None:
    assert asked.vfio(vm(f"[device: {device}]")) == ([] if found is None else [found])


@pytest.mark.parametrize(
    "text", ["1:00", "0000:01:00", "01:00.O", "01:00.8", "01:20.0", "100:00.0", "0000:01:00.0.0", "", "01:00.0x0"]
)
def test_no_address_of_vfio(text: str) -> None:
    definition = vm(f"[m: 1G, device: [vfio-pci, host: '{text}'], device: 'vfio-pci-nohotplug,host={text}']")
    assert asked.vfio(definition) == []
    assert [(mark.line, said) for mark, said in asked.no_addresses(definition)] == [(2, text)] * 2


@pytest.mark.parametrize(
    "device",
    [
        "[vfio-pci, host: '01:00.0']",
        "[vfio-pci, sysfsdev: /sys/x]",
        "[vfio-pci]",
        "[vfio-platform, host: x]",
        "[vfio-user-pci, host: x]",
        "[virtio-net-pci, host: x]",
        "'{broken'",
    ],
)
def test_nothing_but_addresses_of_pci_devices_is_judged(device: str) -> None:
    assert asked.no_addresses(vm(f"[device: {device}]")) == []


def test_evdev() -> None:
    definition = vm(
        "\n  - object: [input-linux, id: kbd, evdev: /dev/input/by-id/kbd-event, grab_all: on]"
        "\n  - object: input-linux,id=mouse,evdev=/dev/input/event4"
        '\n  - object: \'{"qom-type": "input-linux", "id": "x", "evdev": "/dev/input/event9"}\''
        "\n  - device: [virtio-input-host-pci, evdev: /dev/input/event4]"
        "\n  - object: [rng-random, filename: /dev/urandom]"
    )
    assert asked.evdev(definition) == ["/dev/input/by-id/kbd-event", "/dev/input/event4", "/dev/input/event9"]


def test_backends() -> None:
    definition = vm(
        "\n  - object: [memory-backend-memfd, id: ram, size: 4G, hugetlb: on, hugetlbsize: 1G, prealloc: on]"
        "\n  - object: memory-backend-file,id=shm,share=on,mem-path=/dev/shm/looking-glass,size=32M"
        "\n  - object: [memory-backend-ram, id: plain, size: 1G]"
        "\n  - object: [memory-backend-file, id: odd, size: huge, mem-path: /x, readonly: on]"
    )
    memfd, file, plain, odd = asked.backends(definition)
    assert (memfd.size, memfd.hugetlb, memfd.huge_page, memfd.path, memfd.prealloc) == (4 * GIB, True, GIB, None, True)
    assert (file.size, file.hugetlb, file.path, file.readonly) == (32 << 20, False, "/dev/shm/looking-glass", False)
    assert (plain.hugetlb, plain.path) == (False, None)
    assert (odd.size, odd.readonly) == (None, True)


@pytest.mark.parametrize(
    ("option", "nodes", "policy"),
    [
        ("[memory-backend-ram, id: a, size: 1G]", set(), "default"),
        ("[memory-backend-ram, id: a, size: 1G, host-nodes: 1, policy: bind]", {1}, "bind"),
        ("[memory-backend-ram, id: a, size: 1G, host-nodes: '0-1,3', policy: preferred]", {0, 1, 3}, "preferred"),
        ("'memory-backend-ram,id=a,host-nodes=0-1,policy=interleave'", {0, 1}, "interleave"),
        ("'memory-backend-ram,id=a,host-nodes=0,host-nodes=2,policy=bind'", {0, 2}, "bind"),
        (
            '\'{"qom-type": "memory-backend-ram", "id": "a", "host-nodes": [0, 2], "policy": "bind"}\'',
            {0, 2},
            "bind",
        ),
        ("[memory-backend-ram, id: a, size: 1G, host-nodes: all, policy: bind]", set(), "bind"),
    ],
)
def test_nodes_of_a_backend(option: str, nodes: set[int], policy: str) -> None:
    [backend] = asked.backends(vm(f"[object: {option}]"))
    assert (set(backend.nodes), backend.policy) == (nodes, policy)


def test_mem_path_is_a_backend_for_all_of_the_ram() -> None:
    [backend] = asked.backends(vm("\n  - m: 2G\n  - mem-path: /dev/hugepages\n  - mem-prealloc"))
    assert (backend.path, backend.size, backend.prealloc) == ("/dev/hugepages", 2 * GIB, True)


@pytest.mark.parametrize(
    ("items", "found"),
    [
        ("drive: [file: a.qcow2, if: virtio]", [Image("a.qcow2", "drive", writable=True)]),
        ("drive: 'file=a,,b.qcow2,media=disk'", [Image("a,b.qcow2", "drive", writable=True)]),
        ("drive: [file: a.iso, media: cdrom]", [Image("a.iso", "drive", writable=False)]),
        ("drive: [if: pflash, readonly: on, file: code.fd]", [Image("code.fd", "drive", writable=False)]),
        ("drive: [file: a.qcow2, snapshot: on]", [Image("a.qcow2", "drive", writable=False)]),
        ("drive: [file: 'file:a.qcow2']", [Image("a.qcow2", "drive", writable=True)]),
        ("drive: [file: 'nbd://host/x']", []),
        ("drive: [file: 'https://host/x.iso']", []),
        ("drive: [file: 'fat:rw:/tmp/x']", []),
        ("drive: [if: ide, media: cdrom]", []),
        ("blockdev: [driver: file, filename: /a.raw, node-name: x]", [Image("/a.raw", "blockdev", writable=True)]),
        (
            'blockdev: \'{"driver": "qcow2", "read-only": true, "file": {"driver": "file", "filename": "/a"}}\'',
            [Image("/a", "blockdev", writable=False)],
        ),
        ("blockdev: [driver: nbd, server.host: x]", []),
        ("cdrom: a.iso", [Image("a.iso", "cdrom", writable=False)]),
        ("hda: a.img", [Image("a.img", "hda", writable=True)]),
        ("kernel: /boot/vmlinuz", [Image("/boot/vmlinuz", "kernel", writable=False)]),
    ],
)
def test_images(items: str, found: list[Image]) -> None:
    assert asked.images(vm(f"[{items}]")) == found


def test_snapshot_writes_nothing_and_a_file_is_told_once() -> None:
    assert asked.images(vm("[hda: a.img, snapshot]")) == [Image("a.img", "hda", writable=False)]
    assert asked.images(vm("[cdrom: a.img, hda: a.img]")) == [Image("a.img", "hda", writable=True)]


@pytest.mark.parametrize(
    ("smp", "count", "threads"),
    [
        ("[]", 1, 1),
        ("[smp: 4]", 4, 1),
        ("[smp: [4, sockets: 1, cores: 2, threads: 2]]", 4, 2),
        ("[smp: 'sockets=2,cores=2,threads=2']", 8, 2),
        ("[smp: [2, maxcpus: 8]]", 2, 1),
        ("[smp: 'maxcpus=8']", 8, 1),
        ("[smp: [4, threads: 2], smp: [cores: 2]]", 4, 2),
        ("[machine: [q35, smp.cpus: 4, smp.threads: 2]]", 4, 2),
        ("[smp: [4, threads: 0]]", 4, 1),
        ("[smp: many]", None, 1),
        ("[smp: 4, readconfig: x]", None, 1),
    ],
)
def test_vcpus(smp: str, count: int | None, threads: int) -> None:
    definition = vm(smp)
    assert asked.vcpus(definition) == count
    assert asked.threads_per_core(definition) == threads


def test_displays_and_audio() -> None:
    definition = launcher("", "[display: 'gtk,gl=on', audiodev: [pipewire, id: snd0], audio: 'driver=pa']")
    assert asked.displays(definition) == ["gtk"]
    assert [one["driver"] for one in asked.audio(definition)] == ["pipewire", "pa"]


@pytest.mark.parametrize(
    ("chardev", "found"),
    [
        ("[socket, id: tpm, path: tpm/sock]", ["tpm/sock"]),
        ("'socket,id=tpm,path=/run/tpm'", ["/run/tpm"]),
        ("[socket, id: x, path: /run/x, server: on, wait: off]", []),
        ("'socket,id=x,path=/run/x,server,nowait'", []),
        ("'socket,id=x,path=/run/x,reconnect=2'", []),
        ("'socket,id=x,path=x,abstract=on'", []),
        ("'socket,id=x,host=::1,port=1'", []),
        ("'file,id=x,path=/tmp/x'", []),
        ("stdio", []),
    ],
)
def test_sockets_of_others(chardev: str, found: list[str]) -> None:
    assert asked.sockets(vm(f"[chardev: {chardev}]")) == found
