"""System tests run inside the lab, as root, against the installed package; pytest out here only passes them in.

A test in this folder is ordinary pytest, written as if the lab were the machine: it may use whatever the host has. Run
from a checkout (`pytest tests/system`), the selected tests run in a freshly booted lab and their results come back,
see tests/lab/outside.py. Their modules are imported out here too, for collection: nothing may happen at import.

A test marked `outside` is not passed in: its fixture `installed_lab` gives it a lab of its own, for what ends the host.

While writing tests: `tests/lab/lab start`, then QEMU_LAUNCHER_LAB=default pytest tests/system uses that lab each time.
"""

from pathlib import Path
from types import ModuleType

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Registers the half of the transport that belongs on this side."""
    if Path("/etc/qemu-launcher-lab").exists():
        from lab import inside
        from system import faults, fixtures, stepping

        side: ModuleType = inside
        config.pluginmanager.register(fixtures, "system-fixtures")
        config.pluginmanager.register(stepping, "system-stepping")
        config.pluginmanager.register(faults, "system-faults")
    else:
        from lab import outside

        side = outside
    config.pluginmanager.register(side, "lab-transport")
