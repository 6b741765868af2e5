"""/dev/kvm and input devices on hosts that have them, have them closed, or lack them."""

import grp
from pathlib import Path
from types import SimpleNamespace

import pytest

from qemu_launcher.check import devices
from qemu_launcher.check.devices import KVM
from qemu_launcher.check.tree import Tree
from unit.other_host import AMD, INTEL, OtherHost, the_only, told

EVENT = "/dev/input/event7"
BY_ID = "/dev/input/by-id/usb-Logitech-event-mouse"


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """A host with KVM and a mouse."""
    host = OtherHost(tmp_path)
    host.write("/proc/cpuinfo", INTEL)
    host.write(KVM)
    host.folder("/sys/class/misc/kvm")
    host.folder("/sys/class/misc/fuse")
    host.write(EVENT)
    host.link(BY_ID, EVENT)
    host.write("/sys/class/input/event7/device/name", "Logitech G502\n")
    return host


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Group by last part of the path: as if the files belonged to it, readable and writable for it."""
    by_path: dict[str, str] = {}
    monkeypatch.setattr(Tree, "group_of", lambda _tree, path: by_path.get(path.rpartition("/")[2]))
    return by_path


def kvm(host: OtherHost, wanted: str | None = "needed") -> tuple[str, str, str]:
    return the_only(list(devices.kvm(host.tree, wanted, "alice")))


def test_kvm_that_is_ours(host: OtherHost) -> None:
    assert kvm(host) == ("ok", "/dev/kvm is yours to use", "")


def test_nobody_is_told_of_a_kvm_he_does_not_want(host: OtherHost) -> None:
    (host.root / KVM[1:]).unlink()
    assert list(devices.kvm(host.tree, None, "alice")) == []


def test_kvm_of_a_group(host: OtherHost, groups: dict[str, str]) -> None:
    host.forbid(KVM)
    groups["kvm"] = "kvm"
    severity, text, fix = kvm(host)
    assert (severity, text) == ("error", "/dev/kvm is not yours to read and write")
    assert fix == "sudo usermod -aG kvm alice, then log out and in"


def test_kvm_of_nobody(host: OtherHost) -> None:
    host.forbid(KVM)
    (host.root / KVM[1:]).chmod(0o600)
    assert kvm(host)[2].startswith("sudo setfacl -m u:alice:rw /dev/kvm")


@pytest.mark.parametrize(
    ("cpu", "fix"),
    [
        (INTEL, "sudo modprobe kvm_intel; "),
        (AMD, "sudo modprobe kvm_amd; "),
        ("flags : fpu sse\n", "the CPU shows neither vmx nor svm"),
        ("", "load the kernel's KVM module"),
    ],
)
def test_no_kvm(host: OtherHost, cpu: str, fix: str) -> None:
    host.write("/proc/cpuinfo", cpu)
    (host.root / KVM[1:]).unlink()
    severity, text, hint = kvm(host)
    assert (severity, text) == ("error", "there is no /dev/kvm")
    assert hint.startswith(fix)


def test_a_node_without_a_driver(host: OtherHost) -> None:
    """Made at boot by kmod; opening it gives ENODEV."""
    (host.root / "sys/class/misc/kvm").rmdir()
    severity, text, fix = kvm(host)
    assert (severity, text) == ("error", "nothing is behind /dev/kvm")
    assert "modprobe kvm_intel" in fix


def test_a_container_without_sys_shows_no_driver(host: OtherHost) -> None:
    for name in ("kvm", "fuse"):
        (host.root / "sys/class/misc" / name).rmdir()
    assert kvm(host)[0] == "ok"


def test_what_can_fall_back_is_only_warned_of(host: OtherHost) -> None:
    (host.root / KVM[1:]).unlink()
    severity, text, _ = kvm(host, "preferred")
    assert severity == "warning"
    assert "QEMU will fall back to emulation" in text


def test_evdev_that_is_ours(host: OtherHost) -> None:
    found = list(devices.evdev(host.tree, [BY_ID, EVENT], "alice"))
    assert told(found) == [
        f"ok: the input device {BY_ID} ({EVENT}) is yours to use",
        f"ok: the input device {EVENT} is yours to use",
    ]


def test_evdev_that_is_not(host: OtherHost, groups: dict[str, str]) -> None:
    host.forbid(BY_ID)
    groups["event7"] = "input"
    severity, text, fix = the_only(list(devices.evdev(host.tree, [BY_ID], "alice")))
    assert severity == "error"
    assert text == f"the input device {BY_ID} ({EVENT}) is not yours to read and write"
    line, group = fix.splitlines()
    assert """echo 'SUBSYSTEM=="input", ATTRS{name}=="Logitech G502", OWNER="alice"' | sudo tee -a """ in line
    assert line.endswith("sudo udevadm control --reload; sudo udevadm trigger --subsystem-match=input")
    assert (
        group
        == "or all input devices, and so all that is typed here: sudo usermod -aG input alice, then log out and in"
    )


def test_a_name_that_would_break_the_rule(host: OtherHost) -> None:
    host.write("/sys/class/input/event7/device/name", 'it\'s "odd" *\n')
    host.forbid(EVENT)
    fix = the_only(list(devices.evdev(host.tree, [EVENT], "alice")))[2]
    assert 'KERNEL=="event*", OWNER="alice"' in fix
    assert "odd" not in fix


def test_no_evdev(host: OtherHost) -> None:
    severity, text, fix = the_only(list(devices.evdev(host.tree, ["/dev/input/by-id/gone-event-kbd"], "alice")))
    assert (severity, text) == ("error", "there is no input device /dev/input/by-id/gone-event-kbd")
    assert BY_ID in fix


def test_group_of_a_node(host: OtherHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a group whose members may read and write is worth joining."""

    def group_of(gid: int, mode: int) -> str | None:
        monkeypatch.setattr(Tree, "stat", lambda _tree, _path: SimpleNamespace(st_gid=gid, st_mode=mode))
        return host.tree.group_of(KVM)

    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=f"group{gid}"))
    assert group_of(104, 0o660) == "group104"
    assert group_of(104, 0o640) is None
    assert group_of(0, 0o660) is None, "nobody joins root"
