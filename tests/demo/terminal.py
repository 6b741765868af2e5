"""A user's terminal in the lab, and what the kernel in there says: for the demo, and tests that look from outside."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab

OBSERVE = Path(__file__).with_name("observe.py")
TERMINAL_SECONDS = 3600  # then the login is cut, and whoever waits for its words sees the end of them
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|\r")


def observe(vm: lab.Vm) -> dict[str, Any]:
    """What the kernel inside says now."""
    source = OBSERVE.read_bytes()
    facts: dict[str, Any] = json.loads(vm.run("python3 -I -", input=source).stdout)
    return facts


class Terminal:
    """alice's terminal: a login with a pseudo-terminal of its own, in which the launcher runs in the foreground."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._seen = b""

    def lines_until(self, wanted: bytes) -> Iterator[str]:
        """What appears, line by line, up to the line with `wanted`; everything up to the end if that never comes."""
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = ESCAPES.sub(b"", raw)
            if line.strip():
                yield line.decode(errors="replace").rstrip()
            if wanted and wanted in line:
                return


@contextmanager
def terminal(vm: lab.Vm, user: str, command: str) -> Iterator[Terminal]:
    """Run a command on a terminal inside; hanging up ends it if it has not ended."""
    process = subprocess.Popen(
        ["timeout", str(TERMINAL_SECONDS), *vm.ssh(user, "-tt"), command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield Terminal(process)
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()
