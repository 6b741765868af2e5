"""QEMU's stderr, where somebody else than our own stderr is to have it too: `start`, until the guest runs.

Why it exists: what QEMU inherits as stderr it keeps for life, so `start` cannot be at its other end. We are, and pass
on what comes, always to our own stderr (the journal, a log file) and to `start` while it listens.

QEMU never waits for us: what does not fit into the pipe is lost, and when we die QEMU, which ignores SIGPIPE, runs on
unheard. Nor do we wait for whoever reads our stderr (`stderr`).
"""

import asyncio
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from . import stderr

_CHUNK = 1 << 16  # bytes; a pipe's whole content (pipe(7))


class Relay:
    """A context manager: when it is left, all that QEMU has said before has been passed on."""

    def __init__(self, hear: Callable[[str], None]) -> None:
        self._hear = hear
        self._reading, self.writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._reading, self._pass_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._reading)
        while self._pass_on():
            pass
        os.close(self._reading)
        self.handed_over()

    def handed_over(self) -> None:
        """QEMU has the writing end now; ours is not needed any more."""
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def _pass_on(self) -> bool:
        """Whether there was anything."""
        try:
            data = os.read(self._reading, _CHUNK)
        except BlockingIOError:
            return False
        if not data:  # nobody has it open any more
            asyncio.get_running_loop().remove_reader(self._reading)
            return False
        stderr.write(data)
        self._hear(data.decode(errors="replace"))
        return True
