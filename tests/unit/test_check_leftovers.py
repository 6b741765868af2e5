"""What an earlier attempt has left on the host: isolcpus=, AllowedCPUs= and libvirt's hooks."""

from pathlib import Path

import pytest

from qemu_launcher.check import leftovers
from qemu_launcher.check.finding import Finding
from unit.other_host import OtherHost, the_only


@pytest.fixture
def host(tmp_path: Path) -> OtherHost:
    """8 cores of two threads: CPU n and n + 8 are one."""
    host = OtherHost(tmp_path)
    host.cpus("0-15", siblings=8)
    return host


PINNED = frozenset({2, 3, 10, 11})


def left(host: OtherHost, mechanism: str | None = None) -> list[Finding]:
    return list(leftovers.settings(host.tree, PINNED, mechanism))


def test_a_clean_host(host: OtherHost) -> None:
    host.write("/proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/sda1 quiet isolcpus= nohz=on")
    host.write("/etc/systemd/system/system.slice.d/memory.conf", "[Slice]\nMemoryMax=8G\n# AllowedCPUs=0\n")
    host.write("/etc/libvirt/hooks/qemu", "#!/bin/sh\nlogger started\n")
    assert left(host) == []


@pytest.mark.parametrize("argument", ["isolcpus=2-4,10-12", "isolcpus=managed_irq,domain,2-4,10-12", "isolcpus=4,12"])
def test_isolcpus(host: OtherHost, argument: str) -> None:
    host.write("/proc/cmdline", f"quiet {argument}")
    severity, text, fix = the_only(left(host))
    assert severity == "warning"
    assert text == (
        f"the kernel was started with {argument}: nothing of the host runs on CPUs 4,12 by itself, VM or not"
    )
    assert fix.startswith("take it off the kernel command line")


def test_isolcpus_of_just_these(host: OtherHost) -> None:
    host.write("/proc/cmdline", "isolcpus=2,3")
    assert the_only(left(host))[0] == "note"


def test_nohz_full(host: OtherHost) -> None:
    host.write("/proc/cmdline", "nohz_full=2,3,10,11")
    assert left(host) == []
    host.write("/proc/cmdline", "nohz_full=2,3")
    assert the_only(left(host))[:2] == ("note", "nohz_full=2,3 leaves out CPUs 10-11, where the timer ticks on")


@pytest.mark.parametrize(
    "folder",
    ["/etc/systemd/system", "/etc/systemd/system.control", "/run/systemd/system", "/run/systemd/system.control"],
)
@pytest.mark.parametrize("unit", ["init.scope", "system.slice", "user.slice"])
def test_allowed_cpus(host: OtherHost, folder: str, unit: str) -> None:
    path = f"{folder}/{unit}.d/50-AllowedCPUs.conf"
    host.write(path, "[Slice]\nAllowedCPUs=0 1\n")
    severity, text, fix = the_only(left(host))
    assert severity == "warning"
    assert text == f"{path} keeps {unit} on CPUs 0 1 (AllowedCPUs=), whether a VM runs or not"
    assert fix.startswith(f"sudo rm {path}; ")
    assert fix.endswith(f"sudo systemctl set-property --runtime {unit} AllowedCPUs=0-15")


def test_allowed_cpus_that_were_reset(host: OtherHost) -> None:
    host.write("/etc/systemd/system/system.slice.d/a.conf", "[Slice]\nAllowedCPUs=0\nAllowedCPUs=\n")
    assert left(host) == []


@pytest.mark.parametrize("value", ["0-15", "0-7 8-15", "0 1,2-15"])
def test_allowed_cpus_that_are_all(host: OtherHost, value: str) -> None:
    """So that following the fix of a mask that stays is the end of it."""
    host.write("/run/systemd/system.control/system.slice.d/50-AllowedCPUs.conf", f"[Slice]\nAllowedCPUs={value}\n")
    assert left(host) == []


def test_a_mask_that_stays(host: OtherHost) -> None:
    """What an empty AllowedCPUs= leaves behind, and a removed drop-in."""
    host.write("/sys/fs/cgroup/user.slice/cpuset.cpus", "0-15\n")
    host.write("/sys/fs/cgroup/init.scope/cpuset.cpus", "\n")
    assert left(host) == []
    host.write("/sys/fs/cgroup/system.slice/cpuset.cpus", "0-1\n")
    severity, text, fix = the_only(left(host))
    assert severity == "warning"
    assert text == (
        "system.slice is kept on CPUs 0-1 (/sys/fs/cgroup/system.slice/cpuset.cpus), "
        "though no AllowedCPUs= says so any more"
    )
    assert fix.endswith("sudo systemctl set-property --runtime system.slice AllowedCPUs=0-15")
    assert left(host, "pool") == [], "what the helper has set itself"
    host.write("/etc/systemd/system/system.slice.d/cpus.conf", "[Slice]\nAllowedCPUs=0-1\n")
    assert [one.text.partition(" ")[0] for one in left(host)] == ["/etc/systemd/system/system.slice.d/cpus.conf"]


@pytest.mark.parametrize("path", ["/etc/libvirt/hooks/qemu", "/etc/libvirt/hooks/qemu.d/win10/prepare/begin/cpus.sh"])
def test_libvirt_hooks(host: OtherHost, path: str) -> None:
    host.write(path, "systemctl set-property --runtime -- system.slice AllowedCPUs=0,8\ncset shield --cpu 1-7\n")
    severity, text, _ = the_only(left(host))
    assert severity == "warning"
    assert text == f"the libvirt hook {path} moves the host's tasks between CPUs too (AllowedCPUs, cset)"


def test_hooks_in_a_circle(host: OtherHost) -> None:
    host.folder("/etc/libvirt/hooks/qemu.d")
    host.link("/etc/libvirt/hooks/qemu.d/again", "/etc/libvirt/hooks/qemu.d")
    assert left(host) == []
