"""Administrators take a VM's CPUs back, and see what others may have; everybody may with what is his own.

carol is made an administrator by a rule of polkit's that says yes to manage-others, for her alone (fixtures.py). Who
may not, and passwords: test_managing_others.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from system import host
from system.fixtures import TOML
from system.people import Finished, User, folder_of
from system.stepping import Stepping
from system.test_journal import trail
from system.vms import Launch, define

# What the helper says of the mechanism.
WHY = {
    "partition": "The kernel has remote cpuset partitions",
    "pool": "The kernel is older than 6.11: its own threads are not kept away",
}
TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "64M"}


@pytest.fixture
def shielded(alice: User, vm: Callable[..., Launch]) -> Launch:
    """A VM of alice's on CPUs 4 and 5, in real time, which makes no more calls."""
    define(alice, "vm", TUNING, cpus=2)
    launch = vm(alice, "vm").until_settled()
    expect_tuned(launch)
    return launch


def expect_tuned(launch: Launch) -> None:
    # With a pool another VM's CPUs come back when the helper looks: every 15 s while it is there.
    host.wait_for("no other VM's CPUs are shielded", lambda: host.isolated() == {4, 5})
    assert [host.scheduling(tid) for tid in launch.vcpu_tids] == [("fifo", 1, True)] * 2
    assert host.limit(launch.qemu, "Max locked memory") == (64 << 20, 64 << 20)


def expect_released(launch: Launch) -> None:
    """Everything has come back, and the guest runs on."""
    assert host.isolated() == frozenset()
    assert host.realtime_threads() == set()
    assert host.cpus_of(1) == host.online()
    assert [host.cpus_of(launch.qemu, tid) for tid in launch.vcpu_tids] == [host.online()] * 2
    assert host.limit(launch.qemu, "Max locked memory")[1] < 64 << 20
    assert launch.is_alive
    assert launch.witness.state() == "running"


def rows(done: Finished) -> list[list[str]]:
    """The words of each line."""
    assert (done.status, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_an_administrator_takes_the_cpus_back(administrator: User, alice: User, shielded: Launch) -> None:
    assert "warning" not in alice.command("status", "vm").stdout
    since = time.time()
    done = administrator.command("release", "vm", "--owner", "alice")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout == (
        f"vm of alice: gave back CPUs 4-5, its real time and its memory lock; PID {shielded.qemu} runs on\n"
    )
    expect_released(shielded)

    shown = alice.command("status", "vm")
    assert shown.status == 0
    assert "warning     its shield of CPUs 4-5 was taken back: released by you or an administrator, or" in shown.stdout

    records = [record for record in trail(since) if record["QEMU_LAUNCHER_OPERATION"] in ("Release", "VM")]
    released, granted = records
    assert (released["QEMU_LAUNCHER_VERDICT"], released["QEMU_LAUNCHER_REASON"]) == ("released", "released")
    assert (released["QEMU_LAUNCHER_UID"], released["QEMU_LAUNCHER_CPUS"]) == (str(alice.uid), "4-5")
    assert granted["MESSAGE"].startswith(f"granted Release uid={administrator.uid} ")
    assert granted["QEMU_LAUNCHER_USER"] == "carol"
    assert granted["QEMU_LAUNCHER_OWNER"] == "alice"
    assert granted["QEMU_LAUNCHER_VM"] == "vm"

    # They are anybody's again.
    assert rows(administrator.command("status", "--all-users"))[1:] == [
        ["vm", "alice", str(shielded.qemu), "none", "none"]
    ]
    assert "free CPUs  2-7\n" in administrator.command("limits").stdout
    assert shielded.quit() == 0


def test_real_time_goes_first(administrator: User, shielded: Launch, stepping: Stepping) -> None:
    """Seen in the middle: one thread has lost its real time, the other not yet, and the shield is still there."""
    log = administrator.file(folder_of("carol") / "release.log", "")
    with stepping.halted_at("one thread") as halt:
        pid = administrator.login.spawn("exec qemu-launcher release vm --owner alice", log)
        host.wait_for("the helper comes to that step", lambda: halt.reached or not host.is_alive(pid))
        assert halt.reached, log.read_text()
        assert len(host.realtime_threads()) == 1
        assert host.isolated() == {4, 5}
        assert [host.cpus_of(shielded.qemu, tid) for tid in shielded.vcpu_tids] == [{4}, {5}]
    host.wait_for("the release is done", lambda: not host.is_alive(pid))
    assert administrator.login.wait(pid) == 0, log.read_text()
    expect_released(shielded)


def test_ones_own_needs_nobody(alice: User, shielded: Launch) -> None:
    done = alice.command("release", "vm")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith("vm: gave back CPUs 4-5, ")
    expect_released(shielded)
    assert alice.command("release", "vm").stdout.startswith("vm: gave back no CPUs, it held none, ")
    assert shielded.quit() == 0
    gone = alice.command("release", "vm")
    assert (gone.status, gone.stdout) == (3, "")
    assert "vm holds nothing that could be given back: it is not running" in gone.stderr


def test_nothing_to_give_back(administrator: User, alice: User) -> None:
    for user, owner in ((administrator, "alice"), (alice, "carol"), (administrator, "0")):
        done = user.command("release", "no-such-vm", "--owner", owner)
        assert (done.status, done.stdout) == (3, "")
        assert "holds nothing that could be given back" in done.stderr
    assert administrator.command("release", "vm", "--owner", "no-such-user").status == 2


def test_limits_and_the_lines_they_come_from(
    administrator: User, alice: User, helper_toml: Callable[..., None]
) -> None:
    text = '# ours\n[[limits]]\nusers = ["alice"]\ncpus = "2-5"\nmemlock = "100M"\n\n[[limits]]\nmax_vms = 3\n'
    helper_toml(text)
    own = rows(alice.command("limits"))
    assert own[0] == f"alice may have, by {TOML}, [[limits]] entry 1:".split()
    assert ["cpus", "2-5", "helper.toml:4"] in own
    assert ["memlock", "100", "MiB", "helper.toml:5"] in own
    assert ["max_vms", "8", "default"] in own
    assert ["free", "CPUs", "2-5"] in own
    assert ["mechanism", f"{host.mechanism()}:", *WHY[host.mechanism()].split()] in own

    assert rows(administrator.command("limits", "--owner", "alice")) == own
    assert rows(administrator.command("limits", "--owner", str(alice.uid)))[1:] == own[1:]
    assert ["max_vms", "3", "helper.toml:8"] in rows(administrator.command("limits"))

    helper_toml(text, mode=0o640)
    assert ["cpus", "2-5", "helper.toml,", "entry", "1"] in rows(alice.command("limits"))


def test_limits_without_a_file(alice: User) -> None:
    own = rows(alice.command("limits"))
    assert own[0] == ["alice", "may", "have,", "by", "the", "built-in", "defaults:"]
    assert ["max_vms", "8", "default"] in own
    assert ["cpus", "0-7", "default"] in own
