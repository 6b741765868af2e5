"""Groups that the helper makes by itself, in a tree of plain files; the kernel's part is in tests/system."""

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher_helper import service
from qemu_launcher_helper.contract import Unsupported
from qemu_launcher_helper.cpuset.partition import Partition
from qemu_launcher_helper.cpuset.raw import Raw, RawPartition, RawV1
from qemu_launcher_helper.target import Target

HELPER = Path(__file__).parents[2] / "helper"
NAME = "qemu-launcher-1000-vm.scope"
TOP, BELOW = f"/{NAME}", f"/user.slice/user-1000.slice/{NAME}"
FILES = ("cgroup.procs", "cgroup.subtree_control", "cgroup.events")


def raw_partition(root: Path) -> RawPartition:
    """One on the hierarchy at `root`."""
    mounts = root.parent / "mounts"
    mounts.write_text(f"29 1 0:25 / /sys rw - sysfs sysfs rw\n32 1 0:28 / {root} rw - cgroup2 none rw,nsdelegate\n")
    return RawPartition(mounts)


class Tree:
    """A cgroup v2 hierarchy: each folder has the kernel's files, which do not keep it from being removed."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._mkdir, self._rmdir = root, Path.mkdir, Path.rmdir
        self.modes: list[int] = []

        def mkdir(path: Path, **more: Any) -> None:
            self.make(path, **more)

        def rmdir(path: Path) -> None:
            self.remove(path)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        root.mkdir()
        (root / "cgroup.controllers").write_text("cpuset cpu memory\n")
        root.chmod(0o555)

    def make(self, path: Path, **more: Any) -> None:
        if more.get("exist_ok") and path.is_dir():
            return
        if path.parent.name == self.root.name:
            self.modes.append(stat.S_IMODE(path.parent.stat().st_mode))
        self._mkdir(path)
        for name in FILES:
            (path / name).write_text("populated 0\nfrozen 0\n" if name == "cgroup.events" else "")

    def remove(self, path: Path) -> None:
        if "populated 1" in (path / "cgroup.events").read_text():
            raise OSError(16, "Device or resource busy")
        for name in FILES:
            (path / name).unlink()
        self._rmdir(path)

    def mechanism(self) -> RawPartition:
        return raw_partition(self.root)

    def said(self, group: str, name: str = "cgroup.subtree_control") -> str:
        return (self.root / group.lstrip("/") / name).read_text()

    def group(self, path: str, *, populated: bool) -> Path:
        group = self.root / path.lstrip("/")
        for folder in [*[one for one in group.parents if one.is_relative_to(self.root)][::-1], group]:
            folder.mkdir(exist_ok=True)
        (group / "cgroup.events").write_text(f"populated {populated:d}\nfrozen 0\n")
        return group


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    mask = os.umask(0o077)
    yield Tree(tmp_path / "cgroup", monkeypatch)
    monkeypatch.undo()
    os.umask(mask)


@pytest.fixture
def target() -> Iterator[Target]:
    with subprocess.Popen(["sleep", "600"]) as process:
        with Target(process.pid) as opened:
            yield opened
        process.kill()


def test_a_group_at_the_top(tree: Tree, target: Target) -> None:
    assert tree.mechanism().enclose(TOP, target)
    assert tree.said(TOP, "cgroup.procs") == str(target.pid)
    assert tree.said("") == "+cpuset"
    assert tree.said(TOP) == "", "that is for apply"
    assert stat.S_IMODE((tree.root / NAME).stat().st_mode) == 0o755, "its user reads in it whether his shield holds"
    assert tree.modes == [0o755], "the root may be written by who has no CAP_DAC_OVERRIDE"


def test_a_group_below_its_users_slice(tree: Tree, target: Target) -> None:
    tree.group("/user.slice/user-1000.slice/session-1.scope", populated=True)
    assert tree.mechanism().enclose(BELOW, target)
    assert tree.said(BELOW, "cgroup.procs") == str(target.pid)
    for level in ("", "user.slice", "user.slice/user-1000.slice"):
        assert tree.said(level) == "+cpuset", level
    assert tree.said("user.slice/user-1000.slice/session-1.scope") == ""


def test_a_second_call_finds_the_group(tree: Tree, target: Target) -> None:
    for _ in range(2):
        assert tree.mechanism().enclose(TOP, target)


@pytest.mark.parametrize(
    ("unit", "home"),
    [
        ("/user.slice/user-1000.slice/session-1.scope", "/user.slice/user-1000.slice"),
        ("/openrc.xdm", ""),
        ("/openrc.xdm/x", ""),  # where nothing limits anything, any group will do to be started from
        ("/user/alice/0", ""),
        ("/c1", ""),
        ("", ""),
    ],
)
def test_where_a_vms_group_goes(unit: str, home: str) -> None:
    assert Raw().home(unit, 1000) == RawV1().home(unit, 1000) == home


def test_no_controller_where_cpusets_are_v1s(tree: Tree, target: Target) -> None:
    (tree.root / "cgroup.controllers").write_text("\n")
    assert tree.mechanism().enclose(TOP, target)
    assert tree.said("") == ""
    assert tree.said(TOP, "cgroup.procs") == str(target.pid)


def test_where_there_is_no_cgroup_v2(tmp_path: Path, target: Target) -> None:
    with pytest.raises(Unsupported, match=r"mkdir -p /sys/fs/cgroup.*; mount -t cgroup2 cgroup2 /sys/fs/cgroup"):
        raw_partition(tmp_path).enclose(TOP, target)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ended_while_it_was_moved(tree: Tree, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another's by then, which goes back to where it came from."""
    back: list[tuple[int, str]] = []
    mechanism = tree.mechanism()
    monkeypatch.setattr(mechanism, "give_back", lambda pid, scope: back.append((pid, scope)))
    mechanism.enclose(TOP, target)
    assert back == []
    monkeypatch.setattr(target, "is_alive", lambda: False)
    mechanism.enclose(TOP, target)
    assert back == [(target.pid, TOP)]


@pytest.mark.parametrize("where", ["", "/user.slice/user-1000.slice"])
def test_groups_go_when_nothing_is_left_in_them(tree: Tree, where: str) -> None:
    ended = tree.group(f"{where}/qemu-launcher-1000-old.scope", populated=False)
    for below in ("emulator", "vcpus", "vcpus/77", "pinned"):
        (ended / below).mkdir()
    lives = tree.group(f"{where}/{NAME}", populated=True)
    others = [tree.group(f"{where}/{name}", populated=False) for name in ("openrc.ssh", "qemu-launcher", "x.scope")]
    tree.mechanism().tidy(frozenset())
    assert not ended.exists()
    assert lives.exists()
    assert all(group.exists() for group in others), "none but ours"
    (lives / "cgroup.events").write_text("populated 0\nfrozen 0\n")
    tree.mechanism().tidy(frozenset())
    assert not lives.exists()


def test_what_was_killed_may_take_a_moment_to_end(tree: Tree) -> None:
    """The kernel refuses to remove a group that has just got a task; nothing else waits for it."""
    group = tree.group(TOP, populated=False)
    (group / "emulator").mkdir()
    (group / "emulator/cgroup.events").write_text("populated 1\nfrozen 0\n")
    tree.mechanism().tidy(frozenset())
    assert group.exists()


def test_what_is_missing_for_partitions(tree: Tree) -> None:
    mechanism = tree.mechanism()
    mechanism.linux = [6, 11]
    assert mechanism.lacks() == "Shielding needs the cgroup v2 hierarchy and Linux 6.11 or newer"
    (tree.root / "cpuset.cpus.isolated").write_text("\n")
    assert mechanism.lacks() == ""


def test_what_is_missing_for_cpusets_of_v1(tmp_path: Path) -> None:
    cpusets, unified = tmp_path / "cpuset", tmp_path / "unified"
    lines = [f"31 1 0:27 / {cpusets} rw - cgroup cgroup rw,cpuset"]
    for folder in (cpusets, unified):
        folder.mkdir()
    (tmp_path / "online").write_text("0-7\n")
    (cpusets / "cpuset.cpus").write_text("0-7\n")

    def mechanism() -> RawV1:
        (tmp_path / "mounts").write_text("\n".join([*lines, ""]))
        return RawV1(tmp_path / "mounts", tmp_path / "memory", tmp_path / "online")

    assert mechanism().lacks().startswith("Without systemd, cgroup v1 needs v2 beside it: mkdir -p /sys/fs/cgroup/uni")
    lines.append(f"32 1 0:28 / {unified} rw - cgroup2 none rw,nsdelegate")
    for name in ("cgroup.procs", "cgroup.controllers"):
        (unified / name).write_text("")
    assert mechanism().lacks() == ""
    assert mechanism().root == unified
    (cpusets / "cpuset.cpus").unlink()
    assert "without systemd, before Linux 6.11: mkdir -p /run/cpuset; mount -t cgroup -o cpuset" in mechanism().lacks()


def test_nothing_is_mounted_where_cpusets_are(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(f"31 1 0:27 / {tmp_path} rw - cgroup cgroup rw,cpuset\n")
    (tmp_path / "cpuset.cpus").write_text("0-7\n")
    (tmp_path / "online").write_text("0-7\n")
    RawV1(tmp_path / "mounts", tmp_path / "memory", tmp_path / "online").mount(str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()


def test_nothing_is_mounted_for_nowhere(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("")
    (tmp_path / "online").write_text("0-7\n")
    mechanism = RawV1(tmp_path / "mounts", tmp_path / "memory", tmp_path / "online")
    before = Path("/proc/self/mountinfo").read_text()
    mechanism.mount("")
    assert Path("/proc/self/mountinfo").read_text() == before


@pytest.mark.parametrize("systemd", [True, False])
def test_which_is_chosen(systemd: bool) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(HELPER)!r})
from qemu_launcher_helper import target
target.SYSTEMD = {systemd}
from qemu_launcher_helper import __main__ as main, cpuset
print(cpuset.MECHANISM.resident, main._LOG)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == (["False", "/run/systemd/journal/socket"] if systemd else ["True", "/dev/log"])


def test_where_no_syslog_is(tmp_path: Path) -> None:
    """One line on standard error for each record: no traceback, as logging has for a handler that fails."""
    code = f"""
import sys
sys.path.insert(0, {str(HELPER)!r})
sys.argv = ["helper", "--serve"]
from qemu_launcher_helper import __main__ as main, contract, privileges
def drop():
    raise contract.Failed("that is enough")
main._LOG, privileges.drop = {str(tmp_path / "log")!r}, drop
sys.exit(main.main())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "cannot serve: 'that is enough'\n")


def test_where_no_cgroup_v2_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("29 1 0:25 / /sys rw - sysfs sysfs rw\n")
    assert RawPartition(tmp_path / "mounts").root == Path("/sys/fs/cgroup")


@pytest.mark.parametrize(("mechanism", "stays"), [(Raw, True), (Partition, False)])
def test_the_helper_stays_while_there_are_vms(
    mechanism: type[Partition],
    stays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody starts it when one ends. Where systemd does, it leaves."""
    records = ["a VM"]
    monkeypatch.setattr(service, "MECHANISM", mechanism(Path("/nowhere")))
    monkeypatch.setattr(service, "read_all", lambda: iter(records))

    async def live() -> bool:
        bus: Any = None
        serving = service.Service(bus, bus, idle_seconds=0.01)
        await asyncio.sleep(0.2)
        stayed = not serving.idle.is_set()
        records.clear()
        await asyncio.wait_for(serving.idle.wait(), 10)
        return stayed

    assert asyncio.run(live()) is stays
