"""What goes over the system bus, as the bus itself shows it to root (D-Bus "BecomeMonitor", busctl(1))."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from system import host
from system.people import DESK

INTERFACE = "org.qemulauncher.Helper1"


class Calls:
    """The method calls to the helper since the watch began."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def messages(self) -> list[dict[str, Any]]:
        """All that was seen, in order."""
        lines = self._log.read_text(errors="replace").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def members(self) -> list[str]:
        """Which methods were called, in order."""
        return [str(message["member"]) for message in self.messages() if message.get("interface") == INTERFACE]


@contextmanager
def helper_calls() -> Iterator[Calls]:
    """Watch the calls to the helper; the watch has begun when the block does."""
    log = DESK / "calls"
    matches = (f"type='method_call',interface='{INTERFACE}'", "type='method_call',member='GetId'")
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["busctl", "monitor", "--json=short", *(f"--match={match}" for match in matches)],
            stdout=out,
            stderr=subprocess.DEVNULL,
        )
    try:
        calls = Calls(log)
        host.wait_for("the bus is watched", lambda: _seen(calls))
        yield calls
    finally:
        process.terminate()
        process.wait()


def _seen(calls: Calls) -> bool:
    """Whether a call of our own is seen."""
    bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId")
    subprocess.run(["busctl", "call", *bus], check=True, stdout=subprocess.DEVNULL)
    return any(message.get("member") == "GetId" for message in calls.messages())
