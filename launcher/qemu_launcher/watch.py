"""`status --watch`: the picture, drawn again every two seconds in the same place.

Why it exists: to see what a VM does while something else is done with it. As watch(1) does, it ends with Ctrl-C and
that is no failure. Nothing of the terminal is changed that would have to be put back, so it may be stopped, hung up and
killed at any moment; what was there last stays.

Refused: a standard output that cannot be redrawn (UsageError). NotRunning (exit 3) if the named VM does not run; when
it ends later, that is said, and is no failure.
"""

import asyncio
import os
import sys
import time

from . import status, stdout, table
from .errors import NotRunning, UsageError

INTERVAL = 2.0  # seconds
_UNKNOWN_HEIGHT = 24  # a terminal that does not know, as on a serial line, says 0

# ECMA-48: cursor home, erase to the end of the line, and of the screen; and DEC's automatic wrapping of long lines, off
# while a frame is drawn, since a wrapped line would move all that is below it.
_HOME, _TO_LINE_END, _TO_SCREEN_END, _WRAP_OFF, _WRAP_ON = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[?7l", "\x1b[?7h"


def show(name: str | None) -> int:
    """Show one VM until it ends, or all of this user, again and again. Returns the exit status."""
    _validate_terminal()
    seen = False
    try:
        while True:
            text = _text(asyncio.run(status.pictures_of(name)))
            height = os.get_terminal_size(sys.stdout.fileno()).lines or _UNKNOWN_HEIGHT
            stdout.say(frame([*text.splitlines(), _footer()], height, first=not seen))
            seen = True
            time.sleep(INTERVAL)
    except NotRunning:
        if not seen:
            raise
        stdout.say(f"{name} has ended\n")
    except KeyboardInterrupt:
        stdout.say("\n")
    return 0


def frame(lines: list[str], height: int, *, first: bool) -> str:
    """What draws `lines` over the last frame, and leaves the cursor below them. The last line is never left out."""
    room = max(1, height - 2)  # for the last line, and for the cursor
    above, last = lines[:-1], lines[-1]
    if len(above) > room:
        left_out = len(above) - room + 1
        above = [*above[: room - 1], f"... and {left_out} lines more, for which this terminal is too small"]
    start = _HOME + (_TO_SCREEN_END if first else "")
    drawn = "".join(f"{line}{_TO_LINE_END}\n" for line in (*above, last))
    return f"{start}{_WRAP_OFF}{drawn}{_WRAP_ON}{_TO_SCREEN_END}"


def _text(pictures: list[status.Picture]) -> str:
    if not pictures:
        return status.nothing_runs()
    return table.drawn(lambda page: status.draw(pictures, page))


def _footer() -> str:
    return f"{time.strftime('%H:%M:%S')}, every {INTERVAL:.0f} s; Ctrl-C ends this"


def _validate_terminal() -> None:
    if sys.stdout is None or not sys.stdout.isatty():
        raise UsageError(
            "--watch redraws a terminal, and standard output is none",
            "for a program: qemu-launcher status --json, as often as it likes",
        )
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError("--watch redraws a terminal, and this one cannot be redrawn (TERM is dumb, or not set)")
