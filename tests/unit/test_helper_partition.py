"""Partitions, and what all mechanisms have of them, in a tree of plain files; the kernel's part is in tests/system."""

import errno
import os
import shutil
from pathlib import Path
from typing import Self

import pytest

from qemu_launcher_helper.contract import TargetRefused
from qemu_launcher_helper.cpuset import partition
from qemu_launcher_helper.cpuset.partition import Partition
from qemu_launcher_helper.cpuset.pool import Pool
from qemu_launcher_helper.target import Target

SCOPE = "/user.slice/user-1000.slice/qemu-launcher-1000-vm.scope"
SERVICES, ALICES = (
    f"/{above}/qemu-launcher-{uid}-vm.scope"
    for above, uid in (("system.slice", 0), ("user.slice/user-1001.slice", 1001))
)
STRANGER = 4711


def exclusive(root: Path, group: str) -> str:
    return (root / group / "cpuset.cpus.exclusive").read_text().strip()


def test_system_slice_gives_back_what_no_service_of_its_has_any_more(tmp_path: Path) -> None:
    """What it kept, the kernel would refuse to every slice beside it, and nobody would hold it."""
    for scope in (SERVICES, ALICES):
        (tmp_path / scope[1:]).mkdir(parents=True)
    for group in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        (group / "cpuset.cpus.exclusive").write_text("\n")
    mechanism = Partition(tmp_path)
    mechanism.settle({SERVICES: frozenset({4}), ALICES: frozenset({2})})
    assert (exclusive(tmp_path, "system.slice"), exclusive(tmp_path, "user.slice")) == ("4", "2")
    shutil.rmtree(tmp_path / SERVICES[1:])
    mechanism.settle({ALICES: frozenset({2})})
    assert (exclusive(tmp_path, "system.slice"), exclusive(tmp_path, "user.slice")) == ("", "2")


def test_how_groups_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/x", "a/sub/x", "b/sub/y", "c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def found(pattern: str) -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in partition.find(tmp_path, pattern))

    assert found("*") == ["a", "b", "c"]
    assert found("*/") == ["a", "b"], "with a slash at the end, folders only"
    assert found("*/*/") == ["a/sub", "b/sub"]
    assert (found("a/s*"), found("*/sub/x"), found("*/nothing"), found("")) == (["a/sub"], ["a/sub/x"], [], ["."])
    looked: list[str] = []
    scandir = os.scandir

    def look(path: Path) -> object:
        looked.append(path.name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", look)
    assert found("*/x") == ["a/x"]
    assert looked == [tmp_path.name], "of whoever has filled a folder only the file is looked at"


def test_groups_are_found_beside_one_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To root without CAP_DAC_READ_SEARCH, as the group of a container that an ordinary user runs may be."""
    for name in ("a", "closed", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    stat, scandir = os.stat, os.scandir

    def look(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == tmp_path / "closed/x":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    def list_it(path: Path) -> object:
        if path == tmp_path / "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(os, "scandir", list_it)
    for pattern in ("*/x", "*/x*", "*/*"):
        assert sorted(partition.find(tmp_path, pattern)) == [tmp_path / "a/x", tmp_path / "d/x"], pattern


def test_a_process_that_ends_while_real_time_is_taken_away_leaves_the_others_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a scope without a record; its user may begin and end processes in there all the time."""
    (tmp_path / SCOPE[1:]).mkdir(parents=True)
    (tmp_path / SCOPE[1:] / "cgroup.procs").write_text("11\n12\n13\n")
    taken = []

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def take_realtime(self) -> None:
            if self.pid < 13:  # as os.listdir says, and as a system call
                raise (FileNotFoundError, ProcessLookupError)[self.pid - 11]
            taken.append(self.pid)

    monkeypatch.setattr(partition, "Target", Process)
    Partition(tmp_path).take_realtime(SCOPE)
    assert taken == [13]


def test_a_slice_that_ends_while_scopes_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SCOPE[1:] / "vcpus").mkdir(parents=True)
    (tmp_path / SCOPE[1:] / "vcpus/cpuset.cpus.partition").write_text("isolated\n")
    going = tmp_path / "user.slice/user-2000.slice"
    going.mkdir()
    scandir = os.scandir

    def after_its_end(path: str) -> object:
        if str(path) == str(going):
            shutil.rmtree(going, ignore_errors=True)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", after_its_end)
    assert Partition(tmp_path).orphans(frozenset()) == [SCOPE]
    assert not going.exists()


@pytest.mark.parametrize(
    ("file", "text", "holds"),
    [
        ("vcpus/cpuset.cpus.partition", "member", False),
        ("vcpus/cpuset.cpus.partition", "root invalid (Parent is not a partition root)", True),
        ("vcpus/cpuset.cpus.exclusive", "", False),
        ("vcpus/cpuset.cpus.exclusive", "4-5", True),
        ("cpuset.cpus.exclusive", "4-5", True),
        ("cpuset.cpus", "4-5", False),
    ],
)
def test_scope_that_holds_no_cpus_any_more_is_left_alone(tmp_path: Path, file: str, text: str, *, holds: bool) -> None:
    """What is in it may be there for ever, a thread that is ending and does not end: nobody is to wait for it again."""
    (tmp_path / SCOPE[1:] / "vcpus").mkdir(parents=True)
    (tmp_path / SCOPE[1:] / file).write_text(f"{text}\n")
    assert Partition(tmp_path).orphans(frozenset()) == [SCOPE] * holds


def test_what_systemd_could_not_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries once. What the helper was making in a scope when its VM ended would stay until the next of that name."""
    monkeypatch.setattr(partition, "UNITS", tmp_path / "units")
    (tmp_path / "units").mkdir()
    slice_ = tmp_path / "user.slice/user-1000.slice"
    left, lives, held, new = (slice_ / f"qemu-launcher-1000-{n}.scope" for n in ("left", "lives", "held", "new"))
    for scope in (left, lives, held, new):
        scope.mkdir(parents=True)
        # Not in the folder, as the kernel's files keep no group from being removed.
        (tmp_path / scope.name).write_text("populated 1\n" if scope == lives else "populated 0\n")
    (left / "vcpus/4711").mkdir(parents=True)
    real = Path.read_text

    def read_text(path: Path) -> str:
        return real(tmp_path / path.parent.name if path.name == "cgroup.events" else path)

    monkeypatch.setattr(Path, "read_text", read_text)
    (tmp_path / "units" / f"invocation:{held.name}").symlink_to("4f09c1")  # dangling, as they are
    Partition(tmp_path).tidy(frozenset({f"/user.slice/user-1000.slice/{new.name}"}))
    assert sorted(slice_.iterdir()) == [held, lives, new], "one is systemd's still, one is just being made"


class Stranger:
    """Stands for a process that has a target's number, and was moved to its scope; and for its parent."""

    words: dict[int, dict[str, str]]

    def __init__(self, pid: int) -> None:
        if pid not in self.words:
            raise TargetRefused("gone")
        self.pid = pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> dict[str, str]:
        return self.words[self.pid]

    def cgroup(self) -> str:
        return self.words[self.pid]["cgroup"]

    def read(self, name: str) -> str:
        return self.words[self.pid].get(name, "0 0 4294967295\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(partition, "Target", Stranger)
    for name in ("init.scope", "user.slice/user-1001.slice/session-7.scope"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "cgroup.procs").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("uid", "parent", "map_", "back"),
    [
        ("1001", 77, "", "user.slice/user-1001.slice/session-7.scope"),  # carol's, just born
        ("0", 1, "", "init.scope"),  # a daemon's
        ("1000", 77, "", ""),  # his own: whatever its parent is
        ("1000", 1, "", ""),
        ("100000", 1, "0 100000 65536\n", ""),  # in a container of anybody's
        ("100000", 77, "0 100000 65536\n", "user.slice/user-1001.slice/session-7.scope"),
        ("1001", 78, "", ""),  # its parent has ended
    ],
)
def test_who_inherited_a_targets_number_goes_back(groups: Path, uid: str, parent: int, map_: str, back: str) -> None:
    """But nobody's own process to PID 1, whose group is in no slice of its user's: limits on that hold on."""
    Stranger.words = {
        STRANGER: {"PPid": str(parent), "Uid": f"{uid}\t{uid}\t{uid}\t{uid}", "cgroup": SCOPE}
        | ({"uid_map": map_} if map_ else {}),
        1: {"cgroup": "/init.scope"},
        77: {"cgroup": "/user.slice/user-1001.slice/session-7.scope"},
    }
    Partition(groups).give_back(STRANGER, SCOPE)
    moved = {str(path.parent.relative_to(groups)) for path in groups.rglob("cgroup.procs") if path.read_text()}
    assert moved == ({back} if back else set())


def test_where_a_scope_goes() -> None:
    slice_ = "/user.slice/user-1000.slice"
    assert Partition().home(f"{slice_}/session-3.scope", 1000) == slice_
    assert Partition().home("/system.slice/my-vm.service", 1000) == "/system.slice"
    assert Pool().home(f"{slice_}/session-3.scope", 1000) == "/qemu.slice/qemu-1000.slice"


def test_a_number_that_becomes_anothers_keeps_no_policy_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that the target had before, which may have been granted to it."""
    starts, given = iter([1, 2]), list[tuple[int, int]]()
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_FIFO)
    monkeypatch.setattr(
        "qemu_launcher_helper.target._set", lambda _, policy, param: given.append((policy, param.sched_priority))
    )
    with Target(os.getpid()) as target:
        monkeypatch.setattr(Target, "task_start_time", lambda *_: next(starts))
        with pytest.raises(TargetRefused, match="is gone"):
            target.set_policy({os.getpid(): 1}, "rr", 2)
    assert given == [(os.SCHED_RR | os.SCHED_RESET_ON_FORK, 2), (os.SCHED_OTHER, 0)]


@pytest.mark.parametrize(
    ("release", "usable"),
    [
        ("6.1.0-41-amd64", False),
        ("6.8.0-45-generic", False),  # Ubuntu 24.04: exclusive CPUs are a part of cpuset.cpus
        ("6.10.11+bpo-amd64", False),
        ("6.10-amd64", False),  # Debian's experimental ones
        ("6.11.0-rc1", True),
        ("6.12-rc6-amd64", True),
        ("6.17+deb14-amd64", True),
        ("6.12.57+deb13-amd64", True),
        ("7.0.3-arch1-1", True),
        ("10.2.0", True),
    ],
)
def test_kernels_that_have_the_files_and_not_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, usable: bool
) -> None:
    (tmp_path / "osrelease").write_text(f"{release}\n")
    monkeypatch.setattr(partition, "OSRELEASE", tmp_path / "osrelease")
    (tmp_path / "cpuset.cpus.isolated").write_text("\n")
    assert (Partition(tmp_path).lacks() == "") is usable


def test_a_host_that_does_not_say_which_linux_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen when the helper is imported, which must not end there."""
    monkeypatch.setattr(partition, "OSRELEASE", tmp_path / "missing")
    (tmp_path / "cpuset.cpus.isolated").write_text("\n")
    assert Partition(tmp_path).lacks().endswith("Linux 6.11 or newer")
