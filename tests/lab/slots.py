"""How many labs may run on this machine at once: one, unless QEMU_LAUNCHER_LAB_SLOTS says otherwise.

A slot is a file with an flock on it. QEMU inherits the locked descriptor, so the slot is taken exactly as long as the
virtual machine lives, whatever happens to whoever started it, and there is nothing stale to clean up.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from lab.errors import LabError
from lab.image import say

VARIABLE = "QEMU_LAUNCHER_LAB_SLOTS"
POLL_SECONDS = 1.0


def slot_count() -> int:
    """The number of slots, 1..16, from the environment; LabError when it is not such a number."""
    text = os.environ.get(VARIABLE, "1")
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 16):
        raise LabError(f"{VARIABLE} is {text!r}; it must be a number from 1 to 16")
    return int(text)


def take(folder: Path, holder: str, count: int) -> int:
    """A locked descriptor of a free slot below `folder`, inheritable; waits, and says so, while there is none.

    The caller closes it. `holder` is written into the slot for others to read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        for number in range(count):
            descriptor = try_lock(folder / f"slot-{number}")
            if descriptor is not None:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
                return descriptor
        if not told:
            holders = ", ".join((folder / f"slot-{n}").read_text() or "somebody" for n in range(count))
            say(f"waiting for a free slot ({count} in use by: {holders}; {VARIABLE}=N allows N labs at once)")
            told = True
        time.sleep(POLL_SECONDS)


def try_lock(path: Path) -> int | None:
    """An open descriptor with an exclusive lock on `path`, or None when another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
