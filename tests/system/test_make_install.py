"""`make install` and `make uninstall` for real: the bus, polkit and systemd serve what came, and nothing of it stays.

From the archive that other distributions build from, on a host that never had the package. The lab has no make and
cannot make manual pages: both are this machine's. What is installed where is tests/package/test_install.py's to say.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from lab import Vm
from lab.recipe import PROJECT
from package.building import need, run

pytestmark = [
    pytest.mark.outside,
    pytest.mark.hosts("trixie", why="this machine's make may be too new for Debian 12, and the rest is the same there"),
]

# But for what comes before the last change of /etc/group and its like.
FILES = "find /usr /etc -xdev ! -type d ! -name '*-'"
HELPER = "pgrep -f '^/usr/bin/python3 -IS /usr/local/libexec/qemu-launcher-helper --serve$'"
NAME, PATH = "org.qemulauncher.Helper1", "/org/qemulauncher/Helper1"
GET_LIMITS = f"dbus-send --system --print-reply --dest={NAME} {PATH} {NAME}.GetLimits"
MEMBER = "usermod -aG qemu-launcher alice"


def archive() -> Path:
    """The sources, as they are published; build/man is up to date with them."""
    need("go-md2man")
    run("make", "--no-print-directory", "dist", "man")
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    return PROJECT / f"build/qemu-launcher-{version}.tar.gz"


def files(vm: Vm) -> set[str]:
    """All that there are where something could be installed."""
    return set(vm.run(FILES).stdout.splitlines())


def test_it_comes_serves_and_goes(own_lab: Vm) -> None:
    vm, sources = own_lab, archive()
    make = f"/root/make --no-print-directory -C /root/{sources.name.removesuffix('.tar.gz')}"
    vm.put(str(shutil.which("make")), "/root/make")
    vm.put(sources, "/root/sources")
    vm.run("tar -xzf /root/sources -C /root")
    vm.put(PROJECT / "build/man", f"/root/{sources.name.removesuffix('.tar.gz')}/build/man")
    before = files(vm)

    assert f"Installed. Who may use it: sudo {MEMBER.replace('alice', 'NAME')}" in vm.run(f"{make} install").stdout
    came = files(vm) - before
    assert {"/usr/local/bin/qemu-launcher", "/usr/lib/systemd/system/qemu-launcher-helper.service"} <= came
    vm.run(MEMBER)
    limits = json.loads(vm.run("qemu-launcher limits --json", user="alice").stdout)
    assert limits["limits_source"] == "the built-in defaults"
    assert vm.run(HELPER).stdout, "it is the one that was installed"
    refused = vm.run(GET_LIMITS, user="bob", check=False)
    assert "org.freedesktop.DBus.Error.AccessDenied" in refused.stderr

    vm.run(f"{make} uninstall")
    assert files(vm) == before
    assert vm.run(HELPER, check=False).status == 1, "it has ended"
    gone = vm.run(GET_LIMITS, check=False)
    assert "org.freedesktop.DBus.Error.ServiceUnknown" in gone.stderr, "the bus would not start it"
    unit = vm.run("systemctl show --property=LoadState --value qemu-launcher-helper.service")
    assert unit.stdout.strip() == "not-found"
