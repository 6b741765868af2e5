"""What the launcher sees for itself: threads of this very process, and a cgroup tree made of files."""

import itertools
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher import absence, cgroups, cpulist, procfs, readback, unaided
from qemu_launcher.definition import Isolation, Scheduling
from qemu_launcher.errors import TuningFailed
from qemu_launcher.plan import Pin, ThreadPlan
from unit.proc_facts import UNIT_LINES

ALL = frozenset(os.sched_getaffinity(0))
CPU = frozenset({max(ALL)})
two_cpus = pytest.mark.skipif(len(ALL) < 2, reason="optional: needs two CPUs")


def plan(tid: int, isolation: Isolation = "cpuset", policy: Scheduling | None = None) -> ThreadPlan:
    scheduled = (tid,) if policy else ()
    return ThreadPlan((Pin(tid, CPU, (3,), shielded=isolation == "shield"),), isolation, scheduled, policy)


def differences(plan: ThreadPlan) -> list[str]:
    return readback.thread_differences(os.getpid(), plan, ())


@two_cpus
def test_pin_as_planned_and_pin_that_is_not(tid: int) -> None:
    (difference,) = differences(plan(tid))
    assert difference.startswith(f"vCPU 3 (TID {tid}) may run on CPUs ")
    os.sched_setaffinity(tid, CPU)
    assert differences(plan(tid)) == []


def test_thread_that_is_gone() -> None:
    assert differences(plan(os.getppid())) == [f"vCPU 3 (TID {os.getppid()}) is no thread of QEMU's any more"]


@two_cpus
def test_shield_that_lets_others_in(tid: int) -> None:
    os.sched_setaffinity(tid, CPU)
    found = differences(plan(tid, "shield"))
    cpu = max(ALL)
    assert f"CPUs {cpu} are not shielded: QEMU's thread {os.getpid()} may run there" in found
    assert f"CPUs {cpu} are not shielded: the launcher itself may run there" in found


@two_cpus
def test_shield_that_holds(tid: int) -> None:
    os.sched_setaffinity(tid, CPU)
    others = [other for other in procfs.tids(os.getpid()) if other != tid]
    try:
        for other in others:
            os.sched_setaffinity(other, ALL - CPU)
        assert differences(plan(tid, "shield")) == []
    finally:
        for other in others:
            os.sched_setaffinity(other, ALL)


@two_cpus
def test_other_threads_are_looked_at_too(tid: int) -> None:
    """Whoever has no pin is an emulator thread, the iothread that is pinned is none."""
    me = os.getpid()
    pinned = Pin(tid, CPU, (), iothread="io0")
    wanted = ThreadPlan((pinned,), "affinity", (), None, others=ALL - CPU, emulator=Scheduling("batch", 0))
    wanted = replace(wanted, named=frozenset({tid}))
    found = differences(wanted)
    assert found[0].startswith(f"iothread 'io0' (TID {tid}) may run on CPUs ")
    assert f"the emulator thread {me} may run on CPUs {cpulist.format_cpulist(ALL)}, not only on" in found[1]
    assert f"the emulator thread {me} is scheduled other, not batch" in found
    assert not any(f"thread {tid} " in line for line in found)
    unaided.pin(wanted, me)
    unaided.schedule_all(wanted, Scheduling("batch", 0), me)
    try:
        assert differences(wanted) == []
        assert os.sched_getscheduler(tid) == os.SCHED_OTHER
    finally:
        for other in procfs.tids(me):
            os.sched_setaffinity(other, ALL)
            os.sched_setscheduler(other, os.SCHED_OTHER, os.sched_param(0))


def test_cpu_that_nobody_may_use_is_refused_with_those_one_may() -> None:
    wanted = ThreadPlan((Pin(os.getpid(), frozenset({8000}), (1,)),), "affinity", (), None)
    with pytest.raises(TuningFailed, match=r"^vCPU 1 \(TID [0-9]+\) cannot be put on CPU 8000: Invalid") as caught:
        unaided.pin(wanted, os.getpid())
    assert caught.value.hint == f"CPUs you may use: {cpulist.format_cpulist(ALL)}"


def test_threads_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look finds one more, which has ended by the time that it is to be scheduled."""
    no_tid = itertools.count(1 << 22)  # no TID reaches this
    monkeypatch.setattr(procfs, "tids", lambda pid: (next(no_tid),))
    nobody = ThreadPlan((), None, (), None)
    with pytest.raises(TuningFailed, match=r"^QEMU \(PID 4711\) makes threads faster than they can be") as caught:
        unaided.schedule_all(nobody, Scheduling("batch", 0), 4711)
    assert "leave out emulator_pinning and emulator_scheduler" in (caught.value.hint or "")


@two_cpus
def test_undone_threads_run_where_they_may_by_the_usual_policy(monkeypatch: pytest.MonkeyPatch, tid: int) -> None:
    me = os.getpid()
    os.sched_setaffinity(tid, CPU)
    os.sched_setscheduler(tid, os.SCHED_BATCH, os.sched_param(0))
    assert unaided.undo(me)
    assert (procfs.allowed_cpus(me, tid), os.sched_getscheduler(tid)) == (ALL, os.SCHED_OTHER)
    # Root is allowed to take idle back, so that the kernel's answer is given.
    monkeypatch.setattr(procfs, "scheduling", lambda _: procfs.Scheduling("idle", 0, reset_on_fork=False))
    assert not unaided.undo(me)


def test_policy_priority_and_reset_on_fork_are_all_compared(tid: int) -> None:
    os.sched_setaffinity(tid, CPU)
    assert differences(plan(tid, policy=Scheduling("other", 0))) == []
    assert differences(plan(tid, policy=Scheduling("batch", 0))) == [
        f"vCPU 3 (TID {tid}) is scheduled other, not batch"
    ]
    assert differences(plan(tid, policy=Scheduling("fifo", 1))) == [
        f"vCPU 3 (TID {tid}) is scheduled other, not fifo 1 (reset on fork)"
    ]


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        (procfs.Scheduling("fifo", 1, reset_on_fork=True), ("fifo", 1), True),
        (procfs.Scheduling("fifo", 1, reset_on_fork=False), ("fifo", 1), False),
        (procfs.Scheduling("fifo", 2, reset_on_fork=True), ("fifo", 1), False),
        (procfs.Scheduling("rr", 1, reset_on_fork=True), ("fifo", 1), False),
        (None, ("fifo", 1), False),
        (procfs.Scheduling("batch", 0, reset_on_fork=True), ("batch", 0), True),
    ],
)
def test_real_time_differences(
    monkeypatch: pytest.MonkeyPatch, tid: int, found: procfs.Scheduling | None, wanted: tuple[str, int], same: bool
) -> None:
    """Real-time policies cannot be had here, so the kernel's answer is given."""
    os.sched_setaffinity(tid, CPU)
    monkeypatch.setattr(procfs, "scheduling", lambda _: found)
    assert (differences(plan(tid, "cpuset", Scheduling(*wanted))) == []) is same


def test_real_time_is_looked_for_where_it_was_given(monkeypatch: pytest.MonkeyPatch, tid: int) -> None:
    """No child inherits it: an emulator thread that was made since is not to have it, and one may have ended."""
    me, gone = os.getpid(), 1 << 22
    found = {me: procfs.Scheduling("fifo", 1, reset_on_fork=True), gone: None}
    usual = procfs.Scheduling("other", 0, reset_on_fork=False)
    monkeypatch.setattr(procfs, "scheduling", lambda one: found.get(one, usual))
    wanted = ThreadPlan((), None, (), None, emulator=Scheduling("fifo", 1))
    assert readback.thread_differences(me, wanted, frozenset({me, gone})) == []
    assert readback.thread_differences(me, wanted, frozenset({me, tid})) == [
        f"the emulator thread {tid} is scheduled other, not fifo 1 (reset on fork)"
    ]


def test_memlock_as_granted_and_not() -> None:
    limits = procfs.memlock_limit(os.getpid())
    assert limits is not None
    soft, hard = limits
    assert readback.memlock_differences(os.getpid(), soft, exactly=soft == hard) == []
    for granted in (soft + 4096, soft - 4096):
        (difference,) = readback.memlock_differences(os.getpid(), granted, exactly=True)
        assert difference.startswith(f"QEMU (PID {os.getpid()}) may lock ")
    assert readback.memlock_differences(os.getpid(), soft - 4096, exactly=False) == []
    assert readback.memlock_differences(2**22 + 5, 1, exactly=True) == [
        "the limits of QEMU (PID 4194309) cannot be read"
    ]


# The cgroup tree

SCOPE = "user.slice/user-1000.slice/qemu-launcher-1000-win11.scope"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup mount and a /proc with one QEMU, PID 50: thread 50 in emulator/, thread 51 in vcpus/51."""
    root, proc = tmp_path / "cgroup", tmp_path / "proc"
    for name, state in (("", "member"), ("emulator", "member"), ("vcpus", "isolated"), ("vcpus/51", "member")):
        place = root / SCOPE / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpuset.cpus.partition").write_text(f"{state}\n")
    (root / SCOPE / "cgroup.procs").write_text("50\n52\n")
    (root / SCOPE / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    for path, where in (("50", ""), ("50/task/50", "/emulator"), ("50/task/51", "/vcpus/51"), ("60", None)):
        place = proc / path
        place.mkdir(parents=True, exist_ok=True)
        text = "0::/user.slice/user-1000.slice/session-2.scope\n" if where is None else f"0::/{SCOPE}{where}\n"
        (place / "cgroup").write_text(text)
    monkeypatch.setattr(cgroups, "ROOT", root)
    monkeypatch.setattr(cgroups, "PROC", proc)
    return root / SCOPE


def test_vcpu_in_a_partition_is_shielded_and_an_emulator_thread_is_not(tree: Path) -> None:
    assert cgroups.holds(cgroups.shield_of(50, 51))
    assert not cgroups.holds(cgroups.shield_of(50, 50))
    assert cgroups.shield_of(50, 51) == "isolated"
    assert cgroups.shield_of(50, 50) is None


def test_invalid_partition_shields_nobody_and_says_why(tree: Path) -> None:
    (tree / "vcpus" / "cpuset.cpus.partition").write_text("isolated invalid (Cpu list in cpuset.cpus not exclusive)\n")
    assert not cgroups.holds(cgroups.shield_of(50, 51))
    assert cgroups.shield_of(50, 51) == "isolated invalid (Cpu list in cpuset.cpus not exclusive)"


def test_partition_that_cannot_be_read_is_none(tree: Path) -> None:
    (tree / "vcpus" / "cpuset.cpus.partition").unlink()
    assert cgroups.shield_of(50, 51) is None


def test_scopes_members_and_life(tree: Path) -> None:
    assert list(cgroups.scopes(1000)) == [("win11", tree)]
    assert list(cgroups.scopes(1001)) == []
    assert cgroups.members(tree) == [50, 52]
    assert cgroups.scope_of(50) == tree
    assert cgroups.scope_of(60) is None
    assert cgroups.is_populated(tree)
    (tree / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert not cgroups.is_populated(tree)
    assert not cgroups.is_populated(tree / "gone")


def test_what_is_left_in_a_scope_is_ended(tree: Path) -> None:
    """Real processes, of which the tree says where they are; one has left the scope since the list was read."""
    proc = tree.parents[2].parent / "proc"
    with subprocess.Popen(["sleep", "1000"]) as left, subprocess.Popen(["sleep", "1000"]) as elsewhere:
        try:
            for child, place in (left, "qemu-launcher-1000-win11.scope"), (elsewhere, "session-1.scope"):
                (proc / f"{child.pid}").mkdir()
                (proc / f"{child.pid}/stat").write_text(Path(f"/proc/{child.pid}/stat").read_text())
                (proc / f"{child.pid}/cgroup").write_text(f"0::/user.slice/user-1000.slice/{place}\n")
            (tree / "cgroup.procs").write_text(f"{left.pid}\n{elsewhere.pid}\n")
            cgroups.end_members(tree)
            assert left.wait(30) == -signal.SIGKILL
            assert elsewhere.poll() is None
        finally:
            left.kill()
            elsewhere.kill()
    cgroups.end_members(tree / "gone")


def test_the_scope_of_a_vm_that_a_system_service_has_started(tree: Path) -> None:
    """`services` of qemu-launcher-helper.toml(5): it stays in system.slice."""
    root = tree.parents[2]
    scope = root / "system.slice/qemu-launcher-1000-old.scope"
    scope.mkdir(parents=True)
    assert list(cgroups.scopes(1000)) == [("win11", tree), ("old", scope)]
    assert cgroups.has_scope(1000, "old")


def test_only_what_is_right_below_the_slice_is_a_scope_of_ours(tree: Path) -> None:
    """The helper makes none deeper, where users may make groups of any name."""
    (tree.parent / "user@1000.service/app.slice/qemu-launcher-1000-old.scope").mkdir(parents=True)
    assert list(cgroups.scopes(1000)) == [("win11", tree)]


def test_a_group_that_vanishes_while_it_is_looked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slice that was listed a moment ago: nothing is in it, and what is elsewhere is found all the same."""
    root = tree.parents[2]
    slices = [root / f"qemu.slice/qemu-{uid}.slice" for uid in (1000, 1001, 1002)]
    for one in slices:
        (one / "qemu-launcher-1000-old.scope").mkdir(parents=True)
        (one / "qemu-launcher-1000-old.scope/cpuset.cpus.effective").write_text("4\n")
    scope, really = root / "elsewhere.scope", os.scandir
    (scope / "vcpus").mkdir(parents=True)
    for name in ("cpuset.cpus", "cpuset.cpus.effective"):
        (scope / "vcpus" / name).write_text("4\n")

    def scandir(place: Any) -> Any:
        for name in ("user.slice/user-1000.slice", "qemu.slice/qemu-1001.slice"):
            if place == os.fspath(root / name):  # not a descriptor, as rmtree uses it
                shutil.rmtree(place)
        return really(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert list(cgroups.scopes(1000)) == [("old", slices[0] / "qemu-launcher-1000-old.scope")]
    assert not tree.exists()
    assert cgroups._pool_of(scope) == "pool invalid (qemu-launcher-1000-old.scope may use CPUs 4)"
    assert not slices[1].exists()


@pytest.mark.parametrize(
    ("make", "seen"),
    [
        ((), False),  # no hierarchy that could have scopes, as in a container
        (("cgroup.controllers",), True),
        (("unified/cgroup.controllers",), True),
        (("systemd/user.slice/",), True),
    ],
)
def test_a_scope_may_be_where_there_is_nothing_to_look_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: tuple[str, ...], seen: bool
) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    assert cgroups.has_scope(1000, "win11") is not seen


def test_a_scope_at_the_top_without_systemd(tree: Path) -> None:
    root = tree.parents[2]
    scope = root / "qemu-launcher-1000-old.scope"
    scope.mkdir()
    assert list(cgroups.scopes(1000)) == [("win11", tree), ("old", scope)]
    (root.parent / "proc/70").mkdir(parents=True)
    (root.parent / "proc/70/cgroup").write_text("0::/qemu-launcher-1000-old.scope/emulator\n")
    assert cgroups.scope_of(70) == scope


def test_hybrid_hierarchy_without_systemd(tree: Path) -> None:
    """Nobody need have made user.slice in it."""
    root = tree.parents[2]
    scope = root / "unified/qemu-launcher-1000-old.scope"
    scope.mkdir(parents=True)
    (root / "unified/cgroup.controllers").write_text("\n")
    assert list(cgroups.scopes(1000)) == [("old", scope)]


@pytest.mark.parametrize("systemd", [True, False])
def test_who_sees_a_scope_end(tree: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool) -> None:
    monkeypatch.setattr(absence, "has_systemd", lambda: systemd)
    assert not cgroups.ends_by_itself(tree), "something lives in it"
    (tree / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert cgroups.ends_by_itself(tree) is systemd


def test_pool_shields_as_long_as_everybody_else_leaves_the_cpus(tree: Path) -> None:
    root = tree.parents[2]
    scope = root / "qemu.slice/qemu-1000.slice/qemu-launcher-1000-old.scope"

    def write(group: Path, cpus: str) -> None:
        group.mkdir(parents=True, exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.cpus.effective"):
            (group / name).write_text(f"{cpus}\n")

    for group, cpus in ((scope, "0-7"), (scope / "vcpus", "4-5"), (root / "qemu.slice", "0-7")):
        write(group, cpus)
    for name in ("user.slice", "system.slice", "init.scope"):
        write(root / name, "0-3,6-7")
    place = root.parent / "proc/70/task/71"
    place.mkdir(parents=True)
    inside = f"/{scope.relative_to(root)}/vcpus/71"
    (place / "cgroup").write_text(f"0::{inside}\n")
    assert cgroups.shield_of(70, 71) == "pool"
    assert cgroups.holds(cgroups.shield_of(70, 71))
    assert list(cgroups.scopes(1000)) == [("win11", tree), ("old", scope)]

    write(root / "dev-mqueue.mount", "0-7")
    (root / "dev-mqueue.mount/cgroup.events").write_text("populated 0\nfrozen 0\n")
    assert cgroups.shield_of(70, 71) == "pool", "nobody is in there"

    write(root / "system.slice", "0-4")
    (root / "system.slice/cgroup.events").write_text("populated 1\nfrozen 0\n")
    assert cgroups.shield_of(70, 71) == "pool invalid (system.slice may use CPUs 4)"
    assert not cgroups.holds(cgroups.shield_of(70, 71))
    write(root / "system.slice", "0-3")
    write(scope.with_name("qemu-launcher-1000-other.scope"), "5-7")
    assert cgroups.shield_of(70, 71) == "pool invalid (qemu-launcher-1000-other.scope may use CPUs 5)"
    (scope / "vcpus/cpuset.cpus.effective").write_text("5\n")
    assert cgroups.shield_of(70, 71) == "pool invalid (CPUs 4 are offline or taken)"
    (place / "cgroup").write_text(f"0::{inside.replace('vcpus/71', 'pool/pinned/71')}\n")
    assert cgroups.shield_of(70, 71) is None


def test_v1_shields_as_long_as_every_other_cpuset_leaves_the_cpus(tree: Path) -> None:
    root, proc = tree.parents[2], tree.parents[3] / "proc"
    mount, units = root.parent / "cpusets", root / "systemd"
    scope = units / SCOPE.replace("win11", "old")
    scope.mkdir(parents=True)
    (scope / "cgroup.procs").write_text("70\n")

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    lines = [f"30 1 0:26 / {units} rw shared:9 - cgroup cgroup rw,xattr,name=systemd"]
    lines += [f"31 1 0:27 / {root}/cpu rw - cgroup cgroup rw,cpu", f"32 1 0:28 / {mount} rw - cgroup cgroup rw,cpuset"]
    write(proc / "self/mountinfo", "\n".join(lines))
    for group, cpus in (("", "0-7"), ("qemu-launcher", "0-7"), ("qemu-launcher/4", "4"), ("qemu-launcher/pool", "0-3")):
        write(mount / group / "cpuset.cpus", cpus)
    for path in ("70", "70/task/71"):
        write(proc / path / "cgroup", f"12:cpuset:/qemu-launcher/4\n1:name=systemd:/{scope.relative_to(units)}\n0::/")
    write(proc / "70/task/71/cpuset", "/qemu-launcher/4")
    assert cgroups.shield_of(70, 71) == "cpuset-v1"
    assert cgroups.holds(cgroups.shield_of(70, 71))
    assert cgroups.scope_of(70) == scope
    assert list(cgroups.scopes(1000)) == [("old", scope)]
    assert cgroups.is_populated(scope)

    write(mount / "docker/cpuset.cpus", "4-5")
    assert cgroups.shield_of(70, 71) == "cpuset-v1 invalid (docker may use CPUs 4)"
    write(mount / "docker/cpuset.cpus", "5")
    write(mount / "qemu-launcher/pool/cpuset.cpus", "0-7")
    assert cgroups.shield_of(70, 71) == "cpuset-v1 invalid (pool may use CPUs 4)"
    write(mount / "qemu-launcher/4/cpuset.cpus", "")
    assert cgroups.shield_of(70, 71) == "cpuset-v1 invalid (CPUs 4 are offline or taken)"
    write(proc / "70/task/71/cpuset", "/qemu-launcher/pool/qemu-launcher-1000-old.scope/1")
    assert cgroups.shield_of(70, 71) is None
    write(scope / "cgroup.procs", "")
    assert not cgroups.is_populated(scope)


@pytest.mark.parametrize(("text", "path"), UNIT_LINES)
def test_which_line_names_the_unit(text: str, path: str) -> None:
    assert cgroups.unit_path(text) == path
