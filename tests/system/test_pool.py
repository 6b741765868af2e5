"""Shields where the kernel has no partitions: every other group of the host leaves the CPUs, and gets back what it had.

Differences to partitions are asserted, not passed over: where the scope is, what becomes of an administrator's
AllowedCPUs=, and what is not kept away (the kernel's own threads, and a new group until the helper's next start).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import pytest

from system import host
from system.claims import Claimant, end
from system.fixtures import start_helper, stop_helper
from system.people import User

pytestmark = pytest.mark.hosts("bookworm", more=("linux-6.8",), why="it is about kernels that have no partitions")

ALL = frozenset(range(8))


def said(group: str) -> str:
    """What was written into a group's list of CPUs, by whomever; "" where nothing was."""
    path = host.CGROUP / group / "cpuset.cpus"
    return path.read_text().strip() if path.exists() else ""


def everybody() -> dict[str, frozenset[int]]:
    """What each group of the host may use."""
    return {group.name: host.effective(group) for group in host.groups() if host.effective(group)}


@pytest.fixture
def allowed() -> Iterator[Callable[[str, str], None]]:
    """Sets AllowedCPUs= of a unit as an administrator does; all is as before in the end."""
    units = set()

    def change(unit: str, cpus: str) -> None:
        units.add(unit)
        subprocess.run(["systemctl", "set-property", "--runtime", unit, f"AllowedCPUs={cpus}"], check=True)

    yield change
    for unit in units:
        change(unit, "0-7")  # what was set last stays in force when it is set to nothing
        subprocess.run(["systemctl", "revert", unit], check=True, capture_output=True)


def test_where_everything_is(program: Claimant) -> None:
    assert host.mechanism() == "pool"
    child = program.spawn(3)
    pins = [[child.tids[0], [4], True], [child.tids[1], [5], True], [child.tids[2], [1], False]]
    assert program.call("PinThreads", "usa(uaub)au", child.pid, "vm", pins, [2]).error == "ok"
    scope = host.scope_of(program.user.uid, "vm")
    assert not scope.is_relative_to(program.user.slice)
    for place, tid, cpu in (("vcpus", 0, 4), ("vcpus", 1, 5), ("pool/pinned", 2, 1)):
        assert host.cgroup(child.pid, child.tids[tid]) == scope / place / str(child.tids[tid])
        assert host.cpus_of(child.pid, child.tids[tid]) == {cpu}
    assert host.cgroup(child.pid, child.pid) == host.emulator_of(scope)
    assert host.cpus_of(child.pid) == {2}
    assert {*everybody().values()} == {ALL - {4, 5}}
    assert {"init.scope", "system.slice", "user.slice"} <= everybody().keys()

    # The kernel's own threads are in no group that could leave the CPUs; everybody else has left.
    kernels = [thread for thread in host.threads() if thread.of_kernel and not thread.belongs_to_its_cpu]
    assert [thread for thread in kernels if 4 in thread.cpus]
    assert host.trespassers({4, 5}, child.tids[:2], since=0) == []
    end(program, child)
    assert {*everybody().values()} == {ALL}


def test_tasks_of_a_users_vms_are_limited(program: Claimant) -> None:
    """His slice's limit on tasks, systemd's against fork bombs, does not reach there: it has one of its own."""
    child = program.spawn(1)
    assert program.pin(child, "vm", 4).error == "ok"
    vms = host.scope_of(program.user.uid, "vm").parent
    assert (vms / "pids.max").read_text() == (program.user.slice / "pids.max").read_text() != "max\n"
    end(program, child)


def test_what_an_administrator_allows_is_merged_and_comes_back(
    program: Claimant, allowed: Callable[[str, str], None]
) -> None:
    allowed("system.slice", "0-5")
    allowed("user.slice", "0-6")
    before = {group: said(group) for group in ("system.slice", "user.slice")}
    assert before == {"system.slice": "0-5", "user.slice": "0-6"}
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    expected = {"system.slice": {0, 1, 2, 3}, "user.slice": {0, 1, 2, 3, 6}, "init.scope": {0, 1, 2, 3, 6, 7}}

    def placed() -> tuple[object, ...]:
        groups = {group: everybody()[group] for group in expected}
        return groups, host.born_of_pid_1(), [host.cpus_of(child.pid, tid) for tid in child.tids]

    merged = (expected, {0, 1, 2, 3}, [{4}, {5}])

    def merged_by_the_helper() -> bool:
        assert program.call("GetLimits", "").error == "ok"
        return placed() == merged

    assert placed() == merged
    for command in ("daemon-reload", "daemon-reexec"):
        subprocess.run(["systemctl", command], check=True)
        # systemd writes again what it was told. A group of which it was told nothing keeps what the helper has written.
        assert everybody()["init.scope"] == expected["init.scope"]
        assert everybody()["system.slice"] in (expected["system.slice"], {0, 1, 2, 3, 4, 5})
        # systemd may write once more a moment after its command has returned.
        host.wait_for("the helper has taken the CPUs out again", merged_by_the_helper)
    end(program, child)
    assert {group: said(group) for group in before} == before


def test_a_change_while_a_vm_runs_counts_at_the_helpers_next_start(
    program: Claimant, allowed: Callable[[str, str], None]
) -> None:
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    stop_helper()
    allowed("system.slice", "0-6")
    assert everybody()["system.slice"] == {0, 1, 2, 3, 4, 5, 6}, "systemd has opened the shield"
    start_helper()
    assert everybody()["system.slice"] == {0, 1, 2, 3, 6}
    assert host.isolated() == {4, 5}
    end(program, child)
    assert said("system.slice") == "0-6", "the new word, not the one from before the VM"


def test_a_group_that_comes_later_leaves_the_cpus_at_the_helpers_next_start(program: Claimant) -> None:
    child = program.spawn(2)
    assert program.pin(child, "vm", 4, 5).error == "ok"
    command = ["systemd-run", "--quiet", "--collect", "--slice=later.slice", "--unit=later", "sleep", "infinity"]
    subprocess.run(command, check=True)
    try:
        assert everybody()["later.slice"] == ALL, "this much the documentation concedes"
        assert program.call("GetLimits", "").error == "ok"
        assert everybody()["later.slice"] == ALL - {4, 5}
        end(program, child)
        assert everybody()["later.slice"] == ALL
    finally:
        subprocess.run(["systemctl", "stop", "later.service", "later.slice"], check=True)


def test_cpus_that_are_all_that_a_group_has(program: Claimant, allowed: Callable[[str, str], None]) -> None:
    allowed("system.slice", "4-5")
    child = program.spawn(2)
    before = everybody()
    refused = program.pin(child, "vm", 4, 5)
    assert refused.error == "Conflict", refused
    assert "CPUs 4-5 are all that AllowedCPUs= leaves to 'system.slice'" in refused.text
    assert everybody() == before
    assert program.pin(child, "vm", 6, 7).error == "ok"
    assert everybody()["system.slice"] == {4, 5}
    end(program, child)
    assert said("system.slice") == "4-5"


def test_a_partition_of_an_administrators_stays_one(program: Claimant, allowed: Callable[[str, str], None]) -> None:
    """The kernel would end it, without an error, if a group beside it got a list with its CPUs."""
    for unit in ("init.scope", "system.slice", "user.slice"):
        allowed(unit, "0-1,4-7")
    empty = {path.name for path in host.CGROUP.glob("*/")} - {group.name for group in host.groups()}
    for name in empty:  # those of mounts, which an earlier VM has left all CPUs
        (host.CGROUP / name / "cpuset.cpus").write_text("\n")
    own = host.CGROUP / "rt"
    own.mkdir()
    (own / "cpuset.cpus").write_text("2-3")
    (own / "cpuset.cpus.partition").write_text("isolated")

    def stands() -> bool:
        return (own / "cpuset.cpus.partition").read_text() == "isolated\n"

    try:
        assert stands()
        child = program.spawn(2)
        assert program.pin(child, "vm", 4, 5).error == "ok"
        assert (said("user.slice"), stands()) == ("0-1,6-7", True)
        end(program, child)
        assert (said("user.slice"), stands()) == ("0-1,4-7", True)
        answer = program.pin(program.spawn(1), "vm", 2)
        assert answer == ("Conflict", ["CPUs 2-3 are those of a partition that others have made"])
        assert stands()
    finally:
        (own / "cpuset.cpus.partition").write_text("member")
        own.rmdir()


@pytest.mark.parametrize("ends", [("hers", "others"), ("others", "hers")], ids=" before ".join)
def test_two_vms_of_two_users_in_any_order(program: Claimant, carol: User, ends: tuple[str, str]) -> None:
    """Hers is started first. What is left when one has ended is the other's shield, whole."""
    cpus = {"hers": (4, 5), "others": (6, 7)}
    with Claimant(carol) as other:
        programs = {"hers": program, "others": other}
        children = {who: programs[who].spawn(2) for who in cpus}
        for who, child in children.items():
            assert programs[who].pin(child, "vm", *cpus[who]).error == "ok"
        assert host.isolated() == {4, 5, 6, 7}

        def expect_pinned(who: str) -> None:
            child, scope = children[who], host.scope_of(programs[who].user.uid, "vm")
            assert [host.cpus_of(child.pid, tid) for tid in child.tids] == [{cpu} for cpu in cpus[who]]
            assert host.cpus_of(child.pid) == host.effective(scope / "pool") == host.online() - host.isolated()

        for who in cpus:
            expect_pinned(who)
        first, second = ends
        end(programs[first], children[first])
        assert host.isolated() == {*cpus[second]}
        expect_pinned(second)
        end(programs[second], children[second])
        host.wait_until_as_before()
