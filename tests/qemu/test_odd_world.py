"""A start in an odd world: names and values that are no UTF-8, no working directory, no standard descriptors."""

import os
from pathlib import Path

import pytest

from qemu.launched import Home


def odd(place: Path) -> Path:
    """A folder whose name is no UTF-8, and has a line break and a comma in it."""
    folder = Path(os.fsdecode(os.fsencode(place) + b"/\xff\n,"))
    folder.mkdir(mode=0o700)
    return folder


def test_names_and_values_that_are_no_utf8(home: Home, tmp_path: Path) -> None:
    """Definition, runtime files and environment; QEMU gets the very bytes."""
    folder = odd(tmp_path)
    home.define(scheduler="batch").rename(folder / "vm-under-test.yml")
    home.runtime = folder
    home.environment.update({"XDG_RUNTIME_DIR": str(folder), "ODD": "\udcff"})
    run = home.start(str(folder / "vm-under-test.yml"))
    run.name = "vm-under-test"
    run.wait_running()
    assert b"ODD=\xff" in Path(f"/proc/{run.qemu_pid}/environ").read_bytes().split(b"\0")
    shown = home.ask("status", "vm-under-test")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "running, PID" in shown.stdout
    assert home.ask("status", "--json").returncode == 0
    assert home.ask("list").returncode == 0
    again = home.start(str(folder / "vm-under-test.yml"))
    assert again.end() == 1
    assert "is already running" in again.output
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


def test_refusal_names_the_odd_path_in_one_line(home: Home, tmp_path: Path) -> None:
    folder = odd(tmp_path)
    home.define(binary="/nowhere/qemu", scheduler="batch").rename(folder / "vm-under-test.yml")
    run = home.start(str(folder / "vm-under-test.yml"))
    assert run.end() == 2
    assert all(line.startswith(("qemu-launcher: ", "    ")) for line in run.output.splitlines()), run.output


def test_working_directory_that_is_gone(home: Home, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    home.define(scheduler="batch")
    run = home.start(
        argv=["sh", "-c", 'cd "$0"; rmdir "$0"; exec "$@"', str(gone), *home.command("run", "vm-under-test")]
    )
    run.wait_running()
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0


@pytest.mark.parametrize("closed", ["0<&-", "0<&- 1>&-"])
def test_standard_descriptors_that_are_closed(home: Home, closed: str) -> None:
    """QEMU's own messages must not land in a file of ours that got the number."""
    home.define(scheduler="batch", qemu=({"monitor": "stdio"},))
    run = home.start(argv=["sh", "-c", f'exec "$@" {closed}', "sh", *home.command("run", "vm-under-test")])
    run.wait_running()
    assert run.record()["state"] == "running"
    assert home.ask("kill", "vm-under-test").returncode == 0
    assert run.end() == 0
