"""A dbus-daemon of the test's own that stands in for the system bus, with the fake helper activatable on it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu.launched import PATIENCE

CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={place}/socket</listen>
  <auth>EXTERNAL</auth>
  {services}
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
    <allow user="*"/>
    {policy}
  </policy>
</busconfig>
"""


class PrivateBus:
    """The bus, what its helper is to do, and what it was asked."""

    def __init__(self, place: Path, address: str) -> None:
        self.place = place
        self.address = address

    @property
    def environment(self) -> dict[str, str]:
        return {"DBUS_SYSTEM_BUS_ADDRESS": self.address}

    def plan(self, **members: Any) -> None:
        """What the helper is to do for each member; the rest it does in earnest."""
        (self.place / "plan.json").write_text(json.dumps(members))

    def calls(self) -> list[dict[str, Any]]:
        """All calls the helper has received, oldest first."""
        log = self.place / "calls.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def members(self) -> list[str]:
        return [call["member"] for call in self.calls()]


@contextmanager
def private_bus(place: Path, *, helper: bool = True, policy: str = "") -> Iterator[PrivateBus]:
    """Start the daemon; it ends the helper with itself, by closing the helper's connection.

    A daemon that is started again in the same `place` has the same address.
    """
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    services = place / "services"
    services.mkdir(parents=True, exist_ok=True)
    (place / "socket").unlink(missing_ok=True)
    if helper:
        script = Path(__file__).with_name("fake_helper.py")
        (services / "org.qemulauncher.Helper1.service").write_text(
            "[D-BUS Service]\nName=org.qemulauncher.Helper1\n"
            f"Exec={sys.executable} {script} {place}/plan.json {place}/calls.log\n"
        )
    configuration = place / "bus.conf"
    configuration.write_text(
        CONFIGURATION.format(place=place, services=f"<servicedir>{services}</servicedir>", policy=policy)
    )
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert daemon.stdout is not None
        bus = PrivateBus(place, daemon.stdout.readline().strip())
        bus.plan()
        yield bus
    finally:
        daemon.terminate()
        daemon.wait(PATIENCE)
        assert daemon.stdout is not None
        daemon.stdout.close()
