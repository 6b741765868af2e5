"""What is said to a service manager, over a real socket; one that is not there, or deaf, does no harm."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_launcher import notify
from qemu_launcher.notify import Manager


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[socket.socket]:
    """The manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(os.fspath(tmp_path / "notify"))
        manager.settimeout(10)
        yield manager


def received(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_the_life_of_a_service(heard: socket.socket) -> None:
    manager = Manager(heard.getsockname())
    manager.status("starting")
    manager.ready("running, untuned")
    manager.stopping("asked to power down", 60.0)
    manager.stopping("asked to power down", None)
    assert received(heard) == ["STATUS=starting"]
    assert received(heard) == ["READY=1", "STATUS=running, untuned"]
    assert received(heard) == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=60000000", "STATUS=asked to power down"]
    # Neither 0 nor 2^64-1, which systemd ignores (service_extend_timeout of src/core/service.c).
    assert received(heard)[1] == f"EXTEND_TIMEOUT_USEC={365 * 86400 * 10**6}"


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")  # the kernel chooses a free one
        manager.settimeout(10)
        Manager("@" + manager.getsockname()[1:].decode()).status("starting")
        assert received(manager) == ["STATUS=starting"]


def test_a_text_is_one_line_and_no_assignment_of_its_own(heard: socket.socket) -> None:
    Manager(heard.getsockname()).status("odd\nREADY=1 \x1b[31m\udcff")
    assert received(heard) == ["STATUS=odd READY=1 \\x1b[31m\\xff"]


def test_the_address_is_taken_out_of_the_environment(heard: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": heard.getsockname(), "HOME": "/home/alice"}
    Manager.taken(environ).status("starting")
    assert environ == {"HOME": "/home/alice"}
    assert received(heard) == ["STATUS=starting"]


@pytest.mark.parametrize(
    "address", [None, "", "vsock:2:9999", "relative", "/nowhere/at/all", "@nobody-listens", "/" * 300]
)
def test_nobody_there_is_no_error(address: str | None) -> None:
    manager = Manager(address)
    manager.status("starting")
    manager.ready("running")
    manager.stopping("asked to power down", None)


def test_a_manager_that_does_not_read_holds_nothing_up(heard: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_LONGEST_WAIT", 0.01)
    manager = Manager(heard.getsockname())
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue + 3):  # more than fit; the last ones would wait for ever
        manager.status("starting")
    assert received(heard) == ["STATUS=starting"]
