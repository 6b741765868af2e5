"""The package on a running host: who is let in right after the installation, an upgrade and a purge under a running VM.

These have a lab to themselves, because they take the package away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demo.guest import FAREWELL, GREETING, write
from demo.terminal import observe, terminal
from lab import Vm

pytestmark = pytest.mark.outside

PINNED = [4, 5]
DEFINITION = f"""\
launcher:
  binary: qemu-system-x86_64
  vcpu_pinning: {PINNED}
qemu:
  - name: [guest, debug-threads: on]
  - smp: [2, cores: 1, threads: 2]
  - m: 64M
  - drive: [file: guest.img, format: raw, if: virtio]
  - nodefaults
  - display: none
  - serial: stdio
"""
PARTITIONS = "/sys/fs/cgroup/cpuset.cpus.isolated"
GET_LIMITS = "busctl call org.qemulauncher.Helper1 /org/qemulauncher/Helper1 org.qemulauncher.Helper1 GetLimits"


def vcpu_cpus(facts: dict[str, Any]) -> list[list[int]]:
    """The CPUs of each vCPU thread of the one machine."""
    (machine,) = facts["machines"]
    return [thread["cpus"] for thread in machine["threads"] if thread["name"].startswith("CPU ")]


def shielded(facts: dict[str, Any]) -> bool:
    """Whether the machine has its CPUs for itself."""
    apart = not set(facts["host_cpus"]) & set(PINNED)
    return facts["isolated"] == PINNED and apart and vcpu_cpus(facts) == [[cpu] for cpu in PINNED]


def test_the_package_comes_and_goes_under_a_running_vm(installed_lab: Vm, tmp_path: Path) -> None:
    """Installed: a member is let in at once. Upgraded and purged: the VM keeps its shield and ends in good order.

    Without partitions nobody would end the shield after the helper is gone: there, the purge does.
    """
    vm = installed_lab
    files = vm.run('for f in $(dpkg -L qemu-launcher); do [ -d "$f" ] || echo "$f"; done').stdout.split()
    assert len(files) > 30
    vm.run("usermod -aG qemu-launcher alice")
    # The bus read the policy once when it was unpacked, before there was a group. bob is the control: he is refused.
    vm.run(GET_LIMITS, user="alice")
    refused = vm.run(GET_LIMITS, user="bob", check=False)
    assert refused.status != 0
    assert "denied" in refused.stderr

    write(tmp_path / "guest.img")
    (tmp_path / "guest.yml").write_text(DEFINITION)
    vm.put(tmp_path / "guest.img", "/home/alice/guest.img")
    vm.put(tmp_path / "guest.yml", "/home/alice/guest.yml")
    vm.run("chown -R alice: /home/alice")
    with terminal(vm, "alice", "qemu-launcher ./guest.yml") as screen:
        assert GREETING.strip().decode() in list(screen.lines_until(GREETING.strip()))[-1]
        assert shielded(observe(vm))

        vm.run(GET_LIMITS, user="alice")
        helper = observe(vm)["helper_pid"]
        assert helper != 0
        vm.run("apt-get install -y --reinstall /root/qemu-launcher*.deb", timeout=1200)
        upgraded = observe(vm)
        assert upgraded["helper_pid"] != helper
        assert shielded(upgraded)
        assert "running" in vm.run("qemu-launcher status guest", user="alice").stdout

        vm.run("mkdir -p /etc/qemu-launcher && touch /etc/qemu-launcher/helper.toml")
        vm.run("apt-get purge -y qemu-launcher", timeout=1200)
        facts = observe(vm)
        if vm.run(f"test -e {PARTITIONS}", check=False).status == 0:
            assert shielded(facts)
        else:
            assert facts["isolated"] == []
            assert facts["host_cpus"] == facts["online"]
            assert vcpu_cpus(facts) == [facts["online"]] * 2
        left = vm.run(["ls", "-d", "/etc/qemu-launcher", "/run/qemu-launcher", *files], check=False).stdout
        assert left == ""
        assert vm.run("getent group qemu-launcher", check=False).stdout == ""

        # The launcher's own files are gone, and it still powers its guest down.
        vm.run("pkill -INT -u alice -x qemu-launcher")
        assert FAREWELL.strip().decode() in list(screen.lines_until(FAREWELL.strip()))[-1]
        list(screen.lines_until(b""))
        assert screen.process.wait() == 0
    after = observe(vm)
    assert after["machines"] == []
    assert after["isolated"] == []
    assert after["init_cpus"] == after["online"]
