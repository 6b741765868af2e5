"""Threads that are no vCPUs beside a shield, and a shield that grows with the guest."""

from collections.abc import Callable

from system import host
from system.people import User
from system.vms import Launch, define


def test_iothreads_and_emulator_threads_beside_a_shield(alice: User, vm: Callable[..., Launch]) -> None:
    """A vCPU with two CPUs, and the kernel's word on every thread of QEMU's and on PID 1."""
    keys = {
        "vcpu_pinning": ["4-5", [6]],
        "emulator_pinning": "0-1",
        "iothread_pinning": {"io0": 1},
        "emulator_scheduler": "batch",
    }
    define(alice, "placed", keys, {"object": "iothread,id=io0"}, cpus=2)
    running = vm(alice, "placed").until_settled()
    (iothread,) = (row["thread-id"] for row in running.witness.ask("query-iothreads"))
    assert [host.cpus_of(running.qemu, tid) for tid in running.vcpu_tids] == [{4, 5}, {6}]
    assert host.cpus_of(running.qemu, iothread) == {1}
    emulator = host.tids(running.qemu) - {*running.vcpu_tids, iothread}
    assert running.qemu in emulator
    assert {host.cpus_of(running.qemu, tid) for tid in emulator} == {frozenset({0, 1})}
    assert {host.scheduling(tid)[0] for tid in emulator} == {"batch"}
    assert {host.scheduling(tid)[0] for tid in (*running.vcpu_tids, iothread)} == {"other"}
    assert host.cpus_of(1) == host.online() - {4, 5, 6, 7}, "whole cores, as CPU 7 is the sibling of 6"
    assert running.quit() == 0
    host.wait_until_as_before()
    assert host.cpus_of(1) == host.online()


def test_vcpu_that_is_plugged_in_gets_a_shielded_cpu_and_real_time(alice: User, vm: Callable[..., Launch]) -> None:
    """The shield is made anew over both cores, and the first vCPU has its real time back."""
    growing = {"smp": "1,sockets=1,cores=2,threads=1,maxcpus=2"}
    define(alice, "grows", {"vcpu_pinning": [4, 6], "scheduler": "fifo", "priority": 1}, growing)
    running = vm(alice, "grows").until_settled()
    assert host.isolated() == {4, 5}
    place = {"socket-id": 0, "core-id": 1, "thread-id": 0}
    running.witness.ask("device_add", driver="max-x86_64-cpu", id="more", **place)
    host.wait_for("it is tuned", lambda: "was plugged in" in running.said)
    assert "was plugged in: on CPU 6 (shielded), fifo 1" in running.said, running.said
    tids = [vcpu.tid for vcpu in running.witness.vcpus()]
    assert [host.cpus_of(running.qemu, tid) for tid in tids] == [{4}, {6}]
    assert [host.scheduling(tid) for tid in tids] == [("fifo", 1, True)] * 2
    assert host.isolated() == {4, 5, 6, 7}
    assert running.witness.state() == "running"
    assert running.quit() == 0
