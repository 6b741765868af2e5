"""`check` on a real host, as a user runs it: nothing is wrong, then a limit is, and nothing is changed by asking."""

from collections.abc import Callable

import pytest

from system import host
from system.fixtures import TOML
from system.people import Finished, User
from system.test_administrators import WHY
from system.vms import define

pytestmark = pytest.mark.hosts("trixie", "bookworm", why="what differs without partitions is said here")

TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "64M"}


def complaints(done: Finished) -> list[str]:
    """What it says beside its report, but for its patience with a helper that starts slowly."""
    return [line for line in done.stderr.splitlines() if not line.endswith("waiting for qemu-launcher-helper")]


def test_check(alice: User, helper_toml: Callable[..., None]) -> None:
    define(alice, "vm", TUNING, cpus=2)
    done = alice.command("check", "vm")
    lines = done.stdout.splitlines()
    assert (done.status, complaints(done)) == (0, []), done.stdout
    warnings = [line for line in lines if line.startswith(("warning", "error"))]
    # Debian 12's kernel has no fair server.
    old = host.mechanism() != "partition"
    assert [line for line in warnings if "has no fair server" not in line] == []
    assert len(warnings) == old
    assert f"shielding   {host.mechanism()}: {WHY[host.mechanism()]}" in lines
    assert "ok       CPUs 4-5: whole cores" in lines
    assert "ok       the helper would let QEMU lock 64 MiB" in lines
    assert "ok       the helper would pin and shield 2 threads as wanted" in lines
    assert "ok       the helper would set policy fifo, priority 1" in lines
    assert lines[-1] == "vm would start" + ": 1 warning" * old

    helper_toml("[[limits]]\nmax_cpus = 1\n")
    done = alice.command("check", "vm")
    assert done.status == 2
    refused = f"error    Your VMs would hold 2 CPUs, and may hold 1 ({TOML}, [[limits]] entry 1)"
    assert [line for line in done.stdout.splitlines() if line.startswith("error")] == [refused]

    assert host.isolated() == frozenset()
    assert host.scopes() == set()
    assert host.records() == set()


def test_installation(alice: User) -> None:
    done = alice.command("check")
    assert (done.status, complaints(done)) == (0, []), done.stdout
    lines = done.stdout.splitlines()
    assert "ok       qemu-launcher-helper is installed, for the bus, polkit and systemd" in lines
    assert "ok       alice is a member of the group qemu-launcher, also in this login" in lines
    assert "ok       polkit lets you lock memory, pin threads and set policies, without a password" in lines
    assert "ok       cgroup v2 is there, with the cpuset controller" in lines
