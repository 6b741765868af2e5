"""The package on a running host: who is let in right after the installation, an upgrade and a purge under a running VM.

These have a lab to themselves, because they take the package away.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from demo.guest import FAREWELL, GREETING, write
from demo.terminal import observe, terminal
from lab import Vm
from lab.outside import package

pytestmark = pytest.mark.outside

PINNED, SECOND = [4, 5], [2, 3]
NEWER = "+newer"
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


def newer(folder: Path) -> Path:
    """The same package, as a later version."""
    tree, control = folder / "tree", folder / "tree/DEBIAN/control"
    subprocess.run(["dpkg-deb", "--raw-extract", package(), tree], check=True)
    control.write_text(re.sub(r"^Version: .*", rf"\g<0>{NEWER}", control.read_text(), flags=re.MULTILINE))
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, folder / "newer.deb"], check=True)
    return folder / "newer.deb"


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
    second = re.sub(
        r".*(drive|serial):.*\n", "", DEFINITION.replace("guest", "second").replace(f"{PINNED}", f"{SECOND}")
    )
    (tmp_path / "second.yml").write_text(second)
    for name in ("guest.img", "guest.yml", "second.yml"):
        vm.put(tmp_path / name, f"/home/alice/{name}")
    vm.run("chown -R alice: /home/alice")
    with terminal(vm, "alice", "qemu-launcher ./guest.yml") as screen:
        assert GREETING.strip().decode() in list(screen.lines_until(GREETING.strip()))[-1]
        assert shielded(observe(vm))

        # At once: it leaves soon after its last call.
        asked = vm.run(f"{GET_LIMITS} >/dev/null && systemctl show -P MainPID qemu-launcher-helper", user="alice")
        helper = int(asked.stdout)
        assert helper != 0
        vm.run("setsid qemu-launcher ./second.yml >second.log 2>&1 </dev/null & disown", user="alice")
        vm.run("until grep -q 'second: running' /home/alice/second.log; do sleep 0.5; done", timeout=600)
        assert observe(vm)["isolated"] == SECOND + PINNED
        vm.put(newer(tmp_path), "/root/newer.deb")
        vm.run("apt-get install -y /root/newer.deb", timeout=1200)
        assert vm.run("dpkg-query --show --showformat '${Version}' qemu-launcher").stdout.endswith(NEWER)
        upgraded = observe(vm)
        assert upgraded["helper_pid"] != helper
        assert upgraded["isolated"] == SECOND + PINNED

        # The new helper knows what the old one has granted.
        vm.run("qemu-launcher release second", user="alice")
        assert observe(vm)["isolated"] == PINNED
        vm.run("qemu-launcher kill second", user="alice")
        vm.run("until [ $(pgrep -c qemu-system) = 1 ]; do sleep 0.5; done", timeout=600)
        assert shielded(observe(vm))
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
