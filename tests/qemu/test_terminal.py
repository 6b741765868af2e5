"""The user's terminal: stdio is QEMU's, Ctrl-C is the launcher's, and it is given back as it was found."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from qemu.launched import PATIENCE, Home, Qmp

# The launcher as a shell has it: leader of a session with this terminal, in the foreground. `setsid -c` does that.
LEADER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"

# A shell with job control in small: runs the launcher in the foreground, takes the terminal back on SIGUSR1, sets its
# own modes, and tells whether they are still there when the launcher has ended.
SHELL = """\
import fcntl, os, signal, subprocess, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
job = subprocess.Popen(sys.argv[1:], process_group=0)
os.tcsetpgrp(0, job.pid)
signal.sigwait([signal.SIGUSR1])
os.tcsetpgrp(0, os.getpgrp())
mine = termios.tcgetattr(0)
mine[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, mine)
print("shell: mine again", flush=True)
job.wait()
print("shell: as I left it" if termios.tcgetattr(0) == mine else "shell: changed", flush=True)
"""


class Terminal:
    """A pty with one launcher in it. Its leader stays alive after the launcher, as a shell does."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.master, self.slave = pty.openpty()
        self.screen = b""
        self.before = termios.tcgetattr(self.slave)
        self.flags = fcntl.fcntl(self.slave, fcntl.F_GETFL)
        self.process: subprocess.Popen[bytes] | None = None

    def start(
        self, name: str = "vm-under-test", *, argv: list[str] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        command = argv or self.home.command("run", name)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, *command],
            env={**self.home.environment, **(env or {})},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
        )

    def wait(self, pattern: str) -> None:
        while not re.search(pattern.encode(), self.screen):
            assert select.select([self.master], [], [], PATIENCE)[0], self.screen.decode()
            self.screen += os.read(self.master, 65536)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def end(self) -> int:
        assert self.process is not None
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.05)[0]:
                self.screen += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self.master, self.slave):
            os.close(fd)


@pytest.fixture
def terminal(home: Home) -> Iterator[Terminal]:
    terminal = Terminal(home)
    yield terminal
    terminal.close()


def on_stdio(home: Home) -> None:
    path = home.define()
    path.write_text(path.read_text().replace("- nodefaults\n- display: none\n", "- nographic\n"))


def test_nographic_has_its_monitor_and_leaves_the_terminal_as_it_was(home: Home, terminal: Terminal) -> None:
    on_stdio(home)
    terminal.start()
    terminal.wait("vm-under-test: running")
    assert termios.tcgetattr(terminal.slave) != terminal.before
    terminal.type(b"\x01c")
    terminal.wait(r"\(qemu\)")
    terminal.type(b"info status\r")
    terminal.wait("VM status: running")
    terminal.type(b"quit\r")
    assert terminal.end() == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_terminal_is_restored_after_a_killed_qemu(home: Home, terminal: Terminal) -> None:
    on_stdio(home)
    terminal.start()
    terminal.wait("vm-under-test: running")
    assert termios.tcgetattr(terminal.slave) != terminal.before
    os.kill(home.record()["qemu"][0], signal.SIGKILL)
    assert terminal.end() == 128 + signal.SIGKILL
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert fcntl.fcntl(terminal.slave, fcntl.F_GETFL) == terminal.flags


@pytest.mark.parametrize(
    ("then", "keys", "message"),
    [
        ("exit 3", {}, "QEMU ended with exit status 3 before the guest ran"),
        ("kill -9 $$", {}, "QEMU ended by signal 9"),
        ('exec qemu-system-x86_64 "$@"', {"vcpu_pinning": [0, 0], "isolation": "affinity"}, "QEMU has no vCPU 1"),
    ],
    ids=["early death", "early death by a signal", "tuning failure"],
)
def test_terminal_is_restored_when_the_guest_never_ran(
    home: Home, terminal: Terminal, then: str, keys: dict[str, Any], message: str
) -> None:
    """The wrapper leaves it raw, as a QEMU does that cannot clean up."""
    wrapper, changed = home.configuration / "wrapper", home.configuration / "changed"
    wrapper.write_text(f"#!/bin/sh\nstty raw -echo && stty -a >{changed}\n{then}\n")
    wrapper.chmod(0o755)
    home.define(binary=str(wrapper), **keys)
    terminal.start()
    assert terminal.end() != 0
    terminal.wait(message)
    assert " -echo " in changed.read_text()
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert fcntl.fcntl(terminal.slave, fcntl.F_GETFL) == terminal.flags


def test_ctrl_c_at_the_terminal_asks_and_a_second_cuts(home: Home, terminal: Terminal) -> None:
    home.define()
    terminal.start()
    terminal.wait("vm-under-test: running")
    terminal.type(b"\x03")
    terminal.wait("asked the guest to power down; Ctrl-C again cuts the power")
    terminal.type(b"\x03")
    assert terminal.end() == 0


def test_closed_terminal_asks_the_guest(home: Home, terminal: Terminal) -> None:
    """The window is closed: SIGHUP to the whole session, and nobody reads what the launcher says."""
    home.define()
    terminal.start()
    terminal.wait("vm-under-test: running")
    qmp = Qmp(home.runtime / "qemu-launcher" / "vm-under-test.sock")
    os.close(terminal.master)
    os.close(terminal.slave)
    qmp.wait_event("POWERDOWN")
    assert qmp("query-status")["running"]
    qmp("quit")
    assert terminal.process is not None
    assert terminal.process.wait(PATIENCE) == 0
    terminal.master, terminal.slave = pty.openpty()


def test_stopped_terminal_does_not_stop_the_launcher(home: Home, terminal: Terminal) -> None:
    """Ctrl-S, or an ssh that hangs: it would stand still at its first word, and let the guest be killed at the end."""
    home.define(shutdown_timeout=1)
    terminal.start()
    terminal.wait("vm-under-test: running")
    termios.tcflow(terminal.slave, termios.TCOOFF)
    assert terminal.process is not None
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(PATIENCE) == 0


def test_launcher_in_the_background_leaves_the_terminal_alone(home: Home, terminal: Terminal) -> None:
    """The foreground belongs to somebody else by the time QEMU ends: his modes stay."""
    on_stdio(home)
    argv = [sys.executable, "-c", SHELL, *home.command("run", "vm-under-test")]
    terminal.process = subprocess.Popen(
        argv,
        env=home.environment,
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
    )
    terminal.wait("vm-under-test: running")
    terminal.process.send_signal(signal.SIGUSR1)
    terminal.wait("shell: mine again")
    os.kill(home.record()["qemu"][0], signal.SIGKILL)
    terminal.wait("shell: as I left it")
    assert terminal.end() == 0


def test_status_on_a_terminal_is_a_table(home: Home, terminal: Terminal) -> None:
    home.define()
    run = home.start()
    run.wait_running()
    argv = [sys.executable, "-c", LEADER, *home.command("status")]
    terminal.process = subprocess.Popen(
        argv,
        env={**home.environment, "TERM": "xterm"},
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
    )
    terminal.wait("┗|╰|└|┴")
    assert terminal.end() == 0
    assert "vCPU" in terminal.screen.decode()
