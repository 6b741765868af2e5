"""Shields in the legacy hierarchy: the original's layout, in which all that can be moved leaves the CPUs.

Differences to the other mechanisms are asserted: most of the kernel's own threads stay.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from system import host, legacy
from system.claims import Claimant, end
from system.fixtures import offline, start_helper
from system.people import User
from system.vms import HELPER_UNIT, Launch, define

pytestmark = pytest.mark.hosts("legacy", why="it is about hosts with the legacy hierarchy")

ALL = "0-7"


def in_pool(pid: int, tid: int) -> bool:
    """Whether that thread is where all tasks of the host are."""
    return legacy.cpuset_of(pid, tid) == "qemu-launcher/pool"


@pytest.fixture
def container() -> Iterator[Path]:
    """A cpuset as a container has one, with a task in it, and all CPUs of the host."""
    outer, inner = legacy.CPUSETS / "docker", legacy.CPUSETS / "docker/4711"
    for group in (outer, inner):
        group.mkdir()
        (group / "cpuset.cpus").write_text(ALL)
        (group / "cpuset.mems").write_text("0")
    with sleeping() as task:
        (inner / "tasks").write_text(str(task))
        yield inner
        assert (inner / "tasks").read_text().split() == [str(task)], "its task stays in it"
    inner.rmdir()
    outer.rmdir()


@contextmanager
def another_container(group: Path, cpus: str) -> Iterator[None]:
    """One that is made now, with CPUs and a task of its own."""
    group.mkdir()
    try:
        (group / "cpuset.cpus").write_text(cpus)
        (group / "cpuset.mems").write_text("0")
        with sleeping() as task:
            (group / "tasks").write_text(str(task))
            assert host.cpus_of(task) == host.parse(cpus)
            yield
    finally:
        group.rmdir()


@contextmanager
def sleeping() -> Iterator[int]:
    """The PID of a process that sleeps until the end of the block."""
    with subprocess.Popen(["sleep", "infinity"]) as task:
        try:
            yield task.pid
        finally:
            task.kill()


def test_where_everything_is(program: Claimant) -> None:
    assert host.mechanism() == "cpuset-v1"
    child = program.spawn(3)
    pins = [[child.tids[0], [4], True], [child.tids[1], [5], True], [child.tids[2], [1], False]]
    assert program.call("PinThreads", "usa(uaub)au", child.pid, "vm", pins, [2]).error == "ok"
    scope = host.scope_of(program.user.uid, "vm")
    assert host.cgroup(child.pid) == scope
    for tid, place, cpus in (
        (child.tids[0], "qemu-launcher/4", {4}),
        (child.tids[1], "qemu-launcher/5", {5}),
        (child.tids[2], f"qemu-launcher/pool/{scope.name}/1", {1}),
        (child.pid, f"qemu-launcher/pool/{scope.name}/2", {2}),
        (os.getpid(), "qemu-launcher/pool", {0, 1, 2, 3, 6, 7}),
    ):
        pid = os.getpid() if tid == os.getpid() else child.pid
        assert legacy.cpuset_of(pid, tid) == place
        assert host.cpus_of(pid, tid) == cpus
    assert host.born_of_us() == host.born_of_pid_1() == host.cpus_of(1) == {0, 1, 2, 3, 6, 7}
    assert host.trespassers({4, 5}, child.tids[:2], since=0) == []
    theirs = {thread.tid for thread in host.threads() if not thread.of_kernel}
    stuck = {int(tid) for tid in (legacy.CPUSETS / "tasks").read_text().split()}
    assert stuck
    assert not theirs & stuck, "only threads of the kernel's own are left"
    end(program, child)
    assert not legacy.OURS.exists()
    assert host.cpus_of(1) == host.online()


def test_vms_of_two_users_beside_a_container_end_in_either_order(
    program: Claimant, carol: User, container: Path
) -> None:
    """The helper is killed on the way; its next start finds everything in the tree."""
    with Claimant(carol) as other:
        for first in (0, 1):
            mine, hers = program.spawn(2), other.spawn(2)
            assert program.pin(mine, "vm", 4, 5).error == "ok"
            assert program.schedule(mine, "vm", "fifo", 1).error == "ok"
            subprocess.run(["systemctl", "kill", "--signal=SIGKILL", HELPER_UNIT], check=True)
            start_helper()
            assert other.pin(hers, "vm", 6, 7).error == "ok"
            assert host.isolated() == {4, 5, 6, 7}
            assert legacy.said(container) == legacy.said(container.parent) == "0-3"
            with another_container(container.with_name("4712"), "2-3"):
                pass
            assert [host.cpus_of(mine.pid, tid) for tid in mine.tids] == [{4}, {5}]
            assert [host.scheduling(tid)[0] for tid in mine.tids] == ["fifo", "fifo"]
            assert "are held by VM vm of alice" in other.pin(hers, "vm", 5).text
            end(*((program, mine), (other, hers))[first])
            assert host.isolated() == ({6, 7} if first == 0 else {4, 5})
            end(*((other, hers), (program, mine))[first])
            assert not legacy.OURS.exists()
            assert legacy.said(container) == legacy.said(container.parent) == ALL


def test_what_a_task_has_chosen_is_back_in_the_end(program: Claimant) -> None:
    """Before Linux 6.2 the kernel forgets it, and what it has of it in its cpuset is all that can be asked for."""
    chosen = frozenset(range(6))
    with sleeping() as task:
        os.sched_setaffinity(task, chosen)
        for cpus in ((4, 5), (2, 3)):
            child = program.spawn(2)
            assert program.pin(child, "vm", *cpus).error == "ok"
            assert host.cpus_of(task) == chosen - {*cpus}
            end(program, child)
            assert host.cpus_of(task) == chosen


def test_pinned_cpus_go_offline_and_come_back(program: Claimant, carol: User) -> None:
    """The kernel puts their threads into our topmost cpuset, which has all CPUs; none stays on another VM's."""
    with Claimant(carol) as other:
        hers, child = other.spawn(1), program.spawn(2)
        assert other.pin(hers, "vm", 6).error == "ok"
        pins = [[child.tids[0], [4], True], [child.tids[1], [2], False]]
        assert program.call("PinThreads", "usa(uaub)au", child.pid, "vm", pins, []).error == "ok"
        with offline(2, 4):
            for tid in child.tids:
                host.wait_for("it is where all others are", partial(in_pool, child.pid, tid))
                assert host.cpus_of(child.pid, tid) == {0, 1, 3, 5}
            assert legacy.cpuset_of(hers.pid, hers.tids[0]) == "qemu-launcher/6"
        host.wait_for("others have them again", lambda: host.born_of_us() == {0, 1, 2, 3, 4, 5})
        assert host.cpus_of(hers.pid, hers.tids[0]) == {6}
        end(other, hers)
        end(program, child)
    assert not legacy.OURS.exists()
    assert host.cpus_of(1) == host.online()


def test_her_own_groups_of_systemds_give_her_nothing(program: Claimant, alice: User) -> None:
    """In that hierarchy any task of hers may go where she may write. Threads keep their CPUs; who leaves loses them."""
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    own = alice.slice / f"user@{alice.uid}.service"
    for tid in child.tids:
        alice.login.run(f"echo {tid} >{own}/tasks", check=True)
        assert host.cgroup(child.pid, tid) == own
    assert program.call("GetLimits", "").error == "ok"
    assert host.isolated() == {4, 5}
    assert [host.cpus_of(child.pid, tid) for tid in child.tids] == [{4}, {5}]
    assert [host.scheduling(tid)[0] for tid in child.tids] == ["fifo", "fifo"]

    alice.login.run(f"echo {child.pid} >{own}/cgroup.procs", check=True)
    assert program.call("GetLimits", "").error == "ok"
    assert host.isolated() == set()
    assert host.cpus_of(child.pid) == host.cpus_of(child.pid, child.tids[0]) == host.online()
    assert host.realtime_threads() == set()


def test_a_vm_of_alices_with_all_there_is(alice: User, vm: Callable[..., Launch]) -> None:
    tuning = {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1, "rlimit_memlock": "400M"}
    define(alice, "win11", tuning, {"m": "128M"}, cpus=2)
    launch = vm(alice, "win11")
    assert [host.cpus_of(launch.qemu, tid) for tid in launch.vcpu_tids] == [{4}, {5}]
    assert [host.scheduling(tid) for tid in launch.vcpu_tids] == [("fifo", 1, True)] * 2
    assert [legacy.cpuset_of(launch.qemu, tid) for tid in launch.vcpu_tids] == ["qemu-launcher/4", "qemu-launcher/5"]
    assert host.trespassers({4, 5}, launch.vcpu_tids, since=0) == []
    shown = alice.login.run("qemu-launcher status --json win11").stdout
    assert shown.count('"cpuset-v1"') == 2, shown
    assert launch.quit() == 0
    host.wait_for("the cpusets are gone", lambda: not legacy.OURS.exists())
