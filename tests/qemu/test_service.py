"""A launcher that a service manager has started (Type=notify): what it is told, and when."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo import guest
from qemu.launched import PATIENCE, Home
from qemu.test_run import wait_guest, with_guest


class Manager:
    """A service manager's ear."""

    def __init__(self, ear: socket.socket) -> None:
        self._ear = ear
        self.env = {"NOTIFY_SOCKET": str(ear.getsockname())}

    def next(self) -> dict[str, str]:
        """The next message, in the order of its assignments."""
        pairs = (line.partition("=") for line in self._ear.recv(4096).decode().split("\n"))
        return {name: value for name, _, value in pairs}

    def until_ready(self) -> list[dict[str, str]]:
        """All messages up to the one that says so."""
        told = [self.next()]
        while "READY" not in told[-1]:
            told.append(self.next())
        return told

    def has_heard_nothing_more(self) -> bool:
        self._ear.setblocking(False)
        try:
            self._ear.recv(4096)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def manager() -> Iterator[Manager]:
    with _manager() as listening:
        yield listening


@contextmanager
def _manager() -> Iterator[Manager]:
    with (
        tempfile.TemporaryDirectory(prefix="ql-notify-") as place,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
    ):
        ear.bind(f"{place}/notify")
        ear.settimeout(PATIENCE)
        yield Manager(ear)


def test_ready_when_the_guest_runs_and_stopping_for_as_long_as_it_may_take(home: Home, manager: Manager) -> None:
    """QEMU does not inherit the socket: no hook of its may speak for the VM."""
    home.define(qemu=with_guest(home), scheduler="batch", shutdown_timeout=600)
    run = home.start(env=manager.env)
    first, *_, ready = manager.until_ready()
    assert first == {"STATUS": "starting"}
    assert ready == {"READY": "1", "STATUS": "running, batch"}
    qmp = run.qmp()
    assert qmp("query-status")["status"] == "running"
    qmp.close()
    environment = Path(f"/proc/{run.qemu_pid}/environ").read_bytes().split(b"\0")
    assert not [one for one in environment if one.startswith(b"NOTIFY_SOCKET=")]
    assert f"HOME={os.environ['HOME']}".encode() in environment
    wait_guest(run)
    run.signal(signal.SIGTERM)
    told = manager.next()
    assert told["STOPPING"] == "1"
    assert 600e6 < int(told["EXTEND_TIMEOUT_USEC"]) < 1200e6
    assert told["STATUS"] == "asked to power down"
    assert run.end() == 0
    assert guest.FAREWELL in (home.configuration / "serial.log").read_bytes()


def test_ready_when_its_user_wants_it_to_stand_still(home: Home, manager: Manager) -> None:
    home.define(qemu=("S",))
    home.start(env=manager.env)
    assert manager.until_ready()[-1] == {"READY": "1", "STATUS": "paused, as you asked, untuned"}


def test_never_ready_when_the_guest_does_not_run(home: Home, manager: Manager) -> None:
    home.define(qemu=({"device": "no-such-device"},))
    change = "from qemu_launcher import patience; patience.FIRST_WORD = 600.0"  # else it says more of a slow QEMU
    run = home.start(argv=home.with_changed(change), env=manager.env)
    assert run.end() == 1
    assert manager.next() == {"STATUS": "starting"}
    assert manager.has_heard_nothing_more()


def test_ctrl_c_gives_the_guest_all_the_time_it_takes(home: Home, manager: Manager) -> None:
    """STOPPING=1 has systemd count TimeoutStopSec=, whoever has asked for the end."""
    home.define()
    run = home.start(env=manager.env)
    manager.until_ready()
    run.signal(signal.SIGINT)
    told = manager.next()
    assert int(told["EXTEND_TIMEOUT_USEC"]) > 30 * 86400e6
    run.signal(signal.SIGINT)
    assert manager.next() == {"STATUS": "cutting the power"}
    assert run.end() == 0
