"""Whatever is left in the runtime directory, by a crash, by another boot or by somebody's mistake.

A VM starts, or it is said what has to be removed; and nobody who only looks waits for it.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_launcher import procfs, rundir, runtime
from qemu_launcher.errors import LauncherError
from qemu_launcher.procfs import Process
from qemu_launcher.record import RUNNING, STARTING, Record
from unit.reading import ROOT

NAME = f"unit-test-{os.getpid()}"
DEFINITION = Path("/etc/qemu-launcher/vms/win11.yml")
ME = Process.of(os.getpid())
assert ME is not None
LOCK, SOCKET = f"{NAME}.lock", f"{NAME}.sock"
ANOTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "qemu-launcher"
    folder.mkdir(mode=0o700)
    return folder


def record_of(data: bytes) -> Record:
    record = Record.decode(data)
    assert record is not None
    return record


GARBAGE = {
    "empty": b"",
    "text": b"hello\n",
    "binary": bytes(range(256)) * 40,
    "half a record": Record(qemu=ME, state=RUNNING).encode()[:40],
    "two records": Record().encode() * 2,
    "json of another kind": b'{"pid": 1}\n',
    "zeros, as after a crash": bytes(8192),
    "a record of somebody who is gone": Record(Process(1 << 22, 1), Process(1 << 22, 2), RUNNING).encode(),
    "a record whose PID is another's by now": Record(qemu=Process(os.getpid(), ME.start_time - 1)).encode(),
    "a record of another boot": Record(ME, ME, RUNNING, boot=ANOTHER_BOOT).encode(),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_the_lock_file_is_written_over(place: Path, what: str) -> None:
    (place / LOCK).write_bytes(GARBAGE[what])
    assert runtime.find(NAME) is None
    with runtime.claimed(NAME, DEFINITION) as (claim, discarded):
        assert discarded is None
        assert record_of((place / LOCK).read_bytes()) == claim.record
        assert claim.record.boot == procfs.boot_id()
        vm = runtime.find(NAME)
        assert vm is not None
        assert vm.launcher == ME
    assert (place / LOCK).read_bytes() == b""


def test_record_of_this_boot_is_believed(place: Path) -> None:
    """The control for the one of another boot."""
    for boot in (procfs.boot_id() or "", ""):
        (place / LOCK).write_bytes(Record(ME, ME, RUNNING, boot=boot).encode())
        assert runtime.find(NAME) is not None


def test_huge_file_is_no_work(place: Path) -> None:
    with (place / LOCK).open("wb") as file:
        file.truncate(1 << 40)
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        assert (place / LOCK).stat().st_size < 4096
        assert record_of((place / LOCK).read_bytes()) == claim.record


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        directory = os.open(path.parent, os.O_PATH)  # sun_path holds 108 bytes
        one.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [Path.touch, bound, os.mkfifo, dangling], ids=["file", "socket", "FIFO", "link"])
def test_what_is_in_the_place_of_the_control_socket_makes_room(place: Path, make: Callable[[Path], None]) -> None:
    make(place / SOCKET)
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        control = claim.listening_socket()
        with runtime.connected(place / SOCKET):
            assert control.accept()[0].fileno() >= 0
        control.close()


def test_directory_in_the_place_of_the_control_socket(place: Path) -> None:
    (place / SOCKET).mkdir()
    message = f"^cannot make the control socket {re.escape(str(place / SOCKET))}: a directory is in its place$"
    with pytest.raises(LauncherError, match=message) as caught, runtime.claimed(NAME, DEFINITION) as (claim, _):
        claim.listening_socket()
    assert caught.value.hint == "no launcher has put it there: remove it, and start again"
    assert (place / LOCK).read_bytes() == b""
    (place / SOCKET).rmdir()
    with runtime.claimed(NAME, DEFINITION) as (claim, _):
        claim.listening_socket().close()


@pytest.mark.parametrize(
    ("make", "kind"),
    [(Path.mkdir, "a directory"), (os.mkfifo, "a FIFO"), (bound, "a socket"), (dangling, "a symbolic link")],
)
def test_what_is_no_lock_file_is_named_and_left(place: Path, make: Callable[[Path], None], kind: str) -> None:
    make(place / LOCK)
    message = f"^cannot make the lock file {re.escape(str(place / LOCK))}: {kind} is in its place$"
    with pytest.raises(LauncherError, match=message) as caught, runtime.claimed(NAME, DEFINITION):
        pass
    assert caught.value.hint == "no launcher has put it there: remove it, and start again"
    assert os.path.lexists(place / LOCK)
    assert not (place / "nowhere").exists()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, bound, dangling], ids=["directory", "FIFO", "socket", "link"])
def test_who_looks_does_not_wait_for_it(place: Path, make: Callable[[Path], None]) -> None:
    """In a process of its own: it would wait for ever for somebody to write into a FIFO."""
    make(place / LOCK)
    (place / "other.lock").write_bytes(Record(ME, ME, STARTING).encode())
    code = "from qemu_launcher import runtime; print([vm.name for vm in runtime.find_all()])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "launcher")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "'other'" in done.stdout
    assert NAME not in done.stdout


def test_fifo_that_somebody_has_open_is_not_waited_for(place: Path) -> None:
    """Its name in /proc/PID/fd is that of a lock file. Who has it open reads, and so would we: nobody writes."""
    os.mkfifo(place / LOCK)
    reader = os.open(place / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from qemu_launcher import runtime; runtime.find_all()"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "launcher"), "XDG_RUNTIME_DIR": "/nonexistent"},
            timeout=60,
            check=False,
        )
        assert done.returncode == 0
    finally:
        os.close(reader)


def test_socket_that_a_killed_start_has_left_makes_room(place: Path) -> None:
    """It has the PID of a `start` in its name, and PIDs come again."""
    name = f"{NAME}.4711.start"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place / name))
    with rundir.listening(name) as (listener, path), socket.socket(socket.AF_UNIX) as client:
        assert path == place / name
        client.connect(str(path))
        listener.accept()[0].close()
    assert list(place.iterdir()) == []


def test_what_is_no_socket_in_its_place_is_named(place: Path) -> None:
    name = f"{NAME}.4711.start"
    (place / name).mkdir()
    with (
        pytest.raises(LauncherError, match=rf"/{re.escape(name)}: a directory is in its place"),
        rundir.listening(name),
    ):
        pass
