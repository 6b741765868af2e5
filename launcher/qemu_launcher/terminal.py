"""The user's terminal, given back as it was found.

Why it exists: with `-nographic` or `-serial mon:stdio` QEMU puts the terminal into raw mode and makes its
descriptors non-blocking. It undoes that when it leaves in order, and cannot when it is killed.
Nothing is touched when stdin is no terminal, or when the terminal is in other hands by then: the shell of a
background job has set it for itself.
"""

import contextlib
import fcntl
import os
import termios
from collections.abc import Iterator
from typing import Any

_STDIO = (0, 1, 2)


def fill_standard_descriptors() -> None:
    """Open /dev/null where stdin, stdout or stderr was closed for us.

    Else the next file we open gets its number: QEMU would write its messages into our lock file. sys.stdout and
    sys.stderr stay None.
    """
    for fd in _STDIO:
        if _flags(fd) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is `fd`


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore terminal modes and the flags of the standard descriptors when the context ends."""
    modes = _modes(0)
    flags = {fd: flag for fd in _STDIO if (flag := _flags(fd)) is not None}
    try:
        yield
    finally:
        for fd, flag in flags.items():
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETFL, flag)
        if _modes(0) != modes:
            _set(modes)


@contextlib.contextmanager
def with_modes(modes: list[Any] | None) -> Iterator[None]:
    """`modes`, as `modes_now` gave them, for somebody else than who has the terminal now; then his own again."""
    found = _modes(0)
    _set(modes)
    try:
        yield
    finally:
        _set(found)


def modes_now() -> list[Any] | None:
    """The modes of our terminal; None if stdin is none."""
    return _modes(0)


def is_in_foreground() -> bool:
    """Whether stdin is our controlling terminal, and what is typed there comes to us."""
    return _in_foreground(0)


def _set(modes: list[Any] | None) -> None:
    if modes is not None and _in_foreground(0):
        # The terminal may have been hung up meanwhile: then there is nothing left to set.
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, modes)


def _modes(fd: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(fd)
    except termios.error:
        return None


def _flags(fd: int) -> int | None:
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        return None


def _in_foreground(fd: int) -> bool:
    """tcsetattr from the background would stop us with SIGTTOU (termios(3))."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
