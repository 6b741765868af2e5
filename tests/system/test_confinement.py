"""How the helper is confined, read from /proc while it runs, and what systemd thinks of its unit."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from system import host
from system.claims import Claimant
from system.fixtures import stop_helper
from system.people import User
from system.vms import HELPER_UNIT

# capabilities(7): linux/capability.h's numbers.
SYS_ADMIN, SYS_NICE, SYS_RESOURCE = 21, 23, 24
THE_THREE = 1 << SYS_ADMIN | 1 << SYS_NICE | 1 << SYS_RESOURCE
MOST_EXPOSURE = 1.6
INTERFACE = "org.qemulauncher.Helper1"


@pytest.fixture
def helper(alice: User) -> int:
    """PID of a helper that has just answered alice, and is at rest."""
    stop_helper()
    alice.login.run(f"busctl call {INTERFACE} /org/qemulauncher/Helper1 {INTERFACE} GetLimits", check=True)
    pid = host.helper()
    assert pid is not None
    return pid


def test_it_has_three_capabilities_and_none_effective_at_rest(helper: int) -> None:
    status = host.status(helper)
    assert int(status["CapEff"], 16) == 0
    assert int(status["CapPrm"], 16) == THE_THREE
    assert int(status["CapBnd"], 16) & ~THE_THREE == 0
    assert int(status["CapInh"], 16) == 0
    assert int(status["CapAmb"], 16) == 0


def test_nothing_can_give_it_more(helper: int) -> None:
    status = host.status(helper)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2", "a system call filter is in force"
    assert int(status["Threads"]) == 1


def test_it_is_not_dumpable(helper: int) -> None:
    """Nobody but a holder of CAP_SYS_PTRACE may look inside, ptrace(2): not even root with the same capabilities."""
    three = "-all,+sys_admin,+sys_nice,+sys_resource"

    def look_into(pid: int) -> subprocess.CompletedProcess[str]:
        command = ["setpriv", f"--bounding-set={three}", "readlink", f"/proc/{pid}/exe"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = look_into(helper)
    assert refused.returncode != 0, refused.stdout
    assert host.is_alive(helper), "else there was nothing to look into"
    with subprocess.Popen(["setpriv", f"--bounding-set={three}", "sleep", "600"]) as control:
        try:
            host.wait_for("the control sleeps", lambda: host.status(control.pid)["Name"] == "sleep")
            assert look_into(control.pid).returncode == 0, "this would be possible with a dumpable process"
        finally:
            control.kill()


def test_its_mounts_are_its_own_and_read_only(helper: int) -> None:
    """ProtectSystem=strict: what it can write to is its folder of records and the cgroup tree."""
    writable = set()
    for line in (host.PROC / f"{helper}/mountinfo").read_text().splitlines():
        words = line.split()
        if "rw" in words[5].split(","):
            writable.add(words[4])
    assert "/" not in writable
    assert "/etc" not in writable
    assert "/usr" not in writable
    assert "/run/qemu-launcher" in writable


def test_it_listens_nowhere_and_knows_one_network_namespace_of_its_own(helper: int) -> None:
    own = (host.PROC / f"{helper}/ns/net").readlink()
    assert own != (host.PROC / "1/ns/net").readlink()
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        header, *sockets = (host.PROC / f"{helper}/net/{protocol}").read_text().splitlines()
        assert "local_address" in header
        assert sockets == [], protocol


def test_it_runs_isolated(helper: int) -> None:
    """Isolated, without site: no folder of a user's or of root's is on its import path."""
    command = (host.PROC / f"{helper}/cmdline").read_bytes().decode().split("\0")
    assert command[:3] == ["/usr/bin/python3", "-IS", "/usr/libexec/qemu-launcher-helper"]


@pytest.mark.parametrize("module", ["dbus_next", "prctl", "asyncio"])
def test_a_module_planted_in_usr_local_is_not_imported(alice: User, module: str) -> None:
    """Debian has /usr/local's packages come before its own, so `sudo pip install` could replace what root runs."""
    place = Path(f"/usr/local/lib/python{sys.version_info.major}.{sys.version_info.minor}/dist-packages")
    had = place.exists()
    place.mkdir(parents=True, exist_ok=True)
    planted = place / f"{module}.py"
    planted.write_text("raise SystemExit(99)\n")
    try:
        if module != "asyncio":  # what the standard library has comes first anyway
            control = subprocess.run(["/usr/bin/python3", "-I", "-c", f"import {module}"], check=False)
            assert control.returncode == 99, "Python itself would take the planted one"
        stop_helper()
        alice.login.run(f"busctl call {INTERFACE} /org/qemulauncher/Helper1 {INTERFACE} GetLimits", check=True)
    finally:
        planted.unlink()
        if not had:
            place.rmdir()


def test_its_unit_is_judged_by_systemd(record_property: Callable[[str, object], None]) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", HELPER_UNIT], check=True, capture_output=True, text=True
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout
    exposure = float(found[1])
    record_property("exposure", exposure)
    sys.stdout.write(f"systemd-analyze security {HELPER_UNIT}: {exposure}\n")
    assert exposure <= MOST_EXPOSURE, done.stdout


def test_calls_do_not_make_it_grow(alice: User) -> None:
    """Same process, same number of descriptors, after forty calls."""
    with Claimant(alice) as program:
        child = program.spawn(1)
        assert program.pin(child, "vm", 4).error == "ok"
        pid = host.helper()
        assert pid is not None
        before = host.descriptors(pid)
        for _ in range(20):
            assert program.call("ListVms", "b", False).error == "ok"
            assert program.pin(child, "vm", 4).error == "ok"
        assert host.helper() == pid
        host.wait_for(f"no more than the {before} descriptors from before", lambda: host.descriptors(pid, 1) <= before)
        program.end(child.pid)
