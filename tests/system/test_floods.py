"""Attack A13 on a whole host: floods by a member and by an outsider, on whatever bus the host has.

What is asserted is the helper: the same process, its memory, its descriptors, and that others are answered. What the
bus does to the flooder's own connection differs from bus to bus and is only printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from system import host
from system.claims import Claimant, copied
from system.people import User

# A flood ends at the bus and in the helper's own queues, before any mechanism; what the bus does is each bus's own.
pytestmark = pytest.mark.hosts(
    "trixie", "broker", more=("bookworm",), why="floods take minutes, meet no mechanism, and are for the bus to bear"
)
MIB = 1 << 20


def peak(pid: int) -> int:
    """Peak resident memory in bytes."""
    return int(host.status(pid)["VmHWM"].split()[0]) << 10


def test_the_bus_is_the_one_that_this_host_was_booted_with() -> None:
    broker = "lab.bus=dbus-broker" in (host.PROC / "cmdline").read_text()
    assert bool(host.processes("dbus-broker")) == broker
    command = ["systemctl", "show", "--property=MainPID", "--value", "dbus.service"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    name = host.status(int(done.stdout))["Name"]
    assert name == ("dbus-broker-lau" if broker else "dbus-daemon")


@pytest.mark.parametrize("way", ["bursts", "large", "fields", "shapes"])
def test_a13_floods(alice: User, bob: User, carol: User, way: str) -> None:
    script = copied("system/flooder.py", "bus/client.py") / "flooder.py"
    with Claimant(carol) as honest:
        assert honest.call("GetLimits", "").error == "ok"
        pid = host.helper()
        assert pid is not None
        files = host.descriptors(pid)
        for flooder in (alice, bob):  # a member; and one whom the bus stops
            said: list[str] = []

            def flood() -> None:
                done = flooder.login.run(f"/usr/bin/python3 {script} {way}")  # noqa: B023
                said.append(done.stdout if done.status == 0 else done.stderr)  # noqa: B023

            thread = threading.Thread(target=flood)
            thread.start()
            while thread.is_alive():
                assert honest.call("GetLimits", "").error == "ok"
                time.sleep(0.2)
            assert said
            sys.stdout.write(f"{way} by {flooder.name}: {said[0]}")
            assert isinstance(json.loads(said[0]), dict), said[0]
        child = honest.spawn(1)
        assert honest.pin(child, "vm", 4).error == "ok"
        assert host.isolated() == {4, 5}
        assert host.helper() == pid
        assert peak(pid) < 110 * MIB
        assert host.descriptors(pid) == files
