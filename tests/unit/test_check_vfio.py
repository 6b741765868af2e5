"""Passing a graphics card through: each of the ways in which a host is not ready for it."""

from pathlib import Path

import pytest

from qemu_launcher.check import asked, vfio
from qemu_launcher.check.asked import VfioDevice
from qemu_launcher.check.finding import Finding
from unit.other_host import AMD, INTEL, OtherHost, told
from unit.reading import launcher

CARD, SOUND, SSD, PORT = "0000:01:00.0", "0000:01:00.1", "0000:03:00.0", "0000:00:01.0"


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """A host that is ready: card and sound bound to vfio-pci in group 14, with the bridge above them."""
    host = OtherHost(tmp_path)
    host.write("/proc/cpuinfo", INTEL)
    host.write("/proc/cmdline", "BOOT_IMAGE=/vmlinuz quiet intel_iommu=on")
    host.pci(CARD, driver="vfio-pci", group=14)
    host.pci(SOUND, driver="vfio-pci", group=14, kind="0x040300")
    host.pci(PORT, driver="pcieport", group=14, kind="0x060400")
    host.write("/dev/vfio/14")
    host.write("/dev/vfio/vfio")
    return host


def check(host: OtherHost, *addresses: str, iommufd: bool = False, release: str = "6.12.0") -> list[Finding]:
    devices = [VfioDevice(address, None, iommufd) for address in addresses or (CARD, SOUND)]
    return list(vfio.vfio(host.tree, devices, "alice", release))


def error(host: OtherHost, *addresses: str) -> Finding:
    [one] = [finding for finding in check(host, *addresses) if finding.severity != "ok"]
    assert one.severity == "error"
    return one


def test_ready(host: OtherHost) -> None:
    assert told(check(host)) == [
        f"ok: {CARD} (display, 10de:2684) is bound to vfio-pci, IOMMU group 14",
        "ok: /dev/vfio/14 is yours to use",
        "ok: nothing else in IOMMU group 14 is in use by the host",
        f"ok: {SOUND} (multimedia, 10de:2684) is bound to vfio-pci, IOMMU group 14",
    ]


def test_no_address(host: OtherHost) -> None:
    """In a report, with its place."""
    definition = launcher("", "[device: [vfio-pci, host: 1:00], device: [vfio-pci, host: '01:00.O']]")
    found = list(vfio.addresses(asked.no_addresses(definition)))
    assert told(found) == [
        "error: win11.yml:3:8: '1:00' is no PCI address",
        "error: win11.yml:3:40: '01:00.O' is no PCI address",
    ]
    assert {one.fix for one in found} == {"write it as lspci -D does: 0000:01:00.0"}


def test_no_such_device(host: OtherHost) -> None:
    one = error(host, "0000:09:00.0")
    assert one.text == "there is no device 0000:09:00.0 on this host (/sys/bus/pci/devices/0000:09:00.0)"
    assert one.fix is not None
    assert "lspci -D" in one.fix


@pytest.mark.parametrize(
    ("cpu", "arguments", "fix"),
    [
        (INTEL, "quiet", "add intel_iommu=on to the kernel command line, "),
        (INTEL, "quiet intel_iommu=on", "it is on for the kernel: switch it on in the firmware too"),
        (AMD, "quiet", "switch the IOMMU on in the firmware (AMD-Vi, IOMMU)"),
        (AMD, "amd_iommu=off", "add amd_iommu=on to the kernel command line, "),
    ],
)
def test_no_iommu(host: OtherHost, cpu: str, arguments: str, fix: str) -> None:
    host.write("/proc/cpuinfo", cpu)
    host.write("/proc/cmdline", arguments)
    host.pci(SSD, driver="vfio-pci", group=None)
    one = error(host, SSD)
    assert one.text == f"{SSD} is in no IOMMU group: the IOMMU is off"
    assert (one.fix or "").startswith(fix)


def test_bound_to_the_hosts_own_driver(host: OtherHost) -> None:
    host.pci(SSD, driver="nvme", group=15, kind="0x010802")
    host.write("/dev/vfio/15")
    one = error(host, SSD)
    assert one.text == f"{SSD} (storage, 10de:2684) is bound to nvme, not to vfio-pci"
    assert (one.fix or "").splitlines() == [
        f"for good: sudo driverctl set-override {SSD} vfio-pci",
        "until the next boot: sudo modprobe vfio-pci; "
        f"echo vfio-pci | sudo tee /sys/bus/pci/devices/{SSD}/driver_override; "
        f"echo {SSD} | sudo tee /sys/bus/pci/drivers/nvme/unbind; echo {SSD} | sudo tee /sys/bus/pci/drivers_probe",
    ]


def test_bound_to_nothing(host: OtherHost) -> None:
    host.pci(SSD, driver=None, group=15)
    host.write("/dev/vfio/15")
    one = error(host, SSD)
    assert "bound to no driver" in one.text
    assert "unbind" not in (one.fix or "")


def test_a_driver_made_for_one_kind_of_device(host: OtherHost) -> None:
    host.pci(SSD, driver="mlx5_vfio_pci", group=15, kind="0x020000")
    host.write("/dev/vfio/15")
    assert [one.severity for one in check(host, SSD)] == ["ok"] * 3


def test_node_that_is_not_ours(host: OtherHost) -> None:
    host.forbid("/dev/vfio/14")
    one = error(host)
    assert one.text == "/dev/vfio/14 is not yours to read and write"
    assert one.fix == (
        """echo 'SUBSYSTEM=="vfio", OWNER="alice"' | sudo tee -a /etc/udev/rules.d/70-qemu-vfio.rules; """
        "sudo udevadm control --reload; sudo udevadm trigger --subsystem-match=vfio"
    )


def test_no_node(host: OtherHost) -> None:
    (host.root / "dev/vfio/14").unlink()
    assert error(host).text == "there is no /dev/vfio/14"


def test_a_group_without_an_iommu(host: OtherHost) -> None:
    (host.root / "dev/vfio/14").rename(host.root / "dev/vfio/noiommu-14")
    assert error(host).text == "/dev/vfio/noiommu-14 is a group without an IOMMU"


def test_container_node_that_is_closed(host: OtherHost) -> None:
    host.forbid("/dev/vfio/vfio")
    assert error(host).text == "/dev/vfio/vfio is not yours to read and write"


def test_sound_of_the_card_left_to_the_host(host: OtherHost) -> None:
    (host.root / "sys/devices/pci0000:00" / SOUND / "driver").unlink()
    host.link(f"/sys/devices/pci0000:00/{SOUND}/driver", "/sys/bus/pci/drivers/snd_hda_intel")
    one = error(host, CARD)
    assert one.text == (
        f"{SOUND} (multimedia, 10de:2684) is in IOMMU group 14 too, and the host uses it with snd_hda_intel"
    )
    assert f"sudo driverctl set-override {SOUND} vfio-pci" in (one.fix or "")


@pytest.mark.parametrize("driver", ["pci-stub", "vfio-pci", None])
def test_others_that_do_not_matter(host: OtherHost, driver: str | None) -> None:
    host.pci("0000:01:00.2", driver=driver, group=14, kind="0x0c0330")
    assert {one.severity for one in check(host)} == {"ok"}


def test_a_bridge_is_judged_by_its_driver(host: OtherHost) -> None:
    host.pci("0000:00:02.0", driver="pcieport", group=14, kind="0x060400")
    assert {one.severity for one in check(host)} == {"ok"}
    host.pci("0000:00:03.0", driver="shpchp", group=14, kind="0x060400")
    (held,) = [one for one in check(host) if one.severity == "error"]
    assert "0000:00:03.0" in held.text
    assert "set-override 0000:00:03.0 pci-stub" in (held.fix or ""), "vfio-pci takes no bridges"
    assert {one.severity for one in check(host, release="5.15.0-91-generic")} == {"ok"}, "any driver may keep one there"


def test_iommufd_uses_the_devices_own_node(host: OtherHost) -> None:
    host.folder(f"/sys/devices/pci0000:00/{CARD}/vfio-dev/vfio0")
    host.write("/dev/iommu")
    host.write("/dev/vfio/devices/vfio0")
    host.forbid("/dev/vfio/14")
    assert {one.severity for one in check(host, CARD, iommufd=True)} == {"ok"}
    host.forbid("/dev/vfio/devices/vfio0")
    [one] = [one for one in check(host, CARD, iommufd=True) if one.severity != "ok"]
    assert 'SUBSYSTEM=="vfio-dev", OWNER="alice"' in (one.fix or "")
    (host.root / "dev/iommu").unlink()
    assert "there is no /dev/iommu" in told(check(host, CARD, iommufd=True))[1]


def test_mediated_device(host: OtherHost) -> None:
    folder = "/sys/bus/mdev/devices/4b20d080-1b54-4048-85b3-a6a62d165c01"
    device = VfioDevice(None, folder, iommufd=False)
    [gone] = vfio.vfio(host.tree, [device], "alice", "6.12.0")
    assert gone.severity == "error"
    host.link(f"{folder}/iommu_group", "/sys/kernel/iommu_groups/20")
    host.write("/dev/vfio/20")
    assert {one.severity for one in vfio.vfio(host.tree, [device], "alice", "6.12.0")} == {"ok"}
