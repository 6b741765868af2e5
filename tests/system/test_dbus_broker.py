"""The same host with dbus-broker as its bus, as on Fedora and Arch: access, and attack A13.

It has a lab of its own, booted for it; inside, the same system tests run as on dbus-daemon.
"""

from __future__ import annotations

import sys

import pytest

from lab.booting import boot, check_tools
from lab.errors import MissingTool
from lab.outside import REMOTE, package
from lab.recipe import PROJECT, TRIXIE, Machine

TESTS = ("test_floods.py", "test_access.py")


@pytest.mark.outside
def test_a13_on_dbus_broker(free_slot: None) -> None:
    try:
        check_tools()
        deb = package()
        with boot(TRIXIE, Machine(kernel_arguments=("lab.bus=dbus-broker",))) as vm:
            vm.install(deb)
            vm.put(PROJECT / "tests", f"{REMOTE}/tests")
            vm.put(PROJECT / "pyproject.toml", f"{REMOTE}/pyproject.toml")
            files = " ".join(f"tests/system/{name}" for name in TESTS)
            line = f"cd {REMOTE} && python3 -m pytest -q -rA -p no:cacheprovider {files} 2>&1"
            done = vm.run(line, check=False, timeout=1800)
    except MissingTool as error:
        pytest.skip(str(error))
    sys.stdout.write(done.stdout)
    assert done.status == 0
    assert done.stdout.count("PASSED tests/system/test_floods.py") == 5
