"""The host's own shutdown: `systemctl poweroff` powers the guest down before its scope ends.

Watched from outside, since the host does not survive it. The guest is one disk sector (tests/demo/guest.py) that writes
a farewell when its power button is pressed; QEMU that is killed, or told to quit, leaves none. A service that stops
after all users' sessions prints to the console what was written until then.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.guest import FAREWELL, GREETING, write
from lab import Vm

pytestmark = pytest.mark.outside

DEFINITION = """\
launcher:
  binary: qemu-system-x86_64
  vcpu_pinning: [4, 5]
  scheduler: fifo
  priority: 1
  shutdown_timeout: 600
qemu:
  - machine: q35
  - accel: tcg,thread=multi,tb-size=8
  - smp: [2, cores: 1, threads: 2]
  - m: 64M
  - drive: [file: guest.img, format: raw, if: virtio]
  - nodefaults
  - display: none
  - serial: file:serial.log
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
ExecStop=sh -c 'for file in serial guest; do sed "s/^/last words, $file: /" /home/alice/$file.log; done >/dev/console'
ExecStop=sh -c 'ls /sys/fs/cgroup/user.slice | sed "s/^/last words, left: /" >/dev/console'
"""
START = "setsid qemu-launcher ./guest.yml >guest.log 2>&1 </dev/null & disown"
WAIT = f"until grep -q '{GREETING.decode().strip()}' serial.log; do sleep 0.5; done"
ISOLATED = "cat /sys/fs/cgroup/cpuset.cpus.isolated"


def test_poweroff_powers_the_guest_down_first(installed_lab: Vm, tmp_path: Path) -> None:
    vm = installed_lab
    vm.run("usermod -aG qemu-launcher alice")
    write(tmp_path / "guest.img")
    (tmp_path / "guest.yml").write_text(DEFINITION)
    (tmp_path / "last-words.service").write_text(LAST_WORDS)
    for name in ("guest.img", "guest.yml"):
        vm.put(tmp_path / name, f"/home/alice/{name}")
    vm.put(tmp_path / "last-words.service", "/run/systemd/system/last-words.service")
    vm.run("chown -R alice: /home/alice && systemctl daemon-reload && systemctl start last-words.service")
    vm.run(START, user="alice")
    vm.run(WAIT, user="alice")
    assert vm.run(ISOLATED).stdout == "4-5\n"
    vm.power_off(timeout=900)
    said = [line for line in vm.console_tail(400).splitlines() if "last words, " in line]
    console = "\n".join(said)
    assert f"last words, serial: {GREETING.decode().strip()}" in console, vm.console_tail()
    assert f"last words, serial: {FAREWELL.decode().strip()}" in console, console
    assert "guest: asked the guest to power down within 600 s" in console, console
    assert "cutting the power" not in console
