"""Our own stderr while a VM runs, at which the launcher must not stand still.

Why it exists: who reads there may have stopped, by Ctrl-S, in a stalled ssh, in a pager. A launcher that waits for him
hears neither signals nor systemd, and its guest is not powered down. So what finds no room within a moment is lost.

The flags of stderr are QEMU's and the shell's too and stay as they are; terminals and pipes are opened once more
instead. Where that is not possible (a socket; the terminal of another user, who started us) poll(2) says whether there
is room for one small piece, and only somebody else who fills it in that very moment can hold us up.
"""

import contextlib
import os
import select
import stat
import time

_STDERR = 2
_PATIENCE = 0.1  # seconds; a reader who is merely slow loses nothing


def write(data: bytes) -> None:
    """Write as much of it as there is room for, up to PIPE_BUF (4096 bytes) in one go. Never fails."""
    fd = _opened_anew()
    try:
        with contextlib.suppress(OSError):
            _write(_STDERR if fd is None else fd, data)
    finally:
        if fd is not None:
            os.close(fd)


def _opened_anew() -> int | None:
    with contextlib.suppress(OSError):
        mode = os.fstat(_STDERR).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open(f"/proc/self/fd/{_STDERR}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return None


def _write(fd: int, data: bytes) -> None:
    room = select.poll()
    room.register(fd, select.POLLOUT)
    end = time.monotonic() + _PATIENCE
    while data:
        left = end - time.monotonic()
        if not room.poll(max(0.0, left) * 1000):
            return
        try:
            data = data[os.write(fd, data[: select.PIPE_BUF]) :]
        except BlockingIOError:  # room, but not enough of it
            if left <= 0:
                return
