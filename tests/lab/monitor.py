"""A few QMP commands to the lab's own QEMU: blocking, one at a time, events ignored."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.errors import LabError


class Monitor:
    """One connection to a QEMU monitor. LabError when QEMU answers with an error or goes away."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw", encoding="utf-8", newline="\n")
        self._read()  # the greeting
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: Any) -> Any:
        try:
            self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
            self._file.flush()
            while True:
                message = self._read()
                if "return" in message:
                    return message["return"]
                if "error" in message:
                    raise LabError(f"QEMU refused {name}: {message['error'].get('desc')}")
        except (OSError, ValueError) as error:
            raise LabError(f"QEMU's monitor went away during {name}: {error}") from error

    def human(self, line: str) -> str:
        """A command of the human monitor, for what QMP does not offer."""
        return str(self.command("human-monitor-command", **{"command-line": line}))

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise ValueError("end of file")
        message: dict[str, Any] = json.loads(line)
        return message


def _connect(connection: socket.socket, address: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return connection.connect(address)
        except ConnectionRefusedError:  # bound, but not listening yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def monitor(folder: Path, timeout: float = 60.0) -> Iterator[Monitor]:
    """A connection to `qmp.sock` in `folder`; each answer may take up to `timeout` seconds."""
    # A socket address holds 107 bytes, the project may lie deeper than that: go through a descriptor of the folder.
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout)
            try:
                _connect(connection, f"/proc/self/fd/{descriptor}/qmp.sock", timeout)
                yield Monitor(connection)
            except (OSError, ValueError) as error:
                raise LabError(f"QEMU's monitor does not answer: {error}") from error
    finally:
        os.close(descriptor)
