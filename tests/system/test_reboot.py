"""The host's own shutdown powers guests down before their scopes end, and its next boot starts those that are to be.

Watched from outside, since the host does not survive it. The guest is one disk sector (tests/demo/guest.py) that writes
a farewell when its power button is pressed; QEMU that is killed, or told to quit, leaves none. A service that stops
after all users' sessions prints to the console what was written until then.

alice has two VMs: one that she has started in a login, and one that her user manager starts as a service.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from demo.guest import FAREWELL, GREETING, write
from demo.terminal import observe
from lab import Vm

pytestmark = pytest.mark.outside

DEFINITION = """\
launcher:
  binary: qemu-system-x86_64
  vcpu_pinning: {cpus}
  scheduler: fifo
  priority: 1
  shutdown_timeout: 600
qemu:
  - machine: q35
  - accel: tcg,thread=multi,tb-size=8
  - smp: [2, cores: 1, threads: 2]
  - m: 64M
  - drive: [file: /home/alice/guest.img, format: raw, if: virtio, snapshot: on]
  - nodefaults
  - display: none
  - serial: file:/home/alice/{name}.serial
"""
# Stopping is starting backwards: what is started before user.slice is stopped after it.
LAST_WORDS = """\
[Unit]
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target user.slice
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
WorkingDirectory=/home/alice
ExecStop=sh -c 'for file in *.serial by-hand.log; do sed "s/^/last words, $file: /" $file; done >/dev/console'
ExecStop=sh -c 'ls /sys/fs/cgroup/user.slice | sed "s/^/last words, left: /" >/dev/console'
"""
# The host is slow, and gives all that a user has together two minutes; on a real one this is what an administrator
# would write for a guest that takes longer, see qemu-launcher(1).
PATIENT = "[Service]\nTimeoutStopSec=15min\n"
BY_HAND = "setsid qemu-launcher ./by-hand.yml >by-hand.log 2>&1 </dev/null & disown"
AT_BOOT = "systemctl --user enable --now qemu-launcher@at-boot.service && loginctl enable-linger"
GREETED, PARTED = GREETING.decode().strip(), FAREWELL.decode().strip()
PATIENCE = 600.0  # seconds


def wait_for(vm: Vm, text: str, file: str) -> None:
    """Until the file has the text."""
    vm.run(f"until grep -qs '{text}' {file}; do sleep 0.5; done", timeout=PATIENCE)


def until_isolated(vm: Vm, cpus: list[int]) -> None:
    """Until these are the CPUs that VMs have for themselves."""
    deadline = time.monotonic() + PATIENCE
    while (isolated := observe(vm)["isolated"]) != cpus:
        assert time.monotonic() < deadline, f"CPUs {isolated} are isolated"
        time.sleep(1)


def test_shutdown_powers_guests_down_and_boot_starts_them(installed_lab: Vm, tmp_path: Path) -> None:
    vm = installed_lab
    vm.run("usermod -aG qemu-launcher alice")
    write(tmp_path / "guest.img")
    vm.put(tmp_path / "guest.img", "/home/alice/guest.img")
    for name, cpus, place in (("by-hand", [4, 5], ""), ("at-boot", [2, 3], ".config/qemu-launcher/")):
        (tmp_path / f"{name}.yml").write_text(DEFINITION.format(cpus=cpus, name=name))
        vm.put(tmp_path / f"{name}.yml", f"/home/alice/{place}{name}.yml")
    units = {"system/last-words.service": LAST_WORDS, "system/user@.service.d/patient.conf": PATIENT}
    for name, text in units.items():
        (tmp_path / "unit").write_text(text)
        vm.put(tmp_path / "unit", "/root/unit")
        vm.run(f"install -D -m 644 /root/unit /run/systemd/{name}")
    vm.run("chown -R alice: /home/alice && systemctl daemon-reload && systemctl start last-words.service")
    vm.run(BY_HAND, user="alice")
    vm.run(AT_BOOT, user="alice")
    for name in ("by-hand", "at-boot"):
        wait_for(vm, GREETED, f"/home/alice/{name}.serial")
    assert observe(vm)["isolated"] == [2, 3, 4, 5]
    vm.reboot()

    console = vm.console_tail(20_000)  # Debian 12 says a lot while it boots
    said = "\n".join(line for line in console.splitlines() if "last words, " in line)
    for name in ("by-hand", "at-boot"):
        assert f"last words, {name}.serial: {GREETED}" in said, console
        assert f"last words, {name}.serial: {PARTED}" in said, said
    # SIGHUP and SIGTERM come at once, in any order; only SIGTERM sets the limit.
    assert "by-hand: asked the guest to power down" in said, said
    assert "cutting the power" not in said

    # Now it runs again, shielded and real-time, and nobody has logged in.
    until_isolated(vm, [2, 3])
    serial = "/home/alice/at-boot.serial"
    wait_for(vm, GREETED, serial)
    assert PARTED not in vm.run(f"cat {serial}").stdout
    sessions = [line.split() for line in vm.run("loginctl list-sessions --no-legend").stdout.splitlines()]
    alices = [session for session in sessions if session[2] == "alice" and "manager" not in session]
    assert alices == [], "somebody has logged in"
    threads = vm.run("ps -L -o psr=,cls=,rtprio= -p $(pgrep -u alice qemu-system)").stdout.splitlines()
    assert sorted(line.split() for line in threads if "FF" in line) == [["2", "FF", "1"], ["3", "FF", "1"]], threads
    assert vm.run("cat /proc/1/status | grep Cpus_allowed_list").stdout.split()[1] == "0-1,4-7"

    # Its user ends it as any other service, and the guest powers down.
    told = vm.run("systemctl --user show --property=StatusText --value qemu-launcher@at-boot", user="alice").stdout
    assert told == "running, 2 vCPUs on 2-3 (shielded), fifo 1\n"
    vm.run("systemctl --user stop qemu-launcher@at-boot", user="alice", timeout=PATIENCE)
    assert PARTED in vm.run(f"cat {serial}").stdout
    result = vm.run("systemctl --user show --property=Result --value qemu-launcher@at-boot", user="alice").stdout
    assert result == "success\n"
    until_isolated(vm, [])
