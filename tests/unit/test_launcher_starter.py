"""The launcher's end of its talk with `start`: what it takes over, and that it never waits for it."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_launcher import rundir, starter
from qemu_launcher.errors import LauncherError
from qemu_launcher.starter import VARIABLE, Starter


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, int]]:
    """The end of `start`, and the number of the launcher's."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(10)
        yield ours, theirs.detach()


def taken(pair: tuple[socket.socket, int], environ: dict[str, str], **theirs: str) -> Starter:
    ours, number = pair
    greeting = {"environment": theirs, "directory": os.fspath(Path.cwd())}
    ours.sendall(json.dumps(greeting).encode() + b"\n")
    environ[VARIABLE] = str(number)
    return Starter.taken(environ)


def received(ours: socket.socket) -> list[Any]:
    data = b""
    while more := ours.recv(1 << 16):
        data += more
    return [json.loads(line) for line in data.splitlines()]


def test_whose_environment_it_is(pair: tuple[socket.socket, int]) -> None:
    """The person's; of the service only what is its own, and what the person has none of.

    A starter that the person's environment names is another launcher's, whose `start` is over.
    """
    environ = {
        "NOTIFY_SOCKET": "/run/n",
        "XDG_RUNTIME_DIR": "/run/user/1",
        "DBUS_SESSION_BUS_ADDRESS": "s",
        "LANG": "s",
    }
    taken(
        pair,
        environ,
        PATH="/bin",
        DISPLAY=":0",
        TERM="xterm",
        SSH_TTY="/dev/pts/1",
        NOTIFY_SOCKET="/theirs",
        QEMU_LAUNCHER_STARTER="/theirs",
        XDG_RUNTIME_DIR="/run/user/theirs",
        ODD="\udcff",
    )
    assert environ == {
        "PATH": "/bin",
        "DISPLAY": ":0",
        "ODD": "\udcff",
        "NOTIFY_SOCKET": "/run/n",
        "XDG_RUNTIME_DIR": "/run/user/theirs",
        "DBUS_SESSION_BUS_ADDRESS": "s",
    }


def test_what_is_said_and_the_last_word(pair: tuple[socket.socket, int]) -> None:
    launcher = taken(pair, {})
    launcher.say("a: warning\n")
    launcher.running()
    launcher.say("to the journal alone")
    launcher.ended(0)
    assert not launcher.is_there
    assert received(pair[0]) == [{"say": "a: warning\n"}, {"running": True}]


def test_exit_status(pair: tuple[socket.socket, int]) -> None:
    taken(pair, {}).ended(2)
    assert received(pair[0]) == [{"status": 2}]


def test_start_that_does_not_read_holds_nothing_up(pair: tuple[socket.socket, int]) -> None:
    """Stopped with Ctrl-Z, say. More is said than its socket takes; each send would wait for ever."""
    launcher = taken(pair, {})
    for _ in range(100):
        launcher.say("x" * 10_000)
    launcher.ended(1)


def test_slow_start_hears_whole_lines_and_the_last_word(pair: tuple[socket.socket, int]) -> None:
    """More is said than its socket takes, before it reads again: lines are missing, none is half there."""
    launcher = taken(pair, {})
    for number in range(100):
        launcher.say(f"{number} " * 2_000)
    heard: list[Any] = []
    slow = threading.Thread(target=lambda: heard.extend(received(pair[0])))
    slow.start()
    launcher.running()
    slow.join()
    assert 2 < len(heard) < 101
    assert heard[-1] == {"running": True}


def test_last_word_is_not_waited_for_without_end(
    pair: tuple[socket.socket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "_LAST_TIMEOUT", 0.01)
    launcher = taken(pair, {})
    for _ in range(100):
        launcher.say("x" * 10_000)
    launcher.running()
    assert not launcher.is_there


def connected(place: Path, directory: str) -> tuple[Starter, socket.socket]:
    """As by a user manager: the launcher is told a path, and greeted when it has come."""
    with socket.socket(socket.AF_UNIX) as listener:
        with rundir.short_path(place) as short:
            listener.bind(short)
        listener.listen(1)
        met: list[socket.socket] = []

        def greet() -> None:
            met.append(listener.accept()[0])
            met[0].sendall(json.dumps({"environment": {}, "directory": directory}).encode() + b"\n")

        start = threading.Thread(target=greet)
        start.start()
        launcher = Starter.taken({VARIABLE: str(place)})
        start.join()
    return launcher, met[0]


def test_path_that_is_longer_than_sockets_may_have(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    launcher, ours = connected(deep / "vm.start", "/")
    with ours:
        launcher.running()
        assert received(ours) == [{"running": True}]


def test_folder_that_cannot_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sudo -u alice qemu-launcher start vm` in root's own folder; who waits can still be told."""
    monkeypatch.chdir(tmp_path)
    launcher, ours = connected(tmp_path / "vm.start", str(tmp_path / "gone"))
    with ours, pytest.raises(LauncherError, match=r"cannot enter '.*/gone', where you have started this: No such file"):
        launcher.enter_directory()
    assert launcher.is_there


def test_process_of_its_own_is_there_already(pair: tuple[socket.socket, int]) -> None:
    ours, number = pair
    ours.sendall(b'{"environment": {}, "directory": "/nowhere/at/all"}\n')
    Starter.taken({VARIABLE: str(number)}).enter_directory()


def test_start_that_has_gone_is_not_spoken_to(pair: tuple[socket.socket, int]) -> None:
    launcher = taken(pair, {})
    pair[0].close()
    launcher.say("nobody hears this")  # and no SIGPIPE
    launcher.ended(1)


@pytest.mark.parametrize("said", [b"", b"[]\n", b"{}\n", b"not JSON\n", b'{"environment": 1, "directory": "/"}\n'])
def test_no_greeting(pair: tuple[socket.socket, int], said: bytes) -> None:
    ours, number = pair
    ours.sendall(said)
    ours.close()
    environ = {VARIABLE: str(number), "HOME": "/"}
    with pytest.raises(LauncherError, match="who has started this in the background is gone"):
        Starter.taken(environ)
    assert environ == {"HOME": "/"}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_greeting_that_does_not_come(pair: tuple[socket.socket, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "_GREETING_TIMEOUT", 0.01)
    with pytest.raises(LauncherError, match="timed out"):
        Starter.taken({VARIABLE: str(pair[1])})


@pytest.mark.parametrize("where", ["", "/nowhere/at/all", "/" * 200, "99999999999999999999"])
def test_nobody_there(where: str) -> None:
    with pytest.raises(LauncherError, match="gone"):
        Starter.taken({VARIABLE: where})


def test_without_a_starter_nothing_happens() -> None:
    launcher = Starter.taken({})
    launcher.say("to stderr alone")
    launcher.running()
    launcher.ended(0)
    assert not launcher.is_there
