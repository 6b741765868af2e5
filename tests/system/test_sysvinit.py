"""A host with sysvinit where nothing mounts cgroups but elogind, which mounts v2: one line of fstab gives it cpusets.

It is the one of qemu-launcher-helper(8). A boot has to show that it does: what else is mounted by then, and what comes
after it, is the host's affair.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lab import Vm
from system.legacy import FSTAB
from system.small_vm import give_to_alice

WHY = "it is about hosts without systemd whose kernel has cpusets of v1"
pytestmark = [pytest.mark.outside, pytest.mark.hosts(more=("openrc-v1",), why=WHY)]

WITHOUT = "sed -i 's/^rc_cgroup_mode=.*/rc_cgroup_mode=none/' /etc/rc.conf"
MOUNTED = "findmnt --noheadings --output=TARGET --types=cgroup"
OF_INIT = "sed -n 's/^Cpus_allowed_list://p' /proc/1/status"


def test_one_line_of_fstab(installed_lab: Vm, tmp_path: Path) -> None:
    vm = installed_lab
    vm.run(WITHOUT)
    vm.run(f"echo '{FSTAB}' >>/etc/fstab")
    vm.reboot()
    assert vm.run(MOUNTED).stdout.split() == ["/run/cpuset"]

    give_to_alice(vm, tmp_path, "  rlimit_memlock: 100M\n")
    checked = vm.run("qemu-launcher check ./vm.yml", user="alice").stdout
    assert "vm would start" in checked, checked
    vm.run("qemu-launcher start ./vm.yml", user="alice", timeout=600)
    threads = vm.run("ps -L -o cls=,rtprio= -p $(pgrep qemu-system)").stdout.splitlines()
    assert [line.split() for line in threads if "FF" in line] == [["FF", "1"]] * 2, threads
    assert vm.run("cat /run/cpuset/qemu-launcher/[45]/tasks | wc -l").stdout == "2\n"
    assert vm.run(OF_INIT).stdout.split() == ["0-3,6-7"]
    assert '"shield": "cpuset-v1"' in vm.run("qemu-launcher status --json vm", user="alice").stdout

    vm.run("qemu-launcher kill vm", user="alice")
    vm.run("while [ -e /run/cpuset/qemu-launcher ]; do sleep 0.5; done")  # the launcher tells the helper, or it looks
    assert vm.run(OF_INIT).stdout.split() == ["0-7"]

    # The same without it, by the helper. cgroup v2 is where a host without v1 has it.
    vm.run("umount /run/cpuset && rmdir /run/cpuset")
    vm.run("mkdir -p /etc/qemu-launcher && echo 'cpuset_mount = \"/run/cpuset\"' >/etc/qemu-launcher/helper.toml")
    vm.run("while pgrep -f '[q]emu-launcher-helper' >/dev/null; do sleep 0.5; done")
    assert "cpuset-v1" in vm.run("qemu-launcher limits", user="alice").stdout
    assert vm.run(MOUNTED).stdout.split() == ["/run/cpuset"]
