"""The guest never runs untuned: it stands still until everything is true, and for good when something is not.

The witness is a QMP client of the tests' own, and the firmware that would speak if it ran.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from system import host
from system.claims import copied
from system.fixtures import stop_helper
from system.people import User
from system.stepping import Stepping
from system.vms import Launch, define, firmware_path, refused, running

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "400M"}


def test_it_stands_still_until_all_is_true(alice: User, stepping: Stepping) -> None:
    """The helper is halted when it has set the scheduler and has not said so yet: everything holds, nothing runs."""
    define(alice, "held", {**TUNING, "rlimit_memlock": "850M"}, {"overcommit": "mem-lock=on"}, cpus=2)
    with stepping.halted_at("Scheduler") as halt:
        launch = Launch(alice, "held")
        try:
            halt.wait(launch)
            tids = launch.vcpu_tids
            assert [host.cpus_of(launch.qemu, tid) for tid in tids] == [{4}, {5}]
            assert [host.scheduling(tid) for tid in tids] == [("fifo", 1, True)] * 2
            assert host.isolated() == {4, 5}
            assert host.trespassers({4, 5}, tids, since=host.born(launch.qemu)) == []
            assert host.limit(launch.qemu, "Max locked memory") == (850 << 20, 850 << 20)
            assert host.locked(launch.qemu) > 16 << 20
            assert launch.witness.state() == "prelaunch"
            assert launch.witness.heard("RESUME") == []
            assert not launch.guest_ran
        except BaseException:
            launch.close()
            raise
    try:
        launch.until_running()
        assert launch.witness.state() == "running"
        assert len(launch.witness.heard("RESUME")) == 1
        assert launch.witness.heard("STOP") == []
    finally:
        launch.close()


def test_a_launcher_that_is_killed_before_leaves_no_running_guest(alice: User, stepping: Stepping) -> None:
    """status says what is there, and the next start ends it first."""
    define(alice, "held", TUNING, cpus=2)
    with stepping.halted_at("Pin") as halt:
        launch = Launch(alice, "held")
        halt.wait(launch)
        tids = host.tids(launch.qemu)
        os.kill(launch.pid, signal.SIGKILL)
        host.wait_for("the launcher is gone", lambda: not launch.is_alive)
    try:
        assert launch.witness.state() == "prelaunch"
        shown = alice.command("status", "held")
        assert shown.status == 0
        assert "never started" in shown.stdout
        assert not launch.guest_ran
        with running(alice, "held") as second:
            assert "ended a QEMU" in second.said
            assert host.isolated() == {4, 5}
            assert not tids & host.tids(second.qemu)
            assert second.quit() == 0
    finally:
        launch.close()


@contextmanager
def lying_helper(lie: str) -> Iterator[None]:
    """Somebody else owns the helper's name on the bus, as root, and does what `lie` says; see lying_helper.py."""
    stop_helper()
    script = copied("system/lying_helper.py") / "lying_helper.py"
    command = ["systemd-run", "--quiet", "--collect", "--unit=lying-helper", "python3", "-I", str(script), lie]
    subprocess.run(command, check=True)
    try:
        bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "NameHasOwner", "s")
        ask = ["busctl", "call", *bus, "org.qemulauncher.Helper1"]
        host.wait_for(
            "the liar owns the name", lambda: b"true" in subprocess.run(ask, check=True, capture_output=True).stdout
        )
        yield
    finally:
        subprocess.run(["systemctl", "stop", "lying-helper.service"], check=True)


def refused_thread(words: str) -> int:
    """The TID that the launcher complains about."""
    found = re.search(r"qemu-launcher-helper reported success, but vCPU \d+ \(TID (\d+)\)", words)
    assert found, words
    return int(found[1])


def test_a21_a_helper_that_only_says_yes_starts_no_guest(alice: User) -> None:
    define(alice, "deceived", {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1}, cpus=2)
    with lying_helper("act on nothing"):
        status, words = refused(alice, "deceived")
    assert status == 1
    assert refused_thread(words) > 1
    assert "may run on CPUs 0-7, not on 4" in words


def test_a21_a_helper_that_pins_one_thread_wrong_starts_no_guest(alice: User) -> None:
    """Every pin is real but the last: the launcher looks at each thread, and names the one."""
    define(alice, "deceived", {"vcpu_pinning": [4, 5, 6, 7], "isolation": "cpuset"}, cpus=4)
    with lying_helper("pin the last one wrong"):
        status, words = refused(alice, "deceived")
    assert status == 1
    assert "vCPU 3 (TID " in words
    assert "may run on CPUs 0, not on 7" in words


def test_a21_a_helper_that_pins_without_a_shield_starts_no_guest(alice: User) -> None:
    define(alice, "deceived", {"vcpu_pinning": [4, 5]}, cpus=2)
    with lying_helper("pin without a shield"):
        status, words = refused(alice, "deceived")
    assert status == 1
    assert "CPUs 4-5 are not shielded" in words


def test_a21_a_helper_that_lies_about_the_memory_lock_starts_no_qemu(alice: User) -> None:
    define(alice, "deceived", {"rlimit_memlock": "400M"}, cpus=1)
    with lying_helper("act on nothing"):
        status, words = refused(alice, "deceived")
    assert status == 1
    assert re.search(r"qemu-launcher-helper reported success, but QEMU \(PID \d+\) may lock 8 MiB", words), words
    assert not firmware_path(alice, "deceived").exists(), "QEMU would have made it"


def test_a21_the_liar_is_refused_the_name_when_it_is_not_root(alice: User, bob: User) -> None:
    for user in (alice, bob):
        claim = "busctl call org.freedesktop.DBus /org/freedesktop/DBus org.freedesktop.DBus RequestName su"
        done = user.login.run(f"{claim} org.qemulauncher.Helper1 4")
        assert done.status != 0
        assert "not allowed to own the service" in done.stderr or "Access denied" in done.stderr, done.stderr


def test_the_real_helper_serves_again(alice: User, vm: Callable[..., Launch]) -> None:
    """The positive control of the lies above: the same definition starts with the helper that acts."""
    define(alice, "deceived", {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1}, cpus=2)
    assert vm(alice, "deceived").quit() == 0
