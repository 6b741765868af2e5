"""reconcile: a real process, a /proc that says of it what the test wants, and a cgroup tree without a kernel behind it.

What the kernel makes of it is in tests/system/test_crash_only.py.
"""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qemu_launcher_helper import records, target
from qemu_launcher_helper.cpuset.partition import Partition
from qemu_launcher_helper.records import Record, reconcile
from unit.alone import alone, descriptors
from unit.proc_facts import Facts

SCOPE = "/user.slice/user-1000.slice/qemu-launcher-1000-win11.scope"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "GRANTS", tmp_path / "grants")
    monkeypatch.setattr(records, "MECHANISM", Partition(tmp_path / "cgroup"))
    monkeypatch.setattr(target, "PROC", tmp_path / "proc")
    (tmp_path / "proc").mkdir()
    return tmp_path


@pytest.fixture
def facts(places: Path) -> Iterator[Facts]:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        found = Facts(places / "proc", process.pid)
        found.write("cgroup", f"0::{SCOPE}/emulator\n")
        yield found
        process.kill()


@pytest.fixture
def record(facts: Facts) -> Record:
    """A settled grant of memory, which has nothing to do with a shield."""
    with target.Target(facts.pid) as process:
        return Record(1000, "win11", facts.pid, process.start_time, SCOPE, memlock=4096, settled=True)


def left() -> list[Record]:
    """What reconcile returns, which is also what it leaves on disk."""
    live = reconcile()
    assert live == list(records.read_all())
    return live


def test_what_is_where_it_was_put_stays(record: Record) -> None:
    record.write()
    assert left() == [record]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.write("cgroup", "0::/user.slice/user-1000.slice/user@1000.service/init.scope\n"),
        lambda facts: facts.write("cgroup", f"0::{SCOPE}2/emulator\n"),
        # Its threads may be anywhere by now: the first one names its old cgroup for ever.
        lambda facts: facts.say(State="Z (zombie)"),
        # A name may hold any byte but a newline, and none of them begins a line of ours.
        lambda facts: facts.write("cgroup", f"1:name=systemd:/x\x0b0::{SCOPE}\n0::/elsewhere\n"),
    ],
    ids=["left", "a longer name", "first thread ended", "forged line"],
)
def test_a_stray_keeps_nothing_and_keeps_counting(
    record: Record, facts: Facts, change: Callable[[Facts], None]
) -> None:
    held = record._replace(pinned=frozenset({4, 5}))
    held.write()
    change(facts)
    assert left() == [held._replace(stray=True)]
    assert left() == [held._replace(stray=True)], "and stays one"
    # Its owner gives it back: the CPUs are free; what was locked may still be, until the process ends.
    assert reconcile(release=record.key) == [record]


def test_what_nobody_lived_to_finish_is_taken_back(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    half = record._replace(settled=False, pinned=frozenset({4}))
    half.write()
    monkeypatch.setattr(records, "PENDING", {half.key})
    assert left() == [half], "unless it is just being done"
    monkeypatch.setattr(records, "PENDING", set())
    assert [one.stray for one in left()] == [True]


def test_a_claim_that_is_just_being_made_stops_no_other(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CPUs may be a partition's of the administrator's: the kernel would refuse them, and with them all others'.

    systemd makes a scope within a fraction of a second; but up to half a minute while a session resists its end.
    """
    settled = dict[str, frozenset[int]]()
    monkeypatch.setattr(Partition, "settle", lambda _, live: settled.update(live))
    pending = record._replace(settled=False, shielded=frozenset({6, 7}))
    pending.write()
    monkeypatch.setattr(records, "PENDING", {pending.key})
    assert left() == [pending]
    assert settled == {}
    records.settle([record._replace(vm="other", scope="/other", shielded=frozenset({4})), pending])
    assert settled == {"/other": {4}}


@pytest.mark.parametrize("spare", range(6))
def test_where_no_file_can_be_opened_nothing_is_taken_for_ended(
    record: Record, places: Path, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Any user can fill the host's table of open files, where its limit is low, and others' VMs must not end of it."""
    scope = places / "cgroup" / SCOPE[1:]
    for group, file, text in [
        (scope, "cgroup.kill", ""),
        (scope / "vcpus", "cpuset.cpus.partition", "isolated\n"),
        (scope / "vcpus", "cpuset.cpus.exclusive.effective", "4-5\n"),
    ]:
        group.mkdir(parents=True, exist_ok=True)
        (group / file).write_text(text)
    monkeypatch.setattr(Partition, "settle", lambda *_: None)
    held = record._replace(shielded=frozenset({4, 5}))
    held.write()

    def act() -> None:
        before = descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, hard))
        try:
            with suppress(OSError):  # EMFILE: no descriptor is left
                assert reconcile() == [held]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert descriptors() == before
        assert list(records.read_all()) == [held]
        assert (scope / "cgroup.kill").read_text() == ""

    alone(act)


def test_all_vms_have_the_same_time_to_give_back_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that do not end, or are born while they are moved, keep the others waiting once, not once for each VM."""
    ends = dict[str, float]()
    monkeypatch.setattr(Partition, "withdraw", lambda _, scope, end: ends.update({scope: end}))
    monkeypatch.setattr(Partition, "orphans", lambda *_: ["/orphan"])
    monkeypatch.setattr(Partition, "take_realtime", lambda *_: None)
    for number in range(3):
        Record(1000, f"vm{number}", 2**22 + 1, 1, f"/vm{number}", shielded=frozenset({number})).write()
    began = time.monotonic()
    assert reconcile() == []
    assert ends.keys() == {"/vm0", "/vm1", "/vm2", "/orphan"}
    assert len({*ends.values()}) == 1
    assert began < ends["/orphan"] < time.monotonic() + 2


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("step", ["take_realtime", "rlimit", "withdraw"])
def test_what_could_not_be_taken_back_is_tried_again(
    record: Record, facts: Facts, monkeypatch: pytest.MonkeyPatch, step: str, *, release: bool
) -> None:
    """Nothing is forgotten over it: neither the limit that was, nor that there may be a shield."""
    held = record._replace(
        shielded=frozenset({4, 5}), realtime=(facts.pid,), rttime_before=(-1, -1), memlock_before=(4096, 4096)
    )
    held.write()
    facts.write("cgroup", "0::/elsewhere\n")
    failing = [True]
    taken: dict[str, list[object]] = {"take_realtime": [], "rlimit": [], "withdraw": []}

    def acting(name: str) -> Callable[..., tuple[int, int]]:
        def act(*arguments: object) -> tuple[int, int]:
            if name == step and failing:
                raise OSError(16, "busy")
            taken[name].append(arguments[1:])
            return -1, -1

        return act

    monkeypatch.setattr(Partition, "withdraw", acting("withdraw"))
    monkeypatch.setattr(target.Target, "take_realtime", acting("take_realtime"))
    monkeypatch.setattr(target.Target, "rlimit", acting("rlimit"))
    [left] = reconcile(release=held.key if release else None)
    assert not left.settled
    assert taken[step] == []
    failing.clear()
    [left] = reconcile()
    assert taken[step]
    back = held._replace(realtime=(), rttime_before=None, memlock_before=None)
    assert left == back._replace(stray=True, shielded=left.shielded)
    [again] = reconcile()
    assert again == left


def test_a_process_that_ended_leaves_nothing(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PENDING", {record.key})
    record._replace(start_time=record.start_time - 1).write()
    assert left() == []


@pytest.mark.parametrize("error", [OSError(16, "busy"), RecursionError("busy"), MemoryError("busy")])
def test_one_vm_that_cannot_be_cleaned_up_keeps_no_other_from_it(
    error: Exception,
    record: Record,
    facts: Facts,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts.write("cgroup", "0::/elsewhere\n")
    record._replace(vm="a").write()
    record._replace(vm="b").write()
    for name in ("first", "second"):
        vcpus = places / f"cgroup/user.slice/user-1000.slice/qemu-launcher-1000-{name}.scope/vcpus"
        vcpus.mkdir(parents=True)
        (vcpus / "cpuset.cpus.partition").write_text("isolated\n")
    tried, settled = list[str](), list[object]()

    def stubborn(self: Partition, scope: str, _end: float) -> None:
        tried.append(scope.rpartition("-")[2])
        if len(tried) in (1, 3):
            raise error

    monkeypatch.setattr(Partition, "withdraw", stubborn)
    monkeypatch.setattr(Partition, "processes", lambda self, scope: [])
    monkeypatch.setattr(Partition, "settle", lambda self, live: settled.append(live))
    assert [one.stray for one in reconcile()] == [True, True]
    assert sorted(tried) == ["first.scope", "second.scope", "win11.scope", "win11.scope"]
    assert len(settled) == 1
    assert "busy" in caplog.text


def test_a_full_disk_keeps_nobody_from_being_cleaned_up(
    record: Record, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    record.write()
    facts.write("cgroup", "0::/elsewhere\n")

    def full(self: Record) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Record, "write", full)
    assert [one.stray for one in reconcile()] == [True]


def test_a_scope_that_ends_while_it_is_looked_at_has_no_shield(places: Path) -> None:
    vcpus = places / f"cgroup{SCOPE}/vcpus"
    (vcpus / "4711").mkdir(parents=True)
    (vcpus / "cpuset.cpus.partition").write_text("isolated\n")
    (vcpus / "cpuset.cpus.exclusive.effective").write_text("4-5\n")
    assert records.MECHANISM.shielded_threads(SCOPE) is None, "the folder of the thread is empty already"
    for name in ("cpuset.cpus", "cpuset.cpus.effective"):
        (vcpus / "4711" / name).write_text("4\n")
    (vcpus / "4711/cgroup.threads").write_text("4711\n")
    assert records.MECHANISM.shielded_threads(SCOPE) == {4711: frozenset({4})}


def test_a_slice_that_ends_while_it_is_settled_holds_nothing(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, stays = (places / f"cgroup/user.slice/user-{uid}.slice" for uid in (1000, 1001))
    for path in (gone, stays):
        path.mkdir(parents=True)
        (path / "cpuset.cpus.exclusive").write_text("4-5\n")
    real = Path.read_text

    def read_text(path: Path, *arguments: object, **more: object) -> str:
        if path.parent == gone:
            (gone / "cpuset.cpus.exclusive").unlink(missing_ok=True)
            gone.rmdir() if gone.exists() else None
        return real(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    records.MECHANISM.settle({})
    assert real(stays / "cpuset.cpus.exclusive") == "\n"
