"""`import --libvirt` with the real virsh, and libvirt's QEMU driver inside it (qemu:///embed): no daemon is started."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qemu_launcher import cmdline, definition
from qemu_launcher.definition import VmDefinition
from qemu_launcher.importing import command_line, libvirt
from unit.reading import ROOT

DOMAIN = Path(__file__).with_name("libvirt_domain.xml").read_text(encoding="utf-8")
VFIO = """<hostdev mode='subsystem' type='pci' managed='yes'>
  <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x1'/></source>
</hostdev>"""
NOBODY = 65534  # Debian's user for owning nothing
PATIENCE = 120


class Host(NamedTuple):
    """A folder in which libvirt keeps all it has, and the environment that makes virsh use it."""

    folder: Path
    environ: dict[str, str]

    def xml(self, old: str = "", new: str = "") -> Path:
        path = self.folder / "domain.xml"
        path.write_text(self.plain().replace(old, new), encoding="utf-8")
        return path

    def plain(self) -> str:
        return DOMAIN.replace("DISK", f"{self.folder}/disk,1.img").replace("CDROM", f"{self.folder}/cd.iso")

    def run(self, *words: object) -> "subprocess.CompletedProcess[str]":
        argv = list(map(str, words))
        return subprocess.run(
            argv, env=self.environ, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=self.folder
        )

    def launch(self, *words: object) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, "-m", "qemu_launcher", "import", *words)

    def imported(self, *words: object) -> VmDefinition:
        done = self.launch("--libvirt", *words)
        assert (done.returncode, done.stderr) == (0, "")
        return definition.parse(done.stdout.encode(), Path("win11.yml"), "win11")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    virsh = shutil.which("virsh")
    if virsh is None:
        pytest.skip("virsh is not installed (libvirt-clients, libvirt-daemon-driver-qemu)")
    # Not pytest's own folder: nobody cannot go there.
    with tempfile.TemporaryDirectory(prefix="libvirt-") as path:
        folder = Path(path)
        folder.chmod(0o755)
        for name in ("disk,1.img", "cd.iso"):
            (folder / name).write_bytes(bytes(1 << 20))
        (folder / "bin").mkdir()
        own = folder / "own"
        own.mkdir()
        wrapper = folder / "bin" / "virsh"
        as_user = ""
        if os.geteuid() == 0:  # root's libvirt wants a user of its package's, and is not what a user has
            os.chown(own, NOBODY, NOBODY)
            as_user = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "
        wrapper.write_text(f'#!/bin/sh\nexec {as_user}{shlex.quote(virsh)} "$@"\n')
        wrapper.chmod(0o755)
        environ = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "HOME": str(own),
            "XDG_RUNTIME_DIR": str(own),
            "LIBVIRT_DEFAULT_URI": f"qemu:///embed?root={own}",
            "PYTHONPATH": str(ROOT / "launcher"),
        }
        host = Host(folder, environ)
        done = host.run("virsh", "uri")
        if "failed to connect" in done.stderr:
            pytest.skip(f"libvirt's QEMU driver is not installed (libvirt-daemon-driver-qemu): {done.stderr}")
        yield host


def test_what_becomes_of_a_domain(host: Host) -> None:
    vm = host.imported(host.xml("<!-- HOSTDEV -->", VFIO))
    assert vm.binary == "/usr/bin/qemu-system-x86_64"
    assert vm.env == (("FOO", "a b"),)
    assert vm.pinning is not None
    assert vm.pinning.topology is not None
    assert {dict(place)["socket"]: cpus.cpus for place, cpus in vm.pinning.topology.items()} == {0: {4}, 1: {5}, 3: {7}}
    assert vm.emulator_pinning is not None
    assert vm.emulator_pinning.cpus == {0, 1}
    assert {name: cpus.cpus for name, cpus in (vm.iothread_pinning or {}).items()} == {"iothread1": {0, 2}}
    assert (vm.scheduler, vm.priority, vm.isolation) == ("fifo", 1, "shield")
    assert vm.emulator_scheduler is not None
    assert vm.emulator_scheduler.policy == "batch"
    assert vm.memlock.bytes == 3 << 30
    argv = cmdline.qemu_argv(vm)
    words = " ".join(argv)
    assert "masterKey0" not in words
    assert "charmonitor" not in words
    assert not {"-S", "-no-shutdown"} & set(argv)
    assert "vfio-pci,host=0000:01:00.1,id=hostdev1" in words
    assert "usb-host,vendorid=0x1234,productid=0x5678,id=hostdev0" in words
    assert "virtio-net-pci,netdev=hostnet0,id=net0,mac=52:54:00:12:34:56,bootindex=2,bus=pcie.0,addr=0x1c" in words
    assert "e1000e,netdev=hostnet1,id=net1,mac=52:54:00:12:34:57" in words
    assert f"filename={host.folder}/disk,,1.img" in words
    assert "-global ICH9-LPC.disable_s3=1" in words


@pytest.mark.parametrize(
    ("backing", "memory"),
    [
        ("<hugepages/><access mode='shared'/>", "memfd,id=pc.ram,share=on,size=134217728,hugetlb=on,prealloc=on"),
        ("<hugepages/><access mode='private'/>", "memfd,id=pc.ram,share=off,size=134217728,hugetlb=on,prealloc=on"),
        ("<access mode='shared'/>", "memfd,id=pc.ram,share=on,size=134217728"),
        ("<source type='file'/>", "ram,id=pc.ram,size=134217728"),
    ],
)
def test_the_folder_that_virsh_names_is_known(host: Host, backing: str, memory: str) -> None:
    words = cmdline.qemu_argv(host.imported(host.xml("<locked/>", backing)))
    found = [word.replace("x-use-canonical-path-for-ramblock-id=off,", "") for word in words]
    assert [word for word in found if "id=pc.ram" in word] == [f"memory-backend-{memory}"]


def test_memory_of_a_node_of_the_host(host: Host) -> None:
    """-object has lists otherwise than -blockdev, and QEMU refuses the one for the other."""
    bound = "<numatune><memory mode='strict' nodeset='0'/></numatune>"
    vm = host.imported(host.xml("<memtune>", f"{bound}<memtune>"))
    argv = [word for word in cmdline.qemu_argv(vm) if word.startswith("memory-backend")]
    assert [word.partition("host-nodes=")[2].split(",")[0] for word in argv] == ["0"]
    assert "memory backend: m0" in tree(
        [vm.binary, "-M", "none", "-display", "none", "-object", argv[0].replace("id=pc.ram", "id=m0")]
    )


def test_throttled_disks(host: Host) -> None:
    """QEMU tells what it has understood; the disk on SATA is another's."""
    iotune = (
        "<iotune><total_bytes_sec>1000000</total_bytes_sec><total_bytes_sec_max>5000000</total_bytes_sec_max>"
        "<total_bytes_sec_max_length>7</total_bytes_sec_max_length><write_iops_sec>50</write_iops_sec>"
        "<size_iops_sec>8192</size_iops_sec><group_name>my disks</group_name></iotune>"
    )
    first = "<target dev='vda' bus='virtio'/>"
    more = (
        f"{first}{iotune}</disk><disk type='file' device='disk'><driver name='qemu' type='raw'/>"
        f"<source file='{host.folder}/disk2.img'/><target dev='sdb' bus='sata'/>{iotune}"
    )
    shutil.copy(host.folder / "disk,1.img", host.folder / "disk2.img")
    vm = host.imported(host.xml(first, more))
    of_group = {"path": "/objects/throttle-group-.1", "property": "limits"}
    with tempfile.TemporaryDirectory() as ground:
        argv = [vm.binary, *elsewhere(cmdline.qemu_argv(vm)[1:], str(host.folder / "own"), ground)]
        (limits, blocks) = answers(argv, {"execute": "qom-get", "arguments": of_group}, {"execute": "query-block"})
    assert {name: value for name, value in limits.items() if value > 1} == {
        "bps-total": 1000000,
        "bps-total-max": 5000000,
        "bps-total-max-length": 7,
        "iops-write": 50,
        "iops-size": 8192,
    }
    inserted = [block["inserted"] for block in blocks if "inserted" in block]
    assert {node["node-name"] for node in inserted if node["drv"] == "throttle"} == {"throttled-vda", "throttled-sdb"}


IOTUNE = "<iotune><total_iops_sec>1000</total_iops_sec></iotune>"


def test_a_throttled_disk_frees_what_its_guest_frees(host: Host) -> None:
    disk = host.folder / "disk,1.img"
    disk.write_bytes(bytes(1 << 20))
    unmap = host.xml("cache='unsafe'/>", f"cache='unsafe' discard='unmap'/>{IOTUNE}")
    before = disk.stat().st_blocks
    assert before > 0
    with tempfile.TemporaryDirectory() as ground:
        vm = host.imported(unmap)
        argv = [vm.binary, *elsewhere(cmdline.qemu_argv(vm)[1:], str(host.folder / "own"), ground)]
        freeing = {"command-line": 'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend "discard -q 0 1M"'}
        answers(argv, {"execute": "human-monitor-command", "arguments": freeing})
    assert disk.stat().st_blocks < before


def test_a_throttled_disk_that_may_only_be_read(host: Host) -> None:
    vm = host.imported(host.xml("cache='unsafe'/>", f"cache='unsafe'/><readonly/>{IOTUNE}"))
    with tempfile.TemporaryDirectory() as ground:
        argv = [vm.binary, *elsewhere(cmdline.qemu_argv(vm)[1:], str(host.folder / "own"), ground)]
        (blocks,) = answers(argv, {"execute": "query-block"})
    inserted = [block["inserted"] for block in blocks if "inserted" in block]
    assert [node["ro"] for node in inserted if node["drv"] == "throttle"] == [True]


def test_a_memory_device_with_pages_of_its_own(host: Host) -> None:
    """What virsh refuses where hugetlbfs is not mounted for it."""
    device = (
        "<memory model='dimm'><source><pagesize unit='MiB'>2</pagesize><nodemask>0</nodemask></source>"
        "<target><size unit='MiB'>128</size><node>0</node></target></memory>"
    )
    numa = (
        "<maxMemory slots='2' unit='GiB'>1</maxMemory>"
        "<cpu><numa><cell id='0' cpus='0-3' memory='128' unit='MiB'/></numa></cpu><memtune>"
    )
    path = host.xml("<memtune>", numa)
    path.write_text(
        path.read_text().replace("</emulator>", f"</emulator>{device}").replace("128</memory>", "256</memory>")
    )
    words = [word for word in cmdline.qemu_argv(host.imported(path)) if "id=memdimm0" in word]
    assert words == [
        "memory-backend-memfd,id=memdimm0,size=134217728,host-nodes=0,policy=bind,hugetlb=on,hugetlbsize=2097152,prealloc=on"
    ]


def test_virtual_cpus_that_are_plugged_in(host: Host) -> None:
    each = "<vcpu id='0' enabled='yes' hotpluggable='no'/>" + "".join(
        f"<vcpu id='{index}' enabled='{enabled}' hotpluggable='yes'/>"
        for index, enabled in ((1, "yes"), (2, "yes"), (3, "no"))
    )
    vm = host.imported(host.xml("<iothreads>", f"<vcpus>{each}</vcpus><iothreads>"))
    assert any(word.startswith("3,maxcpus=4,") for word in cmdline.qemu_argv(vm))


def test_by_name(host: Host) -> None:
    assert host.run("virsh", "define", without_what_we_replace(host)).returncode == 0
    try:
        assert cmdline.qemu_argv(host.imported("win11"))[1:3] == ["-name", "guest=win11,debug-threads=on"]
    finally:
        host.run("virsh", "undefine", "win11")
    done = host.launch("--libvirt", "win11")
    assert done.returncode == 1
    assert done.stderr.startswith("qemu-launcher: virsh: failed to get domain 'win11'")
    assert "    virsh list --all names yours" in done.stderr


def test_what_libvirt_refuses(host: Host) -> None:
    done = host.launch("--libvirt", host.xml().with_name("no.xml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"qemu-launcher: cannot read {host.folder}/no.xml: No such file or directory\n"
    done = host.launch("--libvirt", host.xml("<emulator>/usr/bin/qemu-system-x86_64", "<emulator>/nonexistent/qemu"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("qemu-launcher: virsh: ")
    assert "    it is about what stands in the XML" in done.stderr


def answers(argv: list[str], *commands: dict[str, Any]) -> list[Any]:
    """What this QEMU says to these commands of QMP, before its guest runs."""
    spoken = [{"execute": "qmp_capabilities"}, *commands, {"execute": "quit"}]
    done = subprocess.run(
        [*argv, "-S", "-qmp", "stdio"],
        input="".join(json.dumps(command) + "\n" for command in spoken),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    returned = [answer["return"] for answer in found if "return" in answer]
    assert len(returned) == len(spoken), done.stderr
    return returned[1:-1]


def tree(argv: list[str]) -> str:
    """All devices of this QEMU and their properties, as it tells them."""
    about = ("qtree", "block", "iothreads", "memdev")
    texts = answers(
        argv,
        *({"execute": "human-monitor-command", "arguments": {"command-line": f"info {what}"}} for what in about),
    )
    # The numbers of processes and of threads differ.
    return "\n".join(line for line in "\n".join(texts).splitlines() if "thread_id" not in line)


def test_the_readable_form_is_the_same_machine(host: Host) -> None:
    """The options that are virsh's own, once as it prints them and once as they are imported."""
    vm = host.imported(host.xml("<locked/>", ""))
    printed = host.run("virsh", "domxml-to-native", "qemu-argv", "--xml", without_what_we_replace(host))
    words = shlex.split(printed.stdout)
    start = words.index(vm.binary)
    options = [option for option in command_line.options_of(words[start + 1 :]) if not is_libvirts(option)]
    theirs = [word for option in options for word in cmdline.option_argv(command_line.as_read(option))]
    ours = cmdline.qemu_argv(vm)
    ours = ours[: ours.index("-netdev")]
    assert sum(word.startswith("{") for word in theirs) > 10
    assert sum(word.startswith("{") for word in ours) == 0
    own = str(host.folder / "own")
    with tempfile.TemporaryDirectory() as ground:  # for the guest agent's socket
        assert tree([vm.binary, *elsewhere(theirs, own, ground)]) == tree(
            [vm.binary, *elsewhere(ours[1:], own, ground)]
        )


def elsewhere(words: list[str], own: str, ground: str) -> list[str]:
    """The same words, sockets of libvirt's in a folder that is there."""
    return [f"socket,id=agent,path={ground}/s,server=on,wait=off" if f"path={own}" in word else
            word.replace("charchannel0", "agent") for word in words]  # fmt: skip


def is_libvirts(option: Any) -> bool:
    return libvirt._is_libvirts(libvirt._readable(option))


def without_what_we_replace(host: Host) -> Path:
    path = host.folder / "rest.xml"
    text = host.plain().replace("<locked/>", "")
    for element in ("interface", "tpm", "cputune", "memtune", "hostdev"):
        while (begin := text.find(f"<{element}")) >= 0:
            end = text.index(f"</{element}>", begin) + len(f"</{element}>")
            text = text[:begin] + text[end:]
    path.write_text(text)
    return path


def test_a_card_with_all_that_libvirt_can_say_of_it(host: Host) -> None:
    """Its properties must have QEMU's names; and no two devices the same turn at the boot, which QEMU refuses."""
    old = "<model type='virtio'/><boot order='2'/>"
    driver = (
        "<driver name='vhost' txmode='iothread' ioeventfd='on' event_idx='off' rx_queue_size='512' rss='on' "
        "rss_hash_report='on' iommu='on' ats='on' packed='on' page_per_vq='on'>"
        "<host csum='off' gso='off' tso4='off' tso6='off' ecn='off' ufo='off' mrg_rxbuf='on'/>"
        "<guest csum='off' tso4='off' tso6='off' ecn='off' ufo='off'/></driver>"
    )
    model = "<model type='virtio-non-transitional'/>"
    path = host.xml(old, f"{model}{driver}<teaming type='persistent'/><boot order='1'/>")
    clock = "<clock offset='variable' adjustment='3600' basis='utc'/>"
    last = "<qemu:arg value='-set'/><qemu:arg value='device.net1.mac=52:54:00:00:00:99'/>"
    text = path.read_text(encoding="utf-8").replace("<locked/>", "").replace("<devices>", f"{clock}<devices>")
    path.write_text(text.replace("<qemu:env ", f"{last}<qemu:env "), encoding="utf-8")
    vm = host.imported(path)
    assert "base=utc" in cmdline.qemu_argv(vm)
    with tempfile.TemporaryDirectory() as ground:
        found = tree([vm.binary, *elsewhere(cmdline.qemu_argv(vm)[1:], str(host.folder / "own"), ground)])
    for said in ("rx_queue_size = 512", "page-per-vq = true", "failover = true", 'mac = "52:54:00:00:00:99"'):
        assert said in found


def test_overrides_and_turns_at_the_boot(host: Host) -> None:
    """virsh sorts the disks, gives the first its turn, and counts the PCI device as hostdev0, libvirt's USB."""
    shutil.copy(host.folder / "disk,1.img", host.folder / "disk2.img")
    second = (
        f"<disk type='file'><driver name='qemu' type='raw'/><source file='{host.folder}/disk2.img'/>"
        "<target dev='vdb' bus='virtio'/></disk>"
    )
    path = host.xml("<!-- HOSTDEV -->", VFIO)
    said = (
        "<qemu:device alias='{}'><qemu:frontend>"
        "<qemu:property name='{}' type='{}' value='{}'/></qemu:frontend></qemu:device>"
    )
    overrides = (
        said.format("hostdev0", "guest-reset", "bool", "false")
        + said.format("hostdev1", "x-vga", "bool", "true")
        + said.format("virtio-disk1", "bootindex", "unsigned", "7")
    )
    text = path.read_text(encoding="utf-8").replace("</emulator>", f"</emulator>{second}")
    path.write_text(text.replace("</domain>", f"<qemu:override>{overrides}</qemu:override></domain>"), encoding="utf-8")
    words = cmdline.qemu_argv(host.imported(path))
    devices = {word.partition(",id=")[2].partition(",")[0]: word for word in words if ",id=" in word}
    assert "x-vga=on" in devices["hostdev1"]
    assert "guest-reset" not in devices["hostdev1"]
    assert "guest-reset=off" in devices["hostdev0"]
    turns = [word.partition("bootindex=")[2].partition(",")[0] for word in words if "bootindex=" in word]
    assert sorted(turns) == ["2", "7"]
    assert "bootindex=7" in devices["virtio-disk1"]


def test_the_definition_starts(host: Host) -> None:
    """All of it, the replaced network too; only the agent's socket must be where there is a folder."""
    vm = host.imported(host.xml("<locked/>", ""))
    with tempfile.TemporaryDirectory() as ground:
        found = tree([vm.binary, *elsewhere(cmdline.qemu_argv(vm)[1:], str(host.folder / "own"), ground)])
    assert 'dev: virtio-net-pci, id "net0"' in found
    assert 'dev: e1000e, id "net1"' in found
    assert 'mac = "52:54:00:12:34:56"' in found
