"""What is said while a VM runs, to a reader who has stopped: real pipes, sockets, terminals and files."""

import os
import pty
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_launcher import stderr
from unit.alone import alone, descriptors
from unit.reading import ROOT

# Each far more than a pipe, a terminal or a socket takes; what is said first is to be read whole.
SAYINGS = {
    "voice": "voice = Voice('vm', quiet=False); [voice.say(str(n) + 'y' * 200) for n in range(6000)]",
    "relay": "stderr.write(b'vm: 0y' + b'y' * (1 << 20))",
}
SCRIPT = "from qemu_launcher import stderr; from qemu_launcher.voice import Voice; stderr._PATIENCE = 0.0\n"


@pytest.fixture(params=["pipe", "socket", "terminal", "stopped terminal"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Where nobody reads, and where one writes."""
    if request.param == "pipe":
        reading, writing = os.pipe()
    elif request.param == "socket":
        reading, writing = (one.detach() for one in socket.socketpair())
    else:
        reading, writing = pty.openpty()
    if request.param == "stopped terminal":
        termios.tcflow(writing, termios.TCOOFF)  # Ctrl-S
    yield reading, writing
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("saying", SAYINGS)
def test_reader_who_has_stopped_holds_nobody_up(ends: tuple[int, int], saying: str) -> None:
    reading, writing = ends
    done = subprocess.run(
        [sys.executable, "-c", f"{SCRIPT}{SAYINGS[saying]}; print('said')"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "launcher")},
        stdout=subprocess.PIPE,
        stderr=writing,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"said\n")
    assert os.get_blocking(writing), "the flags are not ours alone"
    if os.isatty(writing):
        termios.tcflow(writing, termios.TCOON)
    else:
        assert os.read(reading, 1 << 16).startswith(b"vm: 0y")


def written(monkeypatch: pytest.MonkeyPatch, fd: int, data: bytes) -> None:
    """By this very process, whose stderr is `fd` meanwhile."""
    monkeypatch.setattr(stderr, "_STDERR", fd)
    stderr.write(data)


def test_all_is_written_where_there_is_room(ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = ends
    if os.isatty(writing):
        termios.tcflow(writing, termios.TCOON)

    def act() -> None:
        before = descriptors()
        written(monkeypatch, writing, b"one line\n")
        assert descriptors() == before

    alone(act)
    assert os.read(reading, 100).replace(b"\r", b"") == b"one line\n"


def test_file_takes_all_of_it_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    with log.open("ab") as file:
        file.write(b"first\n")
        file.flush()
        written(monkeypatch, file.fileno(), b"y" * 100_000)
    assert log.read_bytes() == b"first\n" + b"y" * 100_000


def test_reader_who_has_left_and_stderr_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    written(monkeypatch, writing, b"unheard\n")
    os.close(writing)
    written(monkeypatch, writing, b"unheard\n")
