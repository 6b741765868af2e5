"""libvirt's <iotune>: the filter that stands before each disk, and what is said where there can be none."""

import json
from itertools import pairwise

import pytest

from qemu_launcher import cmdline
from qemu_launcher.errors import DefinitionError
from unit.domains import LINE, definition_of
from unit.reading import read


def disk(target: str, iotune: str, more: str = "", bus: str = "virtio", kind: str = "disk") -> str:
    return (
        f"<disk device='{kind}'><target dev='{target}' bus='{bus}'/>{more}"
        f"<iotune>{''.join(element(*pair.split('=')) for pair in iotune.split())}</iotune></disk>"
    )


def element(name: str, text: str) -> str:
    return f"<{name}>{text}</{name}>"


def device(ident: str, drive: str = "libvirt-1-format") -> str:
    return json.dumps({"driver": "virtio-blk-pci", "drive": drive, "id": ident})


def throttled(disks: str, *devices: str) -> list[str]:
    """The options that have to do with it, each as one text."""
    line = LINE + "".join(f" -device '{text}'" for text in devices)
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{disks}</devices>", line)))
    return [f"{name} {word}" for name, word in pairwise(argv) if "throttle" in word or "virtio-blk" in word]


def group(ident: str, **limits: int) -> str:
    names = {name.replace("_", "-"): value for name, value in limits.items()}
    return "-object " + json.dumps({"qom-type": "throttle-group", "id": ident, "limits": names})


def test_a_filter_before_the_disk() -> None:
    assert throttled(disk("vda", "total_bytes_sec=1000"), device("virtio-disk0", "libvirt-CoR-vda")) == [
        group("throttle-vda", bps_total=1000),
        "-blockdev throttle,node-name=throttled-vda,throttle-group=throttle-vda,file=libvirt-CoR-vda,discard=unmap",
        "-device virtio-blk-pci,drive=throttled-vda,id=virtio-disk0",
    ]


READ_ONLY = '{"driver":"raw","node-name":"libvirt-1-format","read-only":%s,"file":"s"}'
DETECTED = '{"driver":"raw","node-name":"libvirt-1-format","read-only":%s,"x":[{}]}'  # stays JSON


@pytest.mark.parametrize(
    ("more", "blockdev", "end"),
    [
        ("<readonly/>", "", ",read-only=on"),
        ("", READ_ONLY % "true", ",read-only=on"),
        ("", DETECTED % "true", ",read-only=on"),
        ("", READ_ONLY % "false", ""),
        ("", DETECTED % "false", ""),
        ("", READ_ONLY.replace("1-format", "2-format") % "true", ""),
    ],
)
def test_what_is_not_to_be_written_stays_so(more: str, blockdev: str, end: str) -> None:
    """QEMU refuses a filter to be written through, above what may only be read; a cdrom needs no <readonly/>."""
    disks = disk("vda", "total_iops_sec=1", more)
    line = LINE + (f" -blockdev '{blockdev}'" if blockdev else "") + f" -device '{device('virtio-disk0')}'"
    argv = cmdline.qemu_argv(read(definition_of(f"<devices>{disks}</devices>", line)))
    (found,) = [word for word in argv if word.startswith("throttle,")]
    assert found.endswith(f",file=libvirt-1-format,discard=unmap{end}")


ALL = [
    f"{what}_{unit}_sec{end}={number}"
    for number, (what, unit, end) in enumerate(
        [(what, unit, end) for what in ("total", "read", "write") for unit in ("bytes", "iops")
         for end in ("", "_max", "_max_length")], 1
    )
]  # fmt: skip


def test_all_elements() -> None:
    """QEMU's names, in QAPI's ThrottleLimits, are bps-total, iops-read-max-length and so on."""
    found = throttled(disk("vda", " ".join([*ALL, "size_iops_sec=4096"])), device("virtio-disk0"))[0]
    limits = json.loads(found.removeprefix("-object "))["limits"]
    assert (limits["bps-total"], limits["bps-total-max"], limits["bps-total-max-length"]) == (1, 2, 3)
    assert (limits["iops-write"], limits["iops-write-max"], limits["iops-write-max-length"]) == (16, 17, 18)
    assert limits["iops-size"] == 4096
    assert sorted(limits.values()) == [*range(1, 19), 4096]


def test_zero_is_no_limit() -> None:
    found = throttled(
        disk("vda", "total_bytes_sec=0 total_bytes_sec_max_length=0 read_iops_sec=5"), device("virtio-disk0")
    )
    assert found[0] == group("throttle-vda", iops_read=5)


def test_one_budget_for_a_group() -> None:
    """In the order of the devices, which libvirt sorts: the object must be there before its first filter."""
    disks = disk("vdb", "group_name=x") + disk("vda", "group_name=x total_iops_sec=5")
    assert throttled(disks, device("virtio-disk0", "a"), device("virtio-disk1", "b")) == [
        group("throttle-group-x", iops_total=5),
        "-blockdev throttle,node-name=throttled-vda,throttle-group=throttle-group-x,file=a,discard=unmap",
        "-device virtio-blk-pci,drive=throttled-vda,id=virtio-disk0",
        "-blockdev throttle,node-name=throttled-vdb,throttle-group=throttle-group-x,file=b,discard=unmap",
        "-device virtio-blk-pci,drive=throttled-vdb,id=virtio-disk1",
    ]


def test_groups_with_names_that_qemu_has_not() -> None:
    odd = "<disk><target dev='{}' bus='virtio'/><iotune><group_name>{}</group_name></iotune></disk>"
    disks = odd.format("vda", "a b") + odd.format("vdb", "1/2") + odd.format("vdc", " a b") + odd.format("vdd", ".1")
    found = throttled(disks, *(device(f"virtio-disk{index}") for index in range(4)))
    groups = [word.partition("throttle-group=")[2].partition(",")[0] for word in found if "throttle-group=" in word]
    assert groups == ["throttle-group-.1", "throttle-group-.2", "throttle-group-.1", "throttle-group-.3"]


@pytest.mark.parametrize(
    ("target", "bus", "more", "ident"),
    [
        ("vda", "virtio", "", "virtio-disk0"),
        ("vdab", "virtio", "<address type='pci' bus='4'/>", "virtio-disk27"),
        ("vda", "", "", "virtio-disk0"),
        ("sdc", "usb", "", "usb-disk2"),
        ("sdb", "sata", "", "sata0-0-1"),
        ("sdh", "sata", "", "sata1-0-1"),
        ("sda", "sata", "<address type='drive' controller='2' bus='0' target='0' unit='5'/>", "sata2-0-5"),
        ("hdd", "ide", "", "ide0-1-1"),
        ("fdb", "fdc", "", "fdc0-0-1"),
        ("sdb", "scsi", "", "scsi0-0-0-1"),
        ("sdi", "scsi", "", "scsi1-0-0-1"),
        ("sdi", "scsi", "", "scsi1-0-1"),  # lsilogic has no targets
        ("sda", "scsi", "<address type='drive' controller='1' bus='0' target='3' unit='2'/>", "scsi1-0-3-2"),
        ("vda", "virtio", "<alias name='ua-mine'/>", "ua-mine"),
        ("vda", "virtio", "<alias name='ua-a b,c'/>", "virtio-disk0"),  # libvirt takes no notice of it
        ("vda", "virtio", "<alias name='virtio-disk7'/>", "virtio-disk0"),  # of a run; not the XML's to say
    ],
)
def test_which_device_it_is(target: str, bus: str, more: str, ident: str) -> None:
    found = throttled(disk(target, "total_iops_sec=1", more, bus), device("other"), device(ident))
    assert f"-device virtio-blk-pci,drive=throttled-{target},id={ident}" in found


def test_a_device_that_stays_json() -> None:
    printed = {
        "driver": "virtio-blk-pci",
        "drive": "n",
        "id": "virtio-disk0",
        "iothread-vq-mapping": [{"iothread": "a"}],
    }
    found = throttled(disk("vda", "total_iops_sec=1"), json.dumps(printed))
    assert json.loads(found[-1].removeprefix("-device ")) == printed | {"drive": "throttled-vda"}


@pytest.mark.parametrize(
    ("disks", "printed", "names"),
    [
        (disk("vda", "total_iops_sec=1"), "-device {}", "iotune of vda"),
        (disk("sda", "total_iops_sec=1", bus="sd"), "-drive file=/a,if=sd", "iotune of sda"),
        (disk("../x", "total_iops_sec=1"), "", "iotune of a disk"),
        # An empty drive, and the host's own device, whose commands do not pass a filter.
        (disk("sda", "total_iops_sec=1", bus="sata"), "-device ide-cd,id=sata0-0-0", "iotune of sda"),
        (disk("sda", "total_iops_sec=1", bus="scsi", kind="lun"), "-device scsi-block,drive=a,id=scsi0-0-0-0",
         "iotune of sda"),
        ("<disk><target dev='vda'/><throttlefilters/></disk>", "", "throttlefilters of vda"),
        ("<disk><target dev='vda'/><throttlefilters/></disk>", "-blockdev throttle,node-name=a", None),
    ],
)  # fmt: skip
def test_what_cannot_be_throttled_is_named(disks: str, printed: str, names: str | None) -> None:
    text = definition_of(f"<devices>{disks}</devices>", f"{LINE} {printed}")
    found = [line for line in text.splitlines() if line.startswith("# Not carried over from libvirt: ")]
    assert found == ([] if names is None else [f"# Not carried over from libvirt: {names}."])
    assert "throttle-group" not in text


def test_a_limit_that_is_no_number() -> None:
    with pytest.raises(DefinitionError) as caught:
        throttled(disk("vda", "total_iops_sec=-1"))
    assert caught.value.message.startswith("total_iops_sec in the XML is '-1', and must be a number")
