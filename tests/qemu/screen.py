"""A terminal with a command of ours on it: what is typed, what is shown."""

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from qemu.launched import PATIENCE, Home


class Screen:
    """What `process` shows, and the keyboard."""

    def __init__(self, leader: int, process: "subprocess.Popen[bytes]") -> None:
        self._leader = leader
        self.process = process
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def wait(self, words: str, *, pressing: str = "") -> str:
        """What was shown until `words`; both are taken out. `pressing`: keys to press, again if nothing comes of it.

        A Ctrl-C that comes while Python's readline module is not waiting for a key is acted on with the next key.
        """
        deadline = time.monotonic() + PATIENCE
        self.type(pressing)
        while words not in self.shown:
            left = deadline - time.monotonic()
            assert left > 0, f"no {words!r} in {self.shown!r}"
            if not select.select([self._leader], [], [], min(left, 1.0) if pressing else left)[0]:
                self.type(pressing)
                continue
            try:
                data = os.read(self._leader, 65536)
            except OSError:  # EIO: nobody has the other end any more
                data = b""
            assert data, f"ended without {words!r}: {self.shown!r}"
            self.shown += data.decode().replace("\r\n", "\n")
        found, _, self.shown = self.shown.partition(words)
        return found


@contextmanager
def on_terminal(
    home: Home, *words: str, term: str = "dumb", change: str = "", size: tuple[int, int] = (24, 80)
) -> Iterator[Screen]:
    """The command `words` on a terminal of its own, with `size` lines and columns."""
    argv = home.changed_command(change, *words) if change else home.command(*words)
    env = {**home.environment, "TERM": term, "INPUTRC": "/dev/null", "NO_COLOR": "1"}
    with executed(argv, env, size=size) as screen:
        yield screen


@contextmanager
def executed(
    argv: Sequence[str], env: Mapping[str, str], *, size: tuple[int, int], cwd: Path | None = None
) -> Iterator[Screen]:
    """Any program on a terminal of its own; it is killed when the context ends."""
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, size)
    process = subprocess.Popen(
        ["setsid", "--ctty", *argv], cwd=cwd, env=env, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    with process:
        try:
            yield Screen(leader, process)
        finally:
            process.kill()
            os.close(leader)
