"""Killed, deserted, deceived: after the helper's next start there is no shield without a VM, and no half-tuned VM.

A helper that kills itself at a step (stepping_helper.py), and users who move their processes out of their scopes by
systemd's AttachProcessesToUnit (qemu-launcher-helper(8), WHAT IT DOES NOT PROTECT).
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from system import host
from system.claims import Child, Claimant
from system.fixtures import DESKTOP_RTTIME, start_helper, stop_helper
from system.people import User
from system.stepping import Stepping
from system.vms import HELPER_UNIT, define, refused

pytestmark = pytest.mark.hosts("trixie", "bookworm", why="it is what each mechanism is there for")

# A step of stepping_helper.py, and the call that leads to it.
STEPS = [
    ("record", "memlock"),
    ("scope", "memlock"),
    ("limit", "memlock"),
    ("Memlock", "memlock"),
    ("record", "pin"),
    ("scope", "pin"),
    ("settle", "pin"),
    ("shield", "pin"),
    ("sweep", "pin"),
    ("pinned", "pin"),
    ("Pin", "pin"),
    ("record", "schedule"),
    ("limit", "schedule"),
    ("one thread", "schedule"),
    ("scheduled", "schedule"),
    ("Scheduler", "schedule"),
]


def limits_of(child: Child) -> dict[str, tuple[int, int]]:
    """The limits that grants change."""
    return {name: host.limit(child.pid, name) for name in ("Max locked memory", "Max realtime timeout")}


def expect_sound(child: Child, before: dict[str, tuple[int, int]]) -> None:
    """No thread is real-time but alone on a shielded CPU of its own; what is shielded, nobody else may run on.

    A limit is what it was `before`, or there is a record of a finished grant that says so, from which it is put back.
    A shield in which the child's threads are not yet is sound: it is within the user's limits, and has an owner.
    """
    record: dict[str, Any] = {"settled": False}
    for path in host.GRANTS.glob("*-vm"):
        record = json.loads(path.read_text())
    now = limits_of(child)
    for name, key in ("Max locked memory", "memlock_before"), ("Max realtime timeout", "rttime_before"):
        assert now[name] == before[name] or (record["settled"] and tuple(record[key]) == before[name]), (now, record)
    shielded = {tid for tid in child.tids if host.cpus_of(child.pid, tid) <= host.isolated()}
    assert host.realtime_threads() <= shielded
    assert host.isolated() in (frozenset(), frozenset({4, 5}))
    assert host.cpus_of(1) == host.online() - host.isolated()
    assert host.trespassers(host.isolated(), child.tids, since=host.born(child.pid)) == []


@pytest.mark.parametrize(("step", "during"), STEPS)
def test_a17_killed_between_two_steps(program: Claimant, stepping: Stepping, step: str, during: str) -> None:
    child = program.spawn(2)
    before = limits_of(child)
    assert before["Max realtime timeout"] == DESKTOP_RTTIME
    calls: dict[str, Callable[[], object]] = {
        "memlock": lambda: program.set_memlock(child, "vm", 64 << 20),
        "pin": lambda: program.pin(child, "vm", 4, 5),
        "schedule": lambda: program.schedule(child, "vm", "fifo", 1),
    }
    if during == "schedule":
        assert program.pin(child, "vm", 4, 5).error == "ok"
    stepping.kill_at(step)
    calls[during]()
    assert stepping.obeyed, "the step was never reached"
    start_helper()  # systemd has done so by itself (Restart=on-failure); this waits until it is there
    expect_sound(child, before)
    program.end(child.pid)
    program.call("GetLimits", "")  # any call cleans up first; so does the helper when it leaves, but 15 s later
    host.wait_until_as_before()


@pytest.mark.parametrize("step", ["record", "before move", "pinned"])
def test_a17_killed_while_two_threads_change_places(program: Claimant, stepping: Stepping, step: str) -> None:
    """The same CPUs, but not the same map: half of it must not be taken for what was granted before."""
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    stepping.kill_at(step)
    program.pin(child, "vm", 5, 4)
    assert stepping.obeyed
    start_helper()
    assert program.schedule(child, "vm", "fifo", 1).error == "TargetRefused"
    assert host.isolated() == frozenset()
    assert host.realtime_threads() == set()


def test_a17_dead_but_not_reaped_when_systemd_moves_it(program: Claimant, stepping: Stepping) -> None:
    """systemd takes the scope of such a process for running, with nobody in it. It goes, and its name is free again."""
    child = program.spawn(2)
    with stepping.halted_at("before scope") as halt:
        program.begin("PinThreads", "usa(uaub)au", child.pid, "vm", [[tid, [4], True] for tid in child.tids[:1]], [])
        host.wait_for("the helper stands still", lambda: halt.reached)
        os.kill(child.pid, signal.SIGKILL)
        host.wait_for("the VM has ended", lambda: not host.is_alive(child.pid))
    assert program.finish().error == "TargetRefused"
    program.end(child.pid)
    host.wait_until_as_before()
    assert program.pin(program.spawn(2), "vm", 4, 5).error == "ok"
    assert host.isolated() == {4, 5}


def test_a_launcher_whose_helper_dies_starts_no_guest(alice: User, stepping: Stepping) -> None:
    define(alice, "orphaned", {"vcpu_pinning": [4, 5], "scheduler": "fifo", "priority": 1}, cpus=2)
    stepping.kill_at("Pin")
    status, words = refused(alice, "orphaned")
    assert status == 1
    assert stepping.obeyed
    assert "qemu-launcher-helper ended without an answer" in words
    assert "qemu-launcher run --untuned orphaned" in words


def test_a17_killed_while_it_has_nothing_to_do(program: Claimant) -> None:
    """Six times, more often than systemd's default start limit would forgive; the VM and its owner do not notice.

    The limit is looked at too: six starts may take longer than the 10 s in which the default one counts them.
    """
    shown = ["systemctl", "show", "--property=StartLimitIntervalUSec", "--value", HELPER_UNIT]
    assert subprocess.run(shown, check=True, capture_output=True, text=True).stdout.strip() == "0"
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    for _ in range(6):
        subprocess.run(["systemctl", "kill", "--signal=SIGKILL", HELPER_UNIT], check=True)
        start_helper()
    assert host.isolated() == {4, 5}
    assert host.realtime_threads() == set(child.tids)
    assert program.call("GetLimits", "").error == "ok"


def test_a_shield_without_a_record_ends_with_its_real_time(program: Claimant) -> None:
    """As after a purge and a new installation under a running VM: nobody knows any more whom the CPUs were for."""
    child = program.spawn(2)
    before = limits_of(child)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    # Whatever the limit on real time was, nobody knows it any more; it is harmless without real time.
    before["Max realtime timeout"] = limits_of(child)["Max realtime timeout"]
    stop_helper()
    (host.GRANTS / f"{program.user.uid}-vm").unlink()
    start_helper()
    expect_sound(child, before)
    assert host.realtime_threads() == set()


def leave_scope(program: Claimant, *pids: int) -> None:
    """Have systemd move one's own processes into one's own service manager, which it lets every user do."""
    moved = program.manager("AttachProcessesToUnit", "ssau", f"user@{program.user.uid}.service", "/init.scope", pids)
    assert moved.error == "ok", moved


@pytest.mark.parametrize("helper_is_there", [False, True])
def test_a19_leaving_the_scope_leaves_all_grants_behind(program: Claimant, helper_is_there: bool) -> None:
    child = program.spawn(2)
    before = host.limit(child.pid, "Max locked memory")
    assert program.set_memlock(child, "vm", 64 << 20).error == "ok"
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    assert host.realtime_threads() == set(child.tids)
    assert host.limit(child.pid, "Max locked memory") == (64 << 20, 64 << 20)
    if not helper_is_there:
        stop_helper()
    leave_scope(program, child.pid)
    host.wait_for("real time is taken from her", lambda: host.realtime_threads() == set())
    host.wait_for("the CPUs are back", lambda: host.isolated() == frozenset())
    host.wait_for("PID 1 may use them", lambda: host.cpus_of(1) == host.online())
    host.wait_for("the memory lock is as before", lambda: host.limit(child.pid, "Max locked memory") == before)
    assert host.is_alive(child.pid), "nobody is killed for it"

    # What left keeps counting as hers, and gets nothing again.
    assert program.schedule(child, "vm", "fifo", 1).error == "TargetRefused"
    assert program.pin(child, "vm", 4, 5).error == "TargetRefused"
    assert host.isolated() == frozenset()


def test_a19_a_decoy_left_in_the_scope_only_delays_that(program: Claimant) -> None:
    """The scope lives on with a grandchild in it, so systemd starts nobody; the helper's next run is what counts."""
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    assert program.schedule(child, "vm", "fifo", 1).error == "ok"
    [decoy] = program.tell(child, "fork", count=1, lock=0)["pids"]
    assert host.scopes().intersection(host.cgroup(decoy).parts), "born inside"
    stop_helper()
    leave_scope(program, child.pid)
    assert host.scopes().intersection(host.cgroup(decoy).parts)
    assert host.realtime_threads() == set(child.tids), "this much the documentation concedes"
    assert host.isolated() == {4, 5}
    start_helper()
    assert host.realtime_threads() == set()
    assert host.isolated() == frozenset()
    assert host.cpus_of(1) == host.online()


def test_real_time_lifts_its_brake_only_while_it_lasts(program: Claimant) -> None:
    child = program.spawn(2)
    before = limits_of(child)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    for policy, priority, lifted in ("fifo", 1, True), ("other", 0, False), ("rr", 1, True):
        assert program.schedule(child, "vm", policy, priority).error == "ok"
        now = (host.INFINITY, host.INFINITY) if lifted else DESKTOP_RTTIME
        assert limits_of(child) == before | {"Max realtime timeout": now}
    assert program.call("Release", "us", program.user.uid, "vm").error == "ok"
    assert limits_of(child) == before
    assert host.realtime_threads() == set()
    assert host.isolated() == frozenset()


def test_a19_nobody_else_can_move_her_processes(program: Claimant, carol: User) -> None:
    child = program.spawn(1)
    assert program.pin(child, "vm", 4).error == "ok"
    carol.login.run("true", check=True)
    with Claimant(carol) as other:
        unit = f"user@{carol.uid}.service"
        moved = other.manager("AttachProcessesToUnit", "ssau", unit, "/init.scope", [child.pid])
        assert moved.error in ("AccessDenied", "InteractiveAuthorizationRequired"), moved
        leave_scope(other, other.spawn(0).pid)  # with a process of her own she can
    assert host.isolated() == {4, 5}
