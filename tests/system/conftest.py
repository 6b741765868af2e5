"""System tests run inside the lab, as root, against the installed package; pytest out here only passes them in.

A test in this folder is ordinary pytest, written as if the lab were the machine: it may use whatever the host has. Run
from a checkout (`pytest tests/system`), the selected tests run in a freshly booted lab and their results come back,
see tests/lab/outside.py. Their modules are imported out here too, for collection: nothing may happen at import.

A test marked `outside` is not passed in: its fixture `installed_lab`, or `own_lab` without the package, gives it a
lab of its own, for what ends the host.

Each test runs once on every host that it is meant for (tests/lab/hosts.py): on Debian 13 if it says nothing, and with
`make test-all` on Debian 12 too.

While writing tests: `tests/lab/lab start`, then QEMU_LAUNCHER_LAB=default pytest tests/system uses that lab each time;
`lab start --recipe bookworm` makes it a Debian 12.
"""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session", autouse=True)
def lab_host(request: pytest.FixtureRequest) -> str:
    """The name of the host that the test runs on."""
    return str(request.param)


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
