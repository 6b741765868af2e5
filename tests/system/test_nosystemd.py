"""Hosts without systemd: OpenRC, with partitions and with cpusets of v1; logins of elogind's and of nobody's.

The helper makes the group of a VM and takes it away, is started by dbus-daemon alone, confines itself, and stays while
there are VMs; where it was killed, the next call of anybody puts things right.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from system import host, legacy
from system.fixtures import stop_helper
from system.people import Login, User, plain_command
from system.vms import Launch, define, expect_tuned, refused

pytestmark = pytest.mark.hosts("openrc", more=("openrc-v1",), why="it is about hosts without systemd")

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "400M"}
SYSLOG = Path("/dev/log")
ELSEWHERE = Path("/run/cpuset")
# CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE
THREE = 1 << 21 | 1 << 23 | 1 << 24


@pytest.fixture
def syslog() -> Iterator[Callable[[], list[str]]]:
    """What the helper has said so far; this host has no syslogd of its own."""
    SYSLOG.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(SYSLOG))
        listener.setblocking(False)
        stop_helper()  # one that is there has begun without it
        said: list[str] = []

        def read() -> list[str]:
            try:
                while True:
                    said.append(listener.recv(65536).decode())
            except BlockingIOError:
                return said

        yield read
    SYSLOG.unlink()


def helper() -> int:
    """PID of the helper, which is there."""
    pid = host.helper()
    assert pid is not None
    return pid


def start(alice: User, vm: Callable[..., Launch]) -> Launch:
    """alice's VM, with all there is."""
    define(alice, "win11", TUNING, {"m": "128M"}, cpus=2)
    return vm(alice, "win11")


def assert_tuned(launch: Launch) -> None:
    """By /proc and the cgroup tree."""
    expect_tuned(launch)
    assert host.limit(launch.qemu, "Max locked memory") == (400 << 20, 400 << 20)
    assert host.trespassers({4, 5}, launch.vcpu_tids, since=0 if legacy.is_legacy() else host.born(launch.pid)) == []


def assert_nothing_left() -> None:
    """Neither shield, nor record, nor group."""
    assert host.isolated() == set()
    assert host.records() == set()
    assert host.scopes() == set()
    assert host.cpus_of(1) == host.online()


def test_the_whole_of_it(alice: User, vm: Callable[..., Launch], syslog: Callable[[], list[str]]) -> None:
    assert not host.has_systemd()
    launch = start(alice, vm)
    assert_tuned(launch)
    assert host.cgroup(launch.qemu) in (launch.scope, launch.scope / "emulator")
    shown = alice.login.run("qemu-launcher status --json win11").stdout
    assert shown.count(f'"{"cpuset-v1" if legacy.is_legacy() else "isolated"}"') == 2, shown

    # It may be at the launcher's last call still, with one of them raised.
    host.wait_for("the helper is at rest", lambda: int(host.status(helper())["CapEff"], 16) == 0)
    facts = host.status(helper())
    assert [int(facts[f"Cap{which}"], 16) for which in ("Eff", "Inh", "Amb")] == [0, 0, 0]
    assert int(facts["CapPrm"], 16) == int(facts["CapBnd"], 16) == THREE
    assert (facts["NoNewPrivs"], facts["Umask"]) == ("1", "0077")
    assert host.limit(helper(), "Max open files") == (256, 256)
    assert host.limit(helper(), "Max data size") == (128 << 20, 128 << 20)
    assert (host.PROC / f"{helper()}/cwd").readlink() == Path("/")
    environment = (host.PROC / f"{helper()}/environ").read_bytes().split(b"\0")
    assert {word.partition(b"=")[0] for word in environment} <= {b"", b"DBUS_STARTER_ADDRESS", b"DBUS_STARTER_BUS_TYPE"}

    assert launch.quit() == 0
    assert_nothing_left()  # the launcher has told the helper before it ended
    lines = syslog()
    for words in ("granted SetMemlock uid=1000 ", "granted PinThreads uid=1000 ", "granted SetScheduler uid=1000 "):
        assert any(line.startswith(f"<30>qemu-launcher-helper: {words}") for line in lines), lines
    assert any("released VM uid=1000" in line and "'ended'" in line for line in lines), lines


def test_everybody_is_killed(alice: User, vm: Callable[..., Launch]) -> None:
    """The helper is there still, and sees it."""
    launch = start(alice, vm)
    there = helper()
    child = alice.login.spawn("exec sleep infinity", alice.home / "child.log")
    (launch.scope / "cgroup.procs").write_text(str(child))  # as if QEMU had started it
    for pid in (launch.pid, launch.qemu):
        os.kill(pid, signal.SIGKILL)
    host.wait_for("the helper has looked", lambda: not (host.records() or host.scopes() or host.isolated()))
    assert_nothing_left()
    assert helper() == there
    assert not host.is_alive(child), "what a VM leaves behind is ended"
    host.wait_for("it leaves, as there is no VM any more", lambda: host.helper() is None)


def test_the_helper_is_killed_too(alice: User, vm: Callable[..., Launch]) -> None:
    """With it goes nothing. The next call of anybody starts another, which does what is to be done."""
    launch = start(alice, vm)
    os.kill(helper(), signal.SIGKILL)
    host.wait_for("it is gone", lambda: host.helper() is None)
    assert_tuned(launch)
    assert alice.command("limits").status == 0
    assert_tuned(launch)
    os.kill(helper(), signal.SIGKILL)
    for pid in (launch.pid, launch.qemu):
        os.kill(pid, signal.SIGKILL)
    host.wait_for("QEMU is gone", lambda: not host.is_alive(launch.qemu))
    assert host.records() == {"1000-win11"}, "nobody has seen it"
    assert alice.command("limits").status == 0
    # A second look, should QEMU have been on its way out at the first.
    host.wait_for("nothing is left", lambda: not (host.scopes() or host.isolated()))
    assert_nothing_left()


def test_without_a_session(alice: User, vm: Callable[..., Launch]) -> None:
    """As where nothing makes sessions: neither a group of one's own, nor XDG_RUNTIME_DIR, nor anything for polkit."""
    define(alice, "win11", TUNING, {"m": "128M"}, cpus=2)
    with Login(alice.name, plain_command) as login:
        assert host.cgroup(login.shell) == host.units()
        launch = vm(alice, "win11", login=login)
        assert_tuned(launch)
        assert host.cgroup(launch.qemu).relative_to(host.units()).parts[0] == "qemu-launcher-1000-win11.scope"
        shown = login.run("echo ${XDG_RUNTIME_DIR-none}; qemu-launcher status win11").stdout
        assert shown.startswith("none\nwin11"), shown
        assert launch.quit() == 0
        assert_nothing_left()


def test_what_is_started_in_a_services_group(alice: User, vm: Callable[..., Launch]) -> None:
    """Refused, as its limits would hold no more. Beside v1, groups of v2 limit nothing; sshd's logins are in /ssh."""
    group = host.units() / "openrc.test"
    group.mkdir()
    before = host.cgroup(alice.login.shell)
    define(alice, "win11", TUNING, {"m": "128M"}, cpus=2)
    try:
        (group / "cgroup.procs").write_text(str(alice.login.shell))
        told = alice.command("check", "win11").stdout
        if legacy.is_legacy():
            assert "which is no session of yours" not in told
            launch = vm(alice, "win11")
            assert_tuned(launch)
            assert launch.quit() == 0
        else:
            assert "you are in /openrc.test, which is no session of yours" in told
            status, said = refused(alice, "win11")
            assert status != 0
            assert "is in no session or service of yours" in said
    finally:
        (before / "cgroup.procs").write_text(str(alice.login.shell))
        host.wait_for("its group is empty", lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def test_check_has_nothing_to_say_against_it(alice: User) -> None:
    done = alice.command("check")
    assert done.status == 0, done
    assert "qemu-launcher-helper is installed, for the bus and polkit\n" in done.stdout
    assert "no systemd" in done.stdout
    assert "error" not in done.stdout
    assert subprocess.run(["pgrep", "-x", "systemd"], check=False, stdout=subprocess.DEVNULL).returncode == 1


def helper_has_left() -> None:
    """The next call starts another."""
    host.wait_for("the last helper has left", lambda: host.helper() is None)


@pytest.fixture
def no_cpusets() -> Iterator[None]:
    """Nothing has mounted them; nor is anything left of where the test has."""
    helper_has_left()
    subprocess.run(["umount", str(legacy.CPUSETS)], check=True)
    yield
    helper_has_left()
    if ELSEWHERE.is_mount():
        subprocess.run(["umount", str(ELSEWHERE)], check=True)
    if ELSEWHERE.exists():
        ELSEWHERE.rmdir()
    name = legacy.CPUSETS.name
    subprocess.run(["mount", "-t", "cgroup", "-o", name, name, str(legacy.CPUSETS)], check=True)


def assert_shielded_elsewhere(launch: Launch) -> None:
    """In the cpusets that the test has had mounted."""
    assert [host.cpus_of(launch.qemu, tid) for tid in launch.vcpu_tids] == [{4}, {5}]
    assert (ELSEWHERE / "qemu-launcher/4/tasks").read_text().split() == [str(launch.vcpu_tids[0])]
    assert host.cpus_of(1) == host.online() - {4, 5}


@pytest.mark.hosts(more=("openrc-v1",), why="it is about cpusets of v1")
def test_where_nothing_mounts_cpusets(alice: User, vm: Callable[..., Launch], no_cpusets: None) -> None:
    """`check` says what is missing, and the commands that it gives are enough, wherever they mount them."""
    told = re.search("Shielding needs cgroup v2; .*: (mkdir .*)", alice.command("check").stdout)
    assert told
    helper_has_left()  # it has seen none
    subprocess.run(["sh", "-ec", told[1]], check=True)
    launch = start(alice, vm)
    assert_shielded_elsewhere(launch)
    assert launch.quit() == 0


@pytest.mark.hosts(more=("openrc-v1",), why="it is about cpusets of v1")
def test_the_helper_mounts_cpusets(
    alice: User, vm: Callable[..., Launch], no_cpusets: None, helper_toml: Callable[..., None]
) -> None:
    """Where helper.toml says so, once; and it has no more rights afterwards than it has elsewhere."""
    helper_toml(f'cpuset_mount = "{ELSEWHERE}"\n')
    for _ in range(2):  # the second helper finds them
        launch = start(alice, vm)
        assert_shielded_elsewhere(launch)
        host.wait_for("the helper is at rest", lambda: int(host.status(helper())["CapEff"], 16) == 0)
        assert int(host.status(helper())["CapPrm"], 16) == THREE
        mounted = subprocess.check_output(
            ["findmnt", "-rno", "TARGET,OPTIONS", "-t", "cgroup", "-O", "cpuset"], text=True
        )
        assert re.fullmatch(rf"{ELSEWHERE} rw,nosuid,nodev,noexec,\S*\n", mounted), mounted
        assert launch.quit() == 0
        helper_has_left()
    assert host.cpus_of(1) == host.online()


@pytest.mark.hosts(more=("openrc-v1",), why="it is about cpusets of v1")
def test_cpusets_that_cannot_be_mounted(
    alice: User, no_cpusets: None, helper_toml: Callable[..., None], syslog: Callable[[], list[str]]
) -> None:
    """The helper serves all the same, and says what is missing."""
    helper_toml(f'cpuset_mount = "{ELSEWHERE}"\n')
    ELSEWHERE.write_text("")
    try:
        assert "Shielding needs cgroup v2; " in alice.command("check").stdout
        assert any("mounting cpusets failed: " in line and str(ELSEWHERE) in line for line in syslog()), syslog()
        helper_has_left()
    finally:
        ELSEWHERE.unlink()


@pytest.mark.hosts(more=("openrc-v1",), why="it is about cpusets of v1")
def test_cpusets_are_used_where_they_are(
    alice: User, vm: Callable[..., Launch], helper_toml: Callable[..., None]
) -> None:
    """Also by a helper that is told to mount some."""
    helper_toml(f'cpuset_mount = "{ELSEWHERE}"\n')
    stop_helper()
    launch = start(alice, vm)
    assert_tuned(launch)
    assert launch.quit() == 0
    assert not ELSEWHERE.exists()
