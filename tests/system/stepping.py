"""Stops and kills the helper in the middle of its work: a unit drop-in puts stepping_helper.py in its place."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from system import host
from system.claims import copied
from system.fixtures import start_helper, stop_helper
from system.vms import HELPER_UNIT, Launch

FOLDER = Path("/run/qemu-launcher")  # the one folder that the helper's sandbox lets it write to


class Stepping:
    """What the helper is told to do."""

    def kill_at(self, step: str) -> None:
        """SIGKILL itself when it has next done `step`."""
        (FOLDER / "order").write_text(f"kill {step}")

    @property
    def obeyed(self) -> bool:
        """Whether what was ordered has happened."""
        return not (FOLDER / "order").exists()

    @contextlib.contextmanager
    def halted_at(self, step: str) -> Iterator[Halt]:
        """Stand still when it has next done `step`; it goes on at the end of the block."""
        for name in ("halted", "go"):
            (FOLDER / name).unlink(missing_ok=True)
            os.mkfifo(FOLDER / name)
        halt = Halt()
        (FOLDER / "order").write_text(f"halt {step}")
        try:
            yield halt
        finally:
            (FOLDER / "order").unlink(missing_ok=True)
            halt.close()


class Halt:
    """One halt: to wait for, and to end."""

    def __init__(self) -> None:
        self._open = True
        # Both ends open, so that neither side ever waits for the other to come.
        self._halted = os.open(FOLDER / "halted", os.O_RDWR | os.O_CLOEXEC)
        self._go = os.open(FOLDER / "go", os.O_RDWR | os.O_CLOEXEC)

    def wait(self, launch: Launch) -> None:
        """Return when the helper stands still over a call of this launcher's."""
        host.wait_for("the helper comes to that step", lambda: self.reached or not launch.is_alive)
        assert launch.is_alive, f"the launcher ended before the helper came to that step: {launch.said}"

    @property
    def reached(self) -> bool:
        """Whether the helper stands still."""
        return bool(select.select([self._halted], [], [], 0)[0])

    def close(self) -> None:
        """Let it go on, if it stands still; once is enough. Closing our end is what ends its reading."""
        if not self._open:
            return
        self._open = False
        os.write(self._go, b"go\n")
        for descriptor in (self._halted, self._go):
            os.close(descriptor)


@pytest.fixture(scope="module")
def stepping_unit() -> Iterator[None]:
    """The unit with the other program in it."""
    with replaced_helper("stepping_helper.py"):
        yield


@contextlib.contextmanager
def replaced_helper(name: str, *settings: str) -> Iterator[None]:
    """The unit with a program of the tests' in it, and more settings. No helper runs at the beginning or at the end."""
    script = copied(f"system/{name}") / name
    FOLDER.mkdir(exist_ok=True)
    drop_in = Path(f"/run/systemd/system/{HELPER_UNIT}.d/tests.conf")
    drop_in.parent.mkdir(parents=True, exist_ok=True)
    execute = f"ExecStart=/usr/bin/python3 -IS {script} --serve"
    drop_in.write_text("\n".join(["[Service]", *settings, "ExecStart=", execute, ""]))
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    stop_helper()
    yield
    drop_in.unlink()
    stop_helper()
    subprocess.run(["systemctl", "daemon-reload"], check=True)


@pytest.fixture
def stepping(stepping_unit: None) -> Iterator[Stepping]:
    """A helper that stops where it is told to."""
    yield Stepping()
    for name in ("order", "halted", "go"):
        (FOLDER / name).unlink(missing_ok=True)
    # Until it is there: after a kill, systemd may just be starting it (Restart=, OnSuccess= of the VM's scope). Were it
    # told to stop before it serves, it would end without having cleaned up, and no scope be left whose end starts it.
    start_helper()
