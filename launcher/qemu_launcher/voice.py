"""What the launcher says while a VM runs: lines on stderr, `win11: ...`, next to what QEMU itself prints there.

Why it exists: stderr is shared with QEMU, which may have made the terminal non-blocking, and it may be gone
(closed window, full disk), or read by nobody any more (Ctrl-S). A line that cannot be written is lost; saying something
never fails, and never waits longer than a moment (`stderr`).
"""

import time
from collections.abc import Callable

from . import stderr
from .errors import one_line, printable


class Voice:
    """Speaks for one VM. Quiet (`-q`) leaves out what is merely good to know; `explains` (`--debug`): tells it all.

    `hear`: who else is told each line.
    """

    def __init__(
        self, name: str, *, quiet: bool, explains: bool = False, hear: Callable[[str], None] = lambda _: None
    ) -> None:
        self.name = name
        self._quiet = quiet
        self._hear = hear
        self._began = time.monotonic()
        self.explains = explains and not quiet

    def step(self, text: str) -> None:
        """What is being done, as it happens, for `--debug`; with the seconds since the start."""
        if self.explains:
            self.say(f"{time.monotonic() - self._began:.3f} {text}")

    def note(self, text: str) -> None:
        """Good to know."""
        if not self._quiet:
            self.say(text)

    def warn(self, text: str, hint: str | None = None) -> None:
        """Not as the definition wants it; `hint` says what to do about it."""
        # One write, as errors.render would show it: QEMU's own lines must not come in between.
        self._write("\n    ".join([one_line(f"{self.name}: warning: {text}"), *(hint or "").splitlines()]))

    def say(self, text: str) -> None:
        """What the user must know, also with `-q`."""
        self._write(one_line(f"{self.name}: {text}"))

    def _write(self, text: str) -> None:
        lines = printable(f"{text}\n")
        stderr.write(lines.encode(errors="backslashreplace"))
        self._hear(lines)
