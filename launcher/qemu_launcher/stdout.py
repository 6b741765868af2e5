"""What the subcommands print, on a standard output that may be closed, full, or read by nobody any more.

A text that cannot be written is a LauncherError, or BrokenPipeError when its reader has left; never a traceback. Not so
on standard error: nobody is left who could be told.
"""

import os
import sys
from typing import Any, TextIO

from .errors import LauncherError


def say(text: str) -> None:
    """Write to stdout, as UTF-8 whatever the locale: this is the form in which QEMU gets its arguments."""
    if sys.stdout is None:
        raise LauncherError("standard output is closed")
    try:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as err:
        abandon(sys.stdout)
        raise LauncherError(f"cannot write to standard output: {err.strerror}") from err


def say_json(value: Any, *, indent: int | None = None) -> None:
    """Write `value` as JSON and end the line. What is no valid text, such as a file's name, is escaped."""
    import json  # noqa: PLC0415  whoever prints no JSON has no use for it

    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    say(text + "\n")


def confirm(text: str) -> None:
    """Say that something has been done. It has been, whether anybody reads it or not."""
    try:
        say(text)
    except LauncherError:
        return
    except BrokenPipeError:
        abandon(sys.stdout)


def say_on_stderr(text: str) -> None:
    """Write to stderr, whether anybody reads it or not."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)


def abandon(stream: TextIO | None) -> None:
    """Send what Python still holds for `stream` to nowhere: it would fail once more at the exit, with status 120."""
    if stream is not None:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())
