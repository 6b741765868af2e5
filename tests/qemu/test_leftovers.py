"""A VM is started twice, or after a crash, with real QEMUs: refused clearly, or started as if nothing had been."""

import os
import signal
import socket
from typing import Any

import pytest

from qemu.launched import Home, Run, wait_gone
from qemu.test_finding import TUNED

VM = "vm-under-test"


def started(home: Home, **definition: Any) -> Run:
    home.define(**definition)
    run = home.start()
    run.wait_line(rf"^{VM}: (running|paused), |^{VM}: paused, as")
    return run


def second_start(home: Home) -> str:
    again = home.start()
    assert again.end() == 1
    return again.output


def test_second_start_says_what_may_be_done_instead(home: Home) -> None:
    run = started(home)
    assert second_start(home) == (
        f"qemu-launcher: {VM} is already running (PID {run.qemu_pid})\n"
        f"    see it with: qemu-launcher status {VM}\n"
        f"    power it down with: qemu-launcher stop {VM}\n"
        f"    cut its power with: qemu-launcher kill {VM}\n"
    )
    assert home.ask("pause", VM).returncode == 0
    assert second_start(home).startswith(
        f"qemu-launcher: {VM} is already running (PID {run.qemu_pid}), and paused\n"
        f"    let it go on with: qemu-launcher resume {VM}\n"
        f"    see it with: qemu-launcher status {VM}\n"
    )


def test_second_start_of_a_vm_that_waits_for_its_user(home: Home) -> None:
    run = started(home, qemu=("S",), **TUNED)
    assert second_start(home).startswith(
        f"qemu-launcher: {VM} is already running (PID {run.qemu_pid}), and waits to be started\n"
        f"    start its guest with: qemu-launcher resume {VM}\n"
    )


def test_second_start_of_a_vm_that_hangs(home: Home) -> None:
    run = started(home)
    os.kill(run.qemu_pid, signal.SIGSTOP)
    try:
        assert second_start(home).startswith(f"qemu-launcher: {VM} is already running (PID {run.qemu_pid})\n")
    finally:
        os.kill(run.qemu_pid, signal.SIGCONT)


@pytest.mark.parametrize("first", ["launcher", "qemu"])
def test_start_after_launcher_and_qemu_were_killed(home: Home, first: str) -> None:
    """What they leave: a record that names them, and a socket on which nobody listens."""
    run = started(home, **TUNED)
    pid = run.qemu_pid
    if first == "launcher":
        run.process.kill()
        run.process.wait()
        os.kill(pid, signal.SIGKILL)
    else:
        run.process.send_signal(signal.SIGSTOP)  # so that it cannot tidy up
        os.kill(pid, signal.SIGKILL)
        run.process.kill()
        run.process.wait()
    wait_gone(pid)
    assert (home.runtime / "qemu-launcher" / f"{VM}.sock").is_socket()
    assert home.record()["qemu"][0] == pid
    assert home.ask("status", VM).returncode == 3
    again = started(home, **TUNED)
    assert again.qemu_pid != pid
    assert home.ask("pause", VM).returncode == 0


def test_start_over_garbage(home: Home) -> None:
    place = home.runtime / "qemu-launcher"
    place.mkdir(mode=0o700)
    (place / f"{VM}.lock").write_bytes(b"\0garbage\xff" * 1000)
    (place / f"{VM}.sock").write_text("no socket")
    run = started(home)
    assert f"{VM}: running, PID {run.qemu_pid}\n" in home.ask("status").stdout


def test_what_cannot_be_repaired_is_named_and_nothing_is_started(home: Home) -> None:
    place = home.runtime / "qemu-launcher"
    (place / f"{VM}.sock").mkdir(parents=True)
    place.chmod(0o700)
    home.define()
    assert second_start(home) == (
        f"qemu-launcher: cannot make the control socket {place}/{VM}.sock: a directory is in its place\n"
        "    no launcher has put it there: remove it, and start again\n"
    )
    assert home.leftovers() == []
    (place / f"{VM}.sock").rmdir()
    (place / f"{VM}.lock").unlink()
    os.mkfifo(place / f"{VM}.lock")
    assert second_start(home) == (
        f"qemu-launcher: cannot make the lock file {place}/{VM}.lock: a FIFO is in its place\n"
        "    no launcher has put it there: remove it, and start again\n"
    )
    assert home.ask("status", VM).returncode == 3
    assert home.ask("list").returncode == 0


def test_socket_of_somebody_else_is_not_taken_for_qemu(home: Home) -> None:
    """A record that names a living process, and a socket behind which another program listens and is silent."""
    run = started(home)
    path = home.runtime / "qemu-launcher" / f"{VM}.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        directory = os.open(path.parent, os.O_PATH)
        other.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        other.listen()
        assert f"{VM}: running (control socket busy), PID {run.qemu_pid}\n" in home.ask("status").stdout
