"""Who may not: told what to do about it, and the guest has not run for an instruction."""

from collections.abc import Callable

import pytest

from system import host
from system.people import Login, User, let_into_group, put_out_of_group
from system.vms import Launch, define, firmware_path, refused

# Whom the bus lets through is the bus's to say: on all of them.
pytestmark = pytest.mark.hosts(
    "trixie",
    "broker",
    more=("bookworm",),
    why="test_managing_others.py asks each polkit; another bus reads the policy anew",
)
TUNING = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1}


def test_bob_who_is_not_in_the_group(bob: User) -> None:
    define(bob, "vm", TUNING, cpus=2)
    status, words = refused(bob, "vm")
    assert status == 1
    assert "bob is not a member of the group qemu-launcher" in words
    assert "sudo usermod -aG qemu-launcher bob" in words
    assert "then log out and in again" in words
    assert "qemu-launcher run --untuned vm" in words


def test_alice_who_is(alice: User, vm: Callable[..., Launch]) -> None:
    """All that is refused to others is granted to a member of the group."""
    define(alice, "vm", {**TUNING, "rlimit_memlock": "400M"}, {"m": "128M"}, cpus=2)
    running = vm(alice, "vm")
    assert host.isolated() == {4, 5}
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{4}, {5}]
    assert [host.scheduling(tid) for tid in running.vcpu_tids] == [("fifo", 1, True)] * 2
    assert host.limit(running.qemu, "Max locked memory") == (400 << 20, 400 << 20)
    assert running.quit() == 0
    host.wait_until_as_before()


def test_bob_without_tuning(bob: User, vm: Callable[..., Launch]) -> None:
    """The way that the refusal names does work, and works without the group."""
    define(bob, "vm", TUNING, cpus=2)
    running = vm(bob, "vm", "--untuned")
    assert host.isolated() == frozenset()
    assert [host.scheduling(tid)[0] for tid in running.vcpu_tids] == ["other", "other"]
    assert running.quit() == 0


def test_a_member_who_has_not_logged_in_since(bob: User) -> None:
    """The bus looks at the groups of the process, which are those of its login."""
    define(bob, "vm", TUNING, cpus=2)
    with Login("bob") as login:
        let_into_group("bob")
        try:
            status, words = refused(bob, "vm", login=login)
        finally:
            put_out_of_group("bob")
    assert status == 1
    assert "bob is a member of the group qemu-launcher, but not yet in this login" in words
    assert "log out and in again" in words


@pytest.mark.parametrize("result", ["NO", "AUTH_ADMIN"])
def test_a_member_whom_the_administrators_rule_stops(
    alice: User, polkit_rule: Callable[[str], None], result: str
) -> None:
    """AUTH_ADMIN without an agent that could ask is a no as well, and nobody waits for an answer."""
    polkit_rule(result)
    define(alice, "vm", TUNING, cpus=2)
    status, words = refused(alice, "vm")
    assert status == 1
    assert "polkit does not allow org.qemulauncher.pin-threads to alice" in words
    assert "qemu-launcher run --untuned vm" in words
    assert firmware_path(alice, "vm").exists(), "QEMU makes it; it was there, paused"


def test_memory_lock_is_refused_before_there_is_a_qemu(alice: User, polkit_rule: Callable[[str], None]) -> None:
    polkit_rule("NO")
    define(alice, "vm", {"rlimit_memlock": "64M"}, cpus=2)
    status, words = refused(alice, "vm")
    assert status == 1
    assert "polkit does not allow org.qemulauncher.set-memlock to alice" in words
    assert not firmware_path(alice, "vm").exists(), "QEMU would have made it"
