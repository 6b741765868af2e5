"""Which file a program's name means."""

import os
from pathlib import Path

import pytest

from qemu_launcher.programs import which


@pytest.fixture
def path(tmp_path: Path) -> dict[str, str]:
    """An environment in whose PATH there are a directory, a file that is not executable, and two programs `qemu`."""
    (tmp_path / "directory" / "qemu").mkdir(parents=True)
    for name, mode in (("data", 0o644), ("first", 0o755), ("second", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "qemu").touch()
        (tmp_path / name / "qemu").chmod(mode)
    folders = [tmp_path / name for name in ("none", "directory", "data", "first", "second")]
    return {"PATH": os.pathsep.join(map(str, folders))}


def test_what_would_be_executed(path: dict[str, str], tmp_path: Path) -> None:
    assert which("qemu", path) == tmp_path / "first" / "qemu"
    assert which("qemu-kvm", path) is None
    assert which("qemu", {"PATH": f"{tmp_path}/directory"}) is None


@pytest.mark.parametrize("place", ["first", "./first", "none:first"])
def test_folder_that_is_relative_to_where_it_will_run(tmp_path: Path, path: dict[str, str], place: str) -> None:
    assert which("qemu", {"PATH": place}, tmp_path) == tmp_path / "first" / "qemu"
    assert which("qemu", {"PATH": place}, tmp_path / "none") is None


@pytest.mark.parametrize("place", ["", ":/none"])
def test_empty_folder_is_where_it_will_run(tmp_path: Path, path: dict[str, str], place: str) -> None:
    assert which("qemu", {"PATH": place}, tmp_path / "first") == tmp_path / "first" / "qemu"


def test_path_is_not_looked_for(path: dict[str, str], tmp_path: Path) -> None:
    assert which("./qemu", path, tmp_path / "second") == tmp_path / "second" / "qemu"
    assert which(f"{tmp_path}/second/qemu", path) == tmp_path / "second" / "qemu"
    assert which("./qemu", path, tmp_path / "data") is None
    assert which("first/qemu", {"PATH": str(tmp_path)}) is None


def test_name_that_no_file_can_have(path: dict[str, str]) -> None:
    assert which("qemu\0", path) is None
