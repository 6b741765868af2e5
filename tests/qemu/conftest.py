"""Real QEMU under emulation, one user's world for each test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu.launched import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """A fresh world; everything that was started in it is ended afterwards."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    world = Home(tmp_path)
    try:
        yield world
    finally:
        world.clean_up()
