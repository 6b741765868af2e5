"""Real QEMU under emulation, one user's world for each test."""

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.launched import Home
from qemu.private_bus import PrivateBus, private_bus


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """A background job of sh, or nohup, ignores signals; the launchers that we start would go on ignoring them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """One of these modules at a time for a user: VMs are found wherever their files are, so two would mix them up."""
    path = Path(tempfile.gettempdir()) / f"qemu-launcher-tests-{os.geteuid()}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def home(tmp_path: Path, alone: None) -> Iterator[Home]:
    """A fresh world; everything that was started in it is ended afterwards."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    world = Home(tmp_path)
    try:
        yield world
    finally:
        world.clean_up()


@pytest.fixture
def bus() -> Iterator[PrivateBus]:
    """A private system bus with a fake helper."""
    # Not under tmp_path: the address of a bus must fit into sun_path, 108 bytes.
    with tempfile.TemporaryDirectory(prefix="ql-bus-") as place, private_bus(Path(place) / "bus") as started:
        yield started
