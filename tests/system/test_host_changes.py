"""The host changes under running VMs: CPUs go and come, it sleeps, its clock jumps, its administrator moves things.

Afterwards it is as after any VM: see `host_as_before`. A change that leaves a shield alone costs its VM nothing.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from system import host
from system.claims import Child, Claimant
from system.fixtures import offline, start_helper, stop_helper
from system.people import User
from system.stepping import Stepping
from system.vms import Launch, define

pytestmark = pytest.mark.hosts("trixie", "bookworm", why="those with v1 are in test_v1.py")
about_partitions = pytest.mark.hosts("trixie", why="it is about what the kernel does to partitions")

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "shutdown_timeout": 1}
SYSTEMD_DROP_INS = Path("/run/systemd/system.control")
SLEPT = Path("/sys/power/suspend_stats/success")  # how often
LOGIND_DROP_IN = Path("/run/systemd/logind.conf.d/test.conf")


@contextmanager
def allowed_cpus(unit: str, cpus: str) -> Iterator[None]:
    """The administrator keeps a unit there. An empty value would leave the mask in force: in the end, all CPUs."""
    command = ["systemctl", "set-property", "--runtime", unit]
    subprocess.run([*command, f"AllowedCPUs={cpus}"], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, f"AllowedCPUs={min(host.online())}-{max(host.online())}"], check=True)
        for file in (SYSTEMD_DROP_INS / f"{unit}.d").glob("*-AllowedCPUs.conf"):
            file.unlink()


def shielded(program: Claimant) -> Child:
    """Two real-time threads, alone on CPUs 4 and 5; no helper is there any more."""
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    stop_helper()
    return child


def expect_whole(child: Child) -> None:
    """It still has all of it, and nobody else is there.

    Of the kernel's threads, some are put back on all CPUs when one comes online (kswapd: mm/vmscan.c).
    """
    assert host.isolated() == {4, 5}
    assert [host.cpus_of(child.pid, tid) for tid in child.tids] == [{4}, {5}]
    assert host.realtime_threads() == set(child.tids)
    trespassers = host.trespassers({4, 5}, child.tids, since=host.born(child.pid))
    assert [thread for thread in trespassers if not thread.of_kernel] == []


def expect_nothing_half(child: Child, before: tuple[int, int]) -> None:
    """It has nothing any more, and lives."""
    host.wait_for("real time is taken from it", lambda: host.realtime_threads() == set())
    host.wait_for("the CPUs are back", lambda: host.isolated() == frozenset())
    host.wait_for("the limit is as before", lambda: host.limit(child.pid, "Max realtime timeout") == before)
    assert host.is_alive(child.pid)


def test_a_shielded_cpu_goes_offline(alice: User, vm: Callable[..., Launch]) -> None:
    """The kernel moves its vCPU to the other's CPU, where both are real-time; the helper, started for it, ends that.

    The VM runs on, untuned, and its user can see why. Its next start has a shield again.
    """
    define(alice, "hot", TUNING, cpus=2)
    running = vm(alice, "hot").until_settled()
    stop_helper()
    with offline(4):
        host.wait_for("real time ends", lambda: host.realtime_threads() == set())
        host.wait_for("the shield ends", lambda: host.isolated() == frozenset())
        places = {host.online()}
        host.wait_for("they run anywhere", lambda: {host.cpus_of(running.qemu, t) for t in running.vcpu_tids} == places)
        shown = alice.command("status", "hot").stdout
        assert "its shield of CPUs 4-5 was taken back: CPU 4 went offline\n" in shown
        assert "to bring it online: echo 1 | sudo tee /sys/devices/system/cpu/cpu4/online\n" in shown
    assert running.witness.state() == "running"
    assert running.quit() == 0
    host.wait_until_as_before()
    vm(alice, "hot").quit()


def test_all_cpus_of_a_shield_go_offline(program: Claimant) -> None:
    """The partition is invalid then, stays so when they come back, and its threads run among all others."""
    child = shielded(program)
    before = 200_000, 200_000
    with offline(4, 5):
        expect_nothing_half(child, before)
    expect_nothing_half(child, before)
    assert host.born_of_us() == host.online()
    answer = program.pin(child, "vm", 4, 5)
    assert (answer.error, "has to be started anew" in answer.text) == ("TargetRefused", True), answer


def test_other_cpus_go_offline_and_come_back(program: Claimant) -> None:
    """The shield is not concerned. What is pinned without one goes where it can, and back."""
    child = program.spawn(2)
    pins = [[child.tids[0], [4], True], [child.tids[1], [2], False]]
    assert program.call("PinThreads", "usa(uaub)au", child.pid, "vm", pins, []).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1, threads=1).error == "ok"
    stop_helper()
    with offline(2, 6):
        start_helper()
        assert host.cpus_of(child.pid, child.tids[1]) <= host.online() - {4, 5}
        assert host.cpus_of(child.pid, child.tids[0]) == {4}
        assert host.cpus_of(1) == host.online() - {4, 5}
    assert host.cpus_of(child.pid, child.tids[1]) == {2}
    assert host.cpus_of(1) == host.online() - {4, 5}
    assert host.isolated() == {4, 5}
    assert host.realtime_threads() == {child.tids[0]}


@pytest.mark.hosts("trixie", more=("bookworm",), why="if it does not wake, all tests of its lab are lost")
def test_the_host_sleeps(program: Claimant) -> None:
    """Suspend to RAM takes every CPU but one offline and brings them back, while nobody runs."""
    child = shielded(program)
    slept = int(SLEPT.read_text())
    # The clock of the alarm goes on while the lab, which may be slow, lies down: one that rings before wakes nobody.
    subprocess.run(["rtcwake", "--mode", "mem", "--seconds", "15"], check=True)
    assert int(SLEPT.read_text()) == slept + 1
    expect_whole(child)
    start_helper()
    expect_whole(child)


def test_the_clock_jumps(program: Claimant) -> None:
    child = shielded(program)
    for seconds in (400 * 86400, -800 * 86400):
        began, since = time.time(), time.monotonic()
        try:
            time.clock_settime(time.CLOCK_REALTIME, began + seconds)
            start_helper()
            expect_whole(child)
            stop_helper()
        finally:
            time.clock_settime(time.CLOCK_REALTIME, began + time.monotonic() - since)
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    assert host.isolated() == frozenset()


@about_partitions
def test_an_administrator_changes_allowed_cpus(program: Claimant, alice: User) -> None:
    """A shield stays whatever is allowed to the slices above it, and comes as well; QEMU's other threads keep to that.

    But the kernel gives a sibling's only CPUs to nobody: then nothing is left of the claim.
    """
    child = shielded(program)
    define(alice, "kept", {**TUNING, "vcpu_pinning": [6, 7], "emulator_pinning": [5]}, cpus=2)
    with allowed_cpus("user.slice", "0-3"), allowed_cpus(f"qemu-launcher-{program.user.uid}-vm.scope", "0-1"):
        expect_whole(child)
        start_helper()
        expect_whole(child)
        assert host.cpus_of(child.pid) == {0, 1}
        program.end(child.pid)
        host.wait_for("it is gone", lambda: program.call("GetLimits", "").error == "ok" and not host.records())
        child = shielded(program)
        expect_whole(child)
        assert host.cpus_of(child.pid) == {0, 1, 2, 3}
        told = alice.command("check", "kept").stdout
        words = "user.slice may only use CPUs 0-3 (AllowedCPUs=), and its threads besides the vCPUs are pinned to 5"
        assert f"error    {words}\n" in told, told
        assert "sudo systemctl set-property user.slice AllowedCPUs=0-3,5\n" in told
    expect_whole(child)
    assert host.cpus_of(child.pid) == host.online() - {4, 5}
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    with allowed_cpus("system.slice", "4-5"):
        answer = program.pin(child, "vm", 4, 5)
        assert (answer.error, "another cpuset holds some" in answer.text) == ("Conflict", True), answer
        assert host.isolated() == frozenset()
        assert host.exclusive() == {}


@about_partitions
def test_cgroups_removed_by_hand(program: Claimant) -> None:
    """Root moves the process out and removes what is empty, as somebody does who tidies up."""
    child = shielded(program)
    scope = host.cgroup(child.pid).parent
    (scope.parent / "session.slice").mkdir(exist_ok=True)
    (scope.parent / "session.slice/cgroup.procs").write_text(str(child.pid))
    for folder in sorted(scope.rglob("*/"), reverse=True):
        with suppress(FileNotFoundError):  # systemd removes what is empty, too
            folder.rmdir()
    expect_nothing_half(child, (200_000, 200_000))
    program.end(child.pid)
    host.wait_for("the record is gone", lambda: host.records() == set())
    (scope.parent / "session.slice").rmdir()
    expect_whole(shielded(program))


@about_partitions
def test_a_partition_ended_by_hand(program: Claimant) -> None:
    """Nothing tells the helper; its next start does not leave the real time where the shield was."""
    child = shielded(program)
    (host.cgroup(child.pid).parent / "vcpus/cpuset.cpus.partition").write_text("member")
    assert host.isolated() == frozenset()
    start_helper()
    expect_nothing_half(child, (200_000, 200_000))


def test_daemon_reexec_in_the_middle_of_a_launch(alice: User, stepping: Stepping) -> None:
    """It may fail once, whole: systemd hangs up on everybody. Then nothing is left, and the next start works."""
    define(alice, "reexec", TUNING, cpus=2)
    with stepping.halted_at("record") as halt:
        launch = Launch(alice, "reexec")
        halt.wait(launch)
        reexec = subprocess.Popen(["systemctl", "daemon-reexec"])
    try:
        host.wait_for("it runs, or not", lambda: "reexec: running" in launch.said or not launch.is_alive)
        assert reexec.wait(host.PATIENCE) == 0
        if launch.is_alive:
            assert host.isolated() == {4, 5}
            assert host.realtime_threads() == set(launch.vcpu_tids)
            assert launch.quit() == 0
        else:
            assert not launch.guest_ran
            assert "qemu-launcher run --untuned reexec" in launch.said, launch.said  # whoever refused it
    finally:
        launch.close()
    host.wait_until_as_before()


@contextmanager
def kill_user_processes(word: str) -> Iterator[None]:
    """KillUserProcesses= of logind.conf(5)."""
    LOGIND_DROP_IN.parent.mkdir(exist_ok=True)
    LOGIND_DROP_IN.write_text(f"[Login]\nKillUserProcesses={word}\n")
    try:
        _read_logind_conf(word == "yes")
        yield
    finally:
        LOGIND_DROP_IN.unlink()
        _read_logind_conf(False)


def _read_logind_conf(expected: bool) -> None:
    """logind reads it, and says what it has found. systemd 252 has no `systemctl reload` of it."""
    logind = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]

    def said() -> str:
        command = ["busctl", "get-property", *logind, "KillUserProcesses"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    subprocess.run(["systemctl", "kill", "--signal=SIGHUP", "systemd-logind.service"], check=True)
    host.wait_for("logind has read it", lambda: said() == f"b {str(expected).lower()}\n")


def test_logout_with_kill_user_processes(alice: User, vm: Callable[..., Launch]) -> None:
    """logind ends what is in the session's scope, which QEMU is not: but its launcher is, and powers it down."""
    define(alice, "session", TUNING, cpus=2)
    with kill_user_processes("yes"):
        running = vm(alice, "session").until_settled()
        stop_helper()
        qemu = running.qemu
        alice.log_out()
        host.wait_for("QEMU is gone", lambda: not host.tids(qemu))
        host.wait_until_as_before()
        # SIGHUP and SIGTERM come at once, in any order; only SIGTERM sets a limit.
        assert "session: asked the guest to power down" in running.said
        assert "session: the guest did not power down within 1 s: cutting the power" in running.said


def test_logout_without(alice: User, vm: Callable[..., Launch]) -> None:
    """Who has started it from a login that logind leaves alone finds it again: as it was, and his."""
    define(alice, "session", TUNING, cpus=2)
    subprocess.run(["loginctl", "enable-linger", alice.name], check=True)
    try:
        with kill_user_processes("no"):
            running = vm(alice, "session").until_settled()
            alice.log_out()
            assert alice.command("status", "session").status == 0
            assert host.isolated() == {4, 5}
            assert host.realtime_threads() == set(running.vcpu_tids)
            assert running.is_alive, "the launcher, which was in that login"
            assert alice.command("kill", "session").status == 0
            host.wait_for("QEMU is gone", lambda: not host.is_alive(running.qemu))
    finally:
        subprocess.run(["loginctl", "disable-linger", alice.name], check=True)
    host.wait_until_as_before()
