"""What `list` makes of files in folders and of VMs that run, without any VM."""

import json
import os
from pathlib import Path

import pytest

from qemu_launcher import listing, locate, runtime
from qemu_launcher.control import State
from qemu_launcher.errors import Mark
from qemu_launcher.listing import Entry
from qemu_launcher.procfs import Process
from qemu_launcher.record import RUNNING, Record
from qemu_launcher.runtime import Found

GOOD = "launcher: {binary: qemu-system-x86_64}\nqemu: [nographic]\n"
BAD = "launcher: {binary: q, colour: red, size: big}\nqemu: []\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Three folders, the first to be searched first, the last of which is not there."""
    own, system = tmp_path / "own", tmp_path / "system"
    own.mkdir()
    system.mkdir()
    return own, system, tmp_path / "none"


def found(name: str, definition: Path | str) -> Found:
    """A VM that runs: this very process."""
    return Found(name, Record(qemu=Process.of(os.getpid()), state=RUNNING, definition=str(definition)), None)


def listed(folders: tuple[Path, ...], *running: tuple[Found, State]) -> list[Entry]:
    located, unreadable = locate.located(folders)
    assert unreadable == []
    return listing.entries(located, [vm for vm, _ in running], [state for _, state in running])


def test_each_file_has_a_line_and_the_first_folder_wins(folders: tuple[Path, Path, Path]) -> None:
    own, system, _ = folders
    for path in (own / "b.yml", system / "a.yml", system / "b.yml"):
        path.write_text(GOOD)
    assert listed(folders) == [
        Entry("a", "not running", path=f"{system}/a.yml"),
        Entry("b", "not running", path=f"{own}/b.yml"),
        Entry("b", "shadowed", path=f"{system}/b.yml", shadowed_by=f"{own}/b.yml"),
    ]


def test_mistake_is_told_in_its_line_and_hides_no_other(folders: tuple[Path, Path, Path]) -> None:
    own = folders[0]
    (own / "bad.yml").write_text(BAD)
    (own / "good.yml").write_text(GOOD)
    bad, good = listed(folders)
    assert bad.cells() == (
        *("bad", "not running", "", f"{own}/bad.yml:1:23"),
        "error: unknown key in launcher: 'colour' (and 1 more)",
    )
    assert [problem.mark for problem in bad.problems] == [
        Mark(f"{own}/bad.yml", 1, 23),
        Mark(f"{own}/bad.yml", 1, 36),
    ]
    assert good.cells() == ("good", "not running", "", f"{own}/good.yml", "")


def test_files_that_no_name_finds_are_told(folders: tuple[Path, Path, Path]) -> None:
    own, system, _ = folders
    for name in ("a b.yml", "vm.yaml", "both.yaml", ".hidden.yml", "notes.txt", "both.yml~"):
        (own / name).write_text(GOOD)
    (system / "both.yml").write_text(GOOD)
    (system / "dangling.yml").symlink_to("nowhere")
    (system / "folder.yml").mkdir()
    os.mkfifo(system / "fifo.yml")
    assert [(entry.name, entry.cells()[-1]) for entry in listed(folders)] == [
        ("a b", "error: 'a b' is no name for a VM"),
        ("both", ""),
        ("dangling", f"error: cannot read {system}/dangling.yml: No such file or directory"),
        ("fifo", f"error: {system}/fifo.yml is no regular file"),
        ("folder", f"error: cannot read {system}/folder.yml: Is a directory"),
        ("vm", f"error: {own}/vm.yaml is not called vm.yml"),
    ]


def test_a_line_is_one_line_whatever_a_file_is_called(folders: tuple[Path, Path, Path]) -> None:
    own, _system, _none = folders
    (own / "a\nwin11  running.yml").write_text(GOOD)
    (entry,) = listed(folders)
    assert not any("\n" in cell for cell in entry.cells())
    assert entry.cells()[0] == r"a\nwin11  running"


def test_what_runs(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    own, system, _ = folders
    for path in (own / "a.yml", own / "b.yml", system / "b.yml", tmp_path / "elsewhere.yml"):
        path.write_text(GOOD)
    lines = listed(
        folders,
        (found("a", own / ".." / "own" / "a.yml"), State("paused", control_socket="ok")),
        (found("b", system / "b.yml"), State("running", "control socket busy", "busy")),
        (found("elsewhere", tmp_path / "elsewhere.yml"), State("running")),
        (found("gone", own / "gone.yml"), State("running")),
        (found("lost", ""), State("running")),
        (Found("soon", Record(definition=str(own / "a.yml")), None), State("starting")),
    )
    pid = str(os.getpid())
    assert [entry.cells() for entry in lines] == [
        ("a", "paused", pid, f"{own}/a.yml", ""),
        ("b", "running", pid, f"{own}/b.yml", f"was started from {system}/b.yml; control socket busy"),
        ("b", "shadowed", "", f"{system}/b.yml", f"not used: {own}/b.yml comes first"),
        ("elsewhere", "running", pid, f"{tmp_path}/elsewhere.yml", ""),
        ("gone", "running", pid, f"{own}/gone.yml", "its definition is gone"),
        ("lost", "running", pid, "", "its definition is not known"),
        ("soon", "starting", "", f"{own}/a.yml", ""),
    ]


def test_definition_that_was_broken_since_its_vm_started(folders: tuple[Path, Path, Path]) -> None:
    (folders[0] / "a.yml").write_text(BAD)
    (entry,) = listed(folders, (found("a", folders[0] / "a.yml"), State("running")))
    assert (entry.state, entry.pid, len(entry.problems)) == ("running", os.getpid(), 2)


def environment(folders: tuple[Path, ...]) -> dict[str, str]:
    return {"QEMU_LAUNCHER_CONFIG_DIR": str(folders[0])}


def test_json(
    folders: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """These keys are promised."""
    monkeypatch.setattr(runtime, "find_all", list)
    (folders[0] / "bad.yml").write_text("launcher: {binary: q}\nqemu: x\n")
    assert listing.show(environment(folders), as_json=True) == 0
    assert json.loads(capfd.readouterr().out) == [
        {
            "name": "bad",
            "state": "not running",
            "pid": None,
            "definition": f"{folders[0]}/bad.yml",
            "shadowed_by": None,
            "started_from": None,
            "remark": None,
            "errors": [{"line": 2, "column": 7, "message": "the section qemu must be a list, not 'x'", "hint": None}],
        }
    ]


def test_path_that_is_no_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "find_all", list)
    odd = tmp_path / "\udcff\x1b[1m"
    odd.mkdir()
    (odd / "vm.yml").write_text(GOOD)
    assert listing.show(environment((odd,)), as_json=True) == 0
    (entry,) = json.loads(capfd.readouterr().out)
    assert entry["definition"] == f"{odd}/vm.yml"
    assert listing.show(environment((odd,)), as_json=False) == 0
    assert f"{tmp_path}/\\xff\\x1b[1m/vm.yml" in capfd.readouterr().out


def test_nothing_at_all(
    folders: tuple[Path, Path, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "find_all", list)
    assert listing.show(environment(folders), as_json=False) == 0
    assert capfd.readouterr().out == (f"there is no definition in {folders[0]}, and no VM of yours is running\n")
    assert listing.show(environment(folders), as_json=True) == 0
    assert capfd.readouterr().out == "[]\n"


def test_folder_that_cannot_be_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to itself, since root may read whatever has a mode."""
    monkeypatch.setattr(runtime, "find_all", list)
    (tmp_path / "loop").symlink_to("loop")
    assert listing.show(environment((tmp_path / "loop",)), as_json=True) == 0
    out, err = capfd.readouterr()
    assert out == "[]\n"
    assert err == f"qemu-launcher: warning: cannot read {tmp_path}/loop: Too many levels of symbolic links\n"


def test_mistakes_are_those_that_keep_a_start_from_tuning(folders: tuple[Path, Path, Path]) -> None:
    """As `check` without a name has them."""
    (folders[0] / "held.yml").write_text("launcher: {binary: q, scheduler: batch}\nqemu: [preconfig]\n")
    [held] = listed(folders)
    assert held.cells()[4].startswith("error: -preconfig stops QEMU")
