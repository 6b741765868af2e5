"""The qemu section as QEMU's arguments, and what the launcher reads out of it."""

import pytest

from qemu_launcher import cmdline, hostdevices, locking, options, ram
from qemu_launcher.definition import VmDefinition
from unit.reading import argv, launcher, read, refusal


def vm(items: str) -> VmDefinition:
    """A definition with these options, a flow sequence without its brackets."""
    return launcher("", f"[{items}]")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("- nographic", ["-nographic"]),
        ("- -nographic", ["--nographic"]),
        ("- '3': a", ["-3", "a"]),
        ("- m: 4096", ["-m", "4096"]),
        ("- a: ''", ["-a", ""]),
        ("- a: pc,accel=kvm", ["-a", "pc,accel=kvm"]),
        ("- a: [pc, accel: kvm]", ["-a", "pc,accel=kvm"]),
        ("- a:\n  - pc\n  - accel: kvm", ["-a", "pc,accel=kvm"]),
        ("- a: ['x,y', 'f=a,b']", ["-a", "x,y,f=a,b"]),
        ("- a: [file: 'x,y', id: 'a,,b']", ["-a", "file=x,,y,id=a,,,,b"]),
        ("- a: ['']", ["-a", ""]),
        ("- a: [b: '']", ["-a", "b="]),
        ("- a: [readonly: true, n: 010, x: 0x1F, f: 1.50, e: 1e3, b: on]",
         ["-a", "readonly=true,n=010,x=0x1F,f=1.50,e=1e3,b=on"]),
        ("- a: [true, null-ish, -0]", ["-a", "true,null-ish,-0"]),
        ("- a: |\n    one\n    two", ["-a", "one\ntwo\n"]),
        ('- a: "t\\tu\\u00fc"', ["-a", "t\tuü"]),
        ("- a: [x: y=z]", ["-a", "x=y=z"]),
        ("- device: '{\"driver\": \"e1000\", \"id\": \"n\"}'", ["-device", '{"driver": "e1000", "id": "n"}']),
        ("- a: b # comment\n# more\n- c", ["-a", "b", "-c"]),
    ],
)  # fmt: skip
def test_argv(items: str, expected: list[str]) -> None:
    assert argv(items) == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("- true", '3:3: an option must be text, not true\n    write it in quotes: "true"'),
        ("- []", "3:3: an option must be a flag or name: value, not an empty list"),
        ("- {}", "3:3: an option is one name: value, not 0 of them"),
        ("- a: 1\n  b: 2", "4:3: an option is one name: value, not 2 of them\n    begin each with a dash of its own"),
        ("- '': a", "3:3: an option's name is empty"),
        ("- 3: a", "3:3: an option's name must be text, not the number 3\n    write it in quotes: \"3\""),
        ("- true: a", "3:3: an option's name must be text, not true\n    write it in quotes: \"true\""),
        ("- a:", "3:5: the value of a must be a single value, not nothing (null)\n    for an empty value write ''"),
        ("- a: {b: c}", "3:6: the value of a must be text or a list, not a map\n    write a: [name: value, ...]"),
        ("- a: []", "3:6: the value of a is an empty list\n    for an option without a value write just: - a"),
        ("- a: [~]", "3:7: an element of a must be a single value, not nothing (null)\n"
         "    for an empty value write ''"),
        ("- a: [[b]]", "3:7: an element of a must be a single value, not a list"),
        ("- a: [b: [c]]", "3:10: a: b must be a single value, not a list"),
        ("- a: [b: {c: d}]", "3:10: a: b must be a single value, not a map"),
        ("- a: [{b: 1, c: 2}]", "3:14: an element of a is one name: value, not 2 of them\n"
         "    begin each with a dash of its own"),
        ("- --nographic", "3:3: no option's name begins with hyphens: '--nographic'\n"
         "    write it without hyphens: nographic"),
        ("- --m: 64M", "3:3: no option's name begins with hyphens: '--m'\n    write it without hyphens: m"),
        ("- '--'", "3:3: no option's name begins with hyphens: '--'"),
        ("- '-'", "3:3: no option's name begins with hyphens: '-'"),
        ("- drive file: x", "3:3: an option's name has no space: 'drive file'\n    write - drive: [file: VALUE, ...]"),
        ("- nographic -m 64M", "3:3: an option's name has no space: 'nographic -m 64M'\n"
         "    each option has a line and a dash of its own: - nographic"),
        ('- "nographic "', "3:3: an option's name has no space: 'nographic '\n    write - nographic"),
        ("- ' '", "3:3: an option's name has no space: ' '"),
        ("- drive:file: x", "3:3: an option's name has no colon: 'drive:file'\n    write - drive: [file: VALUE, ...]"),
        ("- m:4G -nographic", "3:3: an option's name has no colon: 'm:4G -nographic'\n"
         "    each option has a line and a dash of its own: - m"),
        ("- m :64M", "3:3: an option's name has no space: 'm :64M'\n    write - m: 64M"),
        ("- m:64M: 5", "3:3: an option's name has no colon: 'm:64M'"),
        ("- '::'", "3:3: an option's name has no colon: '::'"),
        ("- machine: [q35, accel:kvm]", "3:18: an element of machine has no space after its colon: 'accel:kvm'\n"
         "    write accel: kvm"),
        ("- nic: [user, hostfwd:tcp::2222-:22]", "3:15: an element of nic has no space after its colon: "
         "'hostfwd:tcp::2222-:22'\n    write hostfwd: tcp::2222-:22"),
        ("- drive: [file: x, if:virtio]", "3:20: an element of drive has no space after its colon: 'if:virtio'\n"
         "    write if: virtio"),
        ("- a: [3: b]", "3:7: a name in a must be text, not the number 3\n    write it in quotes: \"3\""),
        ("- a: [~: b]", "3:7: a name in a must be text, not nothing (null)"),
    ],
)  # fmt: skip
def test_refused_options(items: str, message: str) -> None:
    assert refusal(f"launcher: {{binary: q}}\nqemu:\n{items}\n") == message


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("m:64M", ["-m", "64M"]),
        ("--m:64M", ["-m", "64M"]),
        ("append:#a", ["-append", "#a"]),
        ("vnc::1", ["-vnc", ":1"]),
        ("serial:tcp:127.0.0.1:80", ["-serial", "tcp:127.0.0.1:80"]),
        ("m 64M", ["-m", "64M"]),
        ("-m 64M", ["-m", "64M"]),
        ("--m  64M", ["-m", "64M"]),
        ("drive file=a.img,if=virtio", ["-drive", "file=a.img,if=virtio"]),
        ('append "console=ttyS0 quiet"', ["-append", "console=ttyS0 quiet"]),
        ('device {"driver":"e1000"}', ["-device", '{"driver":"e1000"}']),
    ],
)
def test_hint_for_a_missing_colon_or_space_is_right(item: str, expected: list[str]) -> None:
    shown = refusal(f"launcher: {{binary: q}}\nqemu:\n- {item}\n")
    message, hint = shown.splitlines()
    assert message == f"3:3: an option's name has no {'space' if ' ' in item else 'colon'}: {item!r}"
    assert argv(hint.partition("write ")[2]) == expected


@pytest.mark.parametrize(
    "item",
    [
        "serial: [tcp:127.0.0.1:80, server:on]",  # no option whose elements all have names
        "d: [guest_errors, trace:kvm_*]",
        "nic: [tap:x]",
        "device: [vfio-pci, 01:00.0]",
        "nic: [user, hostfwd=tcp::2222-:22]",
        "drive: ['file=a,', 'b:c']",  # a file called a,b:c
        "netdev: [socket, 'x: y']",
    ],
)
def test_colons_that_are_none_of_yaml_s(item: str) -> None:
    assert vm(item).options[0].name == item.partition(":")[0]


def test_the_binary_comes_first() -> None:
    assert cmdline.qemu_argv(read("launcher: {binary: /opt/q}\nqemu: [a]")) == ["/opt/q", "-a"]


def test_shell_command() -> None:
    definition = vm("name: it's me, nographic, a: [x: 'b c']")
    assert cmdline.shell_command(definition, wrapped=False) == """q -name 'it'"'"'s me' -nographic -a 'x=b c'"""
    wrapped = cmdline.shell_command(definition, wrapped=True)
    assert wrapped == """q \\\n    -name 'it'"'"'s me' \\\n    -nographic \\\n    -a 'x=b c'"""


def test_properties_are_what_qemu_makes_of_the_value() -> None:
    option = vm("a: [pc, x: 'b,c=d', 'e=f,,g,h']").options[0]
    assert list(option.properties()) == [("pc", None), ("x", "b,c=d"), ("e", "f,g"), ("h", None)]
    assert list(vm("a: b=c").options[0].properties()) == [("b", "c")]
    assert list(vm("a").options[0].properties()) == []


@pytest.mark.parametrize("items", ["S", "-S", "a: b, S", "S: x"])
def test_has_option(items: str) -> None:
    assert cmdline.has_option(vm(items), "S")


@pytest.mark.parametrize("items", ["", "s", "a: S", "SS"])
def test_has_not_option(items: str) -> None:
    assert not cmdline.has_option(vm(items), "S")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", 128 << 20),
        ("m: 2G", 2 << 30),
        ("m: 2g", 2 << 30),
        ("-m: 2G", 2 << 30),
        ("m: 4096", 4 << 30),
        ("m: 4096M", 4 << 30),
        ("m: 1.5G", 3 << 29),
        ("m: 1048576K", 1 << 30),
        ("m: 1073741824B", 1 << 30),
        ("m: 'size=2G,slots=2,maxmem=8G'", 2 << 30),
        ("m: [2G, slots: 2, maxmem: 8G]", 2 << 30),
        ("m: [slots: 2, maxmem: 8G]", 128 << 20),
        ("m: [maxmem: 8G, size: 3G]", 3 << 30),
        ("m: 2G, m: 3G", 3 << 30),
        ("m: 2G, m: 'maxmem=8G'", 2 << 30),
        ("m: lots", None),
        ("m: 0x10", 16 << 20),
        ("m: 0x", None),
        ("m: 0x1g", None),
        ("m: '\u0661G'", None),
        ("m: ''", None),
        ("m: 99999999999999999999999T", None),
        ("m: 2G, object: [memory-backend-memfd, id: mem, size: 4G]", 2 << 30),
        ("machine: [q35, memory-backend: mem], object: [memory-backend-memfd, id: mem, size: 4G]", 4 << 30),
        ("M: 'q35,memory-backend=mem', object: 'memory-backend-memfd,id=mem,size=1073741824'", 1 << 30),
        ("machine: [q35, memory-backend: mem], object: [memory-backend-memfd, id: other, size: 4G]", None),
        # What may be said where we do not look
        ("m: 2G, readconfig: file", None),
        ("m: 2G, -readconfig: file", None),
        ("machine: [q35, memory.size: 4G]", None),
        ("M: 'memory.size=4G', m: 2G", None),
        # Memory that is plugged in from the start
        ("m: 1G, object: [memory-backend-ram, id: a, size: 2G], device: [pc-dimm, memdev: a]", 3 << 30),
        (
            "m: 1G, object: [qom-type: memory-backend-ram, id: a, size: 2G], device: [driver: nvdimm, memdev: a]",
            3 << 30,
        ),
        (
            "m: 1G, object: 'memory-backend-file,id=a,size=2G,mem-path=/x', device: 'virtio-mem-pci,id=v,memdev=a'",
            3 << 30,
        ),
        (
            "m: 1G, object: [memory-backend-ram, id: a, size: 2147483648], device: [pc-dimm, memdev: a], "
            "object: [memory-backend-ram, id: b, size: 1G], device: [pc-dimm, memdev: b]",
            4 << 30,
        ),
        (
            'm: 1G, object: \'{"qom-type": "memory-backend-ram", "id": "a", "size": 1073741824}\', '
            'device: \'{"driver": "pc-dimm", "memdev": "a"}\'',
            2 << 30,
        ),
        ("m: 1G, object: [memory-backend-ram, id: a, size: 1G], device: [cxl-type3, volatile-memdev: a]", 2 << 30),
        ("m: 1G, object: [memory-backend-ram, id: a, size: 1G], numa: [node, memdev: a]", 1 << 30),
        ("m: 1G, object: [memory-backend-ram, id: a, size: 1G]", 1 << 30),
        ("m: 1G, device: [pc-dimm, memdev: a]", None),
        ("m: 1G, object: [memory-backend-ram, id: a, size: lots], device: [pc-dimm, memdev: a]", None),
        ("m: 1G, device: '{nonsense}'", 1 << 30),
        ("m: 1G, device: '{nonsense with memdev}'", None),
        ('m: 1G, device: \'{"memdev": ' + 10000 * "[" + "'", None),
        ("m: 1G, device: '[1]'", 1 << 30),
        ('m: 1G, device: \'{"driver": "pc-dimm", "memdev": 1}\'', None),
        ("m: lots, object: [memory-backend-ram, id: a, size: 2G], device: [pc-dimm, memdev: a]", None),
        ("m: 8388607T, object: [memory-backend-ram, id: a, size: 8388607T], device: [pc-dimm, memdev: a]", None),
    ],
)
def test_guest_ram(items: str, expected: int | None) -> None:
    assert ram.guest_ram(vm(items).options) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("device: vfio-pci", True),
        ("device: 'vfio-pci,host=01:00.0'", True),
        ("device: [vfio-pci, host: 01:00.0]", True),
        ("device: [vfio-pci-nohotplug, host: 01:00.0]", True),
        ("device: [host: 01:00.0, driver: vfio-pci]", True),
        ("-device: vfio-pci", True),
        ('device: \'{"driver": "vfio-pci", "host": "01:00.0"}\'', True),
        ('device: \'{"driver": "e1000"}\'', False),
        ('device: \'{"driver": "e1000", "id": "vfio-pci"}\'', False),
        ("device: \"{'driver': 'vfio-pci', 'host': '01:00.0'}\"", True),
        # A device that another program makes, over a socket (QEMU 10.1): nothing of the host is handed over
        ("device: 'vfio-user-pci,socket.type=unix,socket.path=/x'", False),
        ('device: \'{"driver": "vfio-user-pci", "socket": {"type": "unix", "path": "/x"}}\'', False),
        ("device: \"{'driver': 'vfio-user-pci'}\"", False),
        ("device: [virtio-net-pci, id: vfio-pci]", False),
        ("device: [virtio-net-pci, vfio-pci]", False),
        ("drive: vfio-pci", False),
        ("device", False),
    ],
)
def test_has_vfio(items: str, expected: bool) -> None:
    assert hostdevices.has_vfio(vm(items).options) is expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", None),
        ("device: [vfio-pci, host: 01:00.0]", "VFIO"),
        ("device: 'vfio-user-pci,socket.type=unix,socket.path=/x'", None),
        ("netdev: 'vhost-vdpa,id=n,vhostdev=/dev/vhost-vdpa-0'", "vDPA"),
        ("netdev: [type: vhost-vdpa, id: n]", "vDPA"),
        ('netdev: \'{"type": "vhost-vdpa", "id": "n"}\'', "vDPA"),
        ("netdev: \"{'type': 'vhost-vdpa', 'id': 'n'}\"", "vDPA"),
        ("nic: vhost-vdpa", "vDPA"),
        ("netdev: [user, id: vhost-vdpa]", None),
        ("device: [vhost-vdpa-device-pci, vhostdev: /dev/vhost-vdpa-0]", "vDPA"),
        ("blockdev: [virtio-blk-vhost-vdpa, path: /dev/vhost-vdpa-0, node-name: d]", "vDPA"),
        ("drive: 'file=nvme://0000:44:00.0/1,if=none,id=d'", "QEMU's NVMe driver"),
        ("drive: [file: nvme://0000:44:00.0/1, if: none]", "QEMU's NVMe driver"),
        ("drive: [file.driver: nvme, file.device: 0000:44:00.0]", "QEMU's NVMe driver"),
        ('drive: [file: \'json:{"driver": "nvme", "device": "0000:44:00.0"}\']', "QEMU's NVMe driver"),
        ("hda: nvme://0000:44:00.0/1", "QEMU's NVMe driver"),
        ("blockdev: [driver: nvme, node-name: d, device: 0000:44:00.0, namespace: 1]", "QEMU's NVMe driver"),
        ("blockdev: [nvme, node-name: d]", "QEMU's NVMe driver"),
        ("blockdev: [raw, file.driver: nvme, node-name: d]", "QEMU's NVMe driver"),
        ('blockdev: \'{"driver": "raw", "file": {"driver": "nvme", "namespace": 1}}\'', "QEMU's NVMe driver"),
        ("blockdev: \"{'driver': 'nvme', 'node-name': 'd'}\"", "QEMU's NVMe driver"),
        # An emulated controller, and a file that is called so
        ("device: [nvme, serial: x, drive: d]", None),
        ("drive: [file: nvme.img, id: nvme]", None),
        ("blockdev: [file, filename: nvme, node-name: nvme]", None),
        ('blockdev: \'{"driver": "file", "filename": "nvme", "node-name": "nvme"}\'', None),
        ("drive", None),
        ("hda", None),
    ],
)
def test_pinned_by(items: str, expected: str | None) -> None:
    assert hostdevices.pinned_by(vm(items).options) == expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("overcommit: mem-lock=on", True),
        ("overcommit: [mem-lock: on, cpu-pm: on]", True),
        ("overcommit: [mem-lock: yes]", True),
        ("overcommit: [mem-lock: true]", True),
        ("overcommit: mem-lock", True),
        ("overcommit: mem-lock=on-fault", True),
        ("overcommit: mem-lock=off", False),
        ("overcommit: cpu-pm=on", False),
        ("name: mem-lock=on", False),
    ],
)
def test_has_mem_lock(items: str, expected: bool) -> None:
    assert locking.has_mem_lock(vm(items).options) is expected


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ("", None),
        ("smp: 4", 4),
        ("smp: cpus=4", 4),
        ("smp: [4, maxcpus: 8]", 8),
        ("smp: [sockets: 2, cores: 3, threads: 2]", 12),
        ("smp: [sockets: 1, dies: 2, cores: 3, threads: 2]", 12),
        ("smp: [4, sockets: 1, cores: 2, threads: 2]", 4),
        ("smp: [0, cores: 3]", 3),
        ("smp: 2, smp: [maxcpus: 6]", 6),
        ("smp: 2, smp: 3", 3),
        ("smp: many", None),
        ("smp: '4,5'", None),
        ("smp: [cores: x]", None),
        ("smp: 4, readconfig: file", None),
        ("machine: 'q35,smp.cpus=2'", 2),
        ("smp: 2, M: [pc, smp.cpus: 4, smp.maxcpus: 6, usb: on]", 6),
        ("machine: [pc, smp.cpus: 4], smp: 2", 2),
        ("machine: 'pc,smp.cpus'", None),
        ("machine: 'pc,smp.cpus=0x4'", None),
        ("machine: pc", None),
    ],
)
def test_vcpu_limit(items: str, expected: int | None) -> None:
    assert options.vcpu_limit(vm(items).options) == expected


@pytest.mark.parametrize(
    ("items", "name"),
    [
        ("[nographic]", "nographic"),
        ("[nographic, nodefaults]", None),
        ("[{serial: stdio}]", "serial"),
        ("[{-serial: 'mon:stdio'}]", "serial"),
        ("[{display: none}, {monitor: stdio}]", "monitor"),
        ("[{chardev: [stdio, id: c, mux: on]}]", "chardev"),
        ("[{chardev: 'stdio,id=c'}]", "chardev"),
        ("[{chardev: [file, id: stdio, path: stdio]}]", None),
        ("[{serial: 'file:stdio'}]", None),
        ("[{name: stdio}]", None),
        ("[]", None),
    ],
)
def test_option_that_uses_the_terminal(items: str, name: str | None) -> None:
    found = cmdline.terminal_option(read(f"launcher: {{binary: q}}\nqemu: {items}\n"))
    assert (None if found is None else found.bare_name) == name
