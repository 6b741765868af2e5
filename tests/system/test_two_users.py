"""Two users share a host: disjoint CPUs side by side, in the orders in which cgroups are tricky, and a conflict.

One of them: alice's vm1 ends while her vm3 runs; her slice would keep vm1's CPUs, and carol's
claim on them be refused by the kernel, if nobody shrank it first.
"""

import re
from collections.abc import Callable

import pytest

from system import host
from system.people import User
from system.vms import Launch, define, refused

pytestmark = pytest.mark.hosts("trixie", "bookworm", more=("legacy",), why="it is what each mechanism is there for")


def expect_on(vm: Launch, cpus: list[int]) -> None:
    """Its vCPUs are on these CPUs, one each, in real time."""
    assert [host.cpus_of(vm.qemu, tid) for tid in vm.vcpu_tids] == [{cpu} for cpu in cpus]
    assert [host.scheduling(tid) for tid in vm.vcpu_tids] == [("fifo", 1, True)] * len(cpus)
    # CPUs that nobody shields any more come back to the host first, and to the scopes then.
    host.wait_for(
        "the emulator threads use what nobody shields",
        lambda: host.cpus_of(vm.qemu) == host.online() - host.isolated(),
    )


def test_vms_of_two_users_come_and_go(alice: User, carol: User, vm: Callable[..., Launch]) -> None:
    realtime = {"scheduler": "fifo", "priority": 1}
    for user, name, cpus in ((alice, "vm1", [4, 5]), (alice, "vm3", [2, 3]), (carol, "vm2", [6, 7])):
        define(user, name, {**realtime, "vcpu_pinning": cpus}, cpus=2)
    vm1 = vm(alice, "vm1")
    vm2 = vm(carol, "vm2")
    vm3 = vm(alice, "vm3")
    assert host.isolated() == {2, 3, 4, 5, 6, 7}
    assert host.cpus_of(1) == {0, 1}
    for one, cpus in ((vm1, [4, 5]), (vm2, [6, 7]), (vm3, [2, 3])):
        expect_on(one, cpus)

    # Somebody else's CPUs: refused, with whose they are and what is free instead.
    define(carol, "vm4", {**realtime, "vcpu_pinning": [4, 5]}, cpus=2)
    status, words = refused(carol, "vm4")
    assert status == 1
    assert re.search(r"CPUs 4-5 are held by VM vm1 of alice; free for you: none", words), words
    assert "qemu-launcher run --untuned vm4" in words
    for one, cpus in ((vm1, [4, 5]), (vm2, [6, 7]), (vm3, [2, 3])):
        expect_on(one, cpus)

    # Half of somebody else's core is a conflict too: shields are whole cores.
    define(carol, "vm4", {**realtime, "vcpu_pinning": [7]}, cpus=1)
    status, words = refused(carol, "vm4")
    assert status == 1
    assert re.search(r"CPUs 6-7 are held by VM vm2 of carol; free for you: ", words), words

    assert vm1.quit() == 0
    expect_on(vm2, [6, 7])
    expect_on(vm3, [2, 3])
    define(carol, "vm4", {**realtime, "vcpu_pinning": [4, 5]}, cpus=2)
    vm4 = vm(carol, "vm4")
    assert host.isolated() == {2, 3, 4, 5, 6, 7}
    for one, cpus in ((vm2, [6, 7]), (vm3, [2, 3]), (vm4, [4, 5])):
        expect_on(one, cpus)

    assert vm2.quit() == 0
    assert vm3.quit() == 0
    expect_on(vm4, [4, 5])
    assert vm4.quit() == 0


def test_the_last_core_stays_with_the_host(alice: User) -> None:
    define(alice, "greedy", {"vcpu_pinning": [0, 1, 2, 3, 4, 5, 6, 7]}, cpus=8)
    status, words = refused(alice, "greedy")
    assert status == 1
    assert "at least one whole core must stay with the host; free for you: " in words, words
