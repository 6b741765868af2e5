"""Whoever has started us in the background and waits until the guest runs: `qemu-launcher start`, module `background`.

Why it exists: a service has neither the environment nor the terminal of the person who wants it. So `start` and the
launcher that it has started talk over a stream socket, one JSON object in each line:

    start to us     {"environment": {...}, "directory": "..."}   whose VM this is: taken over before anything else
    us to start     {"say": "..."}       as often as there is something for the person to read
                    {"running": true}    the last word: the guest is where its user wants it
                    {"status": 2}        the last word: we end, with this exit status

If the other side hangs up before the last word, the person does not want the VM any more. After it nobody listens, and
what is said goes to stderr alone: the journal, or a log file. Nothing here waits for a `start` that does not read, but
the last word, for a moment.
"""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from . import rundir
from .errors import LauncherError

if TYPE_CHECKING:
    import asyncio

VARIABLE = "QEMU_LAUNCHER_STARTER"  # what is in it: the number of a descriptor, or the path of a socket to connect to
_GREETING_TIMEOUT = 30.0  # seconds; it is there and has nothing else to do
_LAST_TIMEOUT = 2.0  # seconds; without its last word `start` does not know that the guest runs

# What of the person's environment belongs to the terminal or the session that is left.
OF_THE_SESSION = {
    *("COLUMNS", "GPG_TTY", "LINES", "OLDPWD", "SHLVL", "STY", "TERM", "TMUX", "TMUX_PANE", "WINDOWID", "_"),
    *("SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY"),
    *("XDG_SEAT", "XDG_SESSION_CLASS", "XDG_SESSION_ID", "XDG_VTNR"),
}
# What of the service's environment is its own: systemd.exec(5), "Environment Variables Set or Propagated"; and ours.
OF_THE_SERVICE = {
    VARIABLE,
    *("INVOCATION_ID", "JOURNAL_STREAM", "MANAGERPID", "MANAGERPIDFDID", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID"),
}
_OF_THE_USER = ("DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR")  # the service's where the person has none


class Starter:
    """The connection to `start`; without one, everything here does nothing."""

    def __init__(self, connection: socket.socket | None = None, directory: str | None = None) -> None:
        self._connection = connection
        self._directory = directory
        self._rest = b""  # of a line that did not fit as a whole into what the kernel keeps for a `start` that is slow

    @classmethod
    def taken(cls, environ: MutableMapping[str, str]) -> Self:
        """The starter that `environ` names. LauncherError if it has gone.

        Removes the variable from `environ`, which becomes the person's if there is a starter.
        """
        where = environ.pop(VARIABLE, None)
        if where is None:
            return cls()
        connection = None
        try:
            if where.isdecimal():
                connection = socket.socket(fileno=int(where))
                connection.set_inheritable(False)
            else:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                with rundir.short_path(Path(where)) as path:
                    connection.connect(path)
            connection.settimeout(_GREETING_TIMEOUT)
            directory = _adopt(json.loads(_line(connection)), environ)
            connection.setblocking(False)
        except (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError) as err:
            if connection is not None:
                connection.close()
            raise LauncherError(f"who has started this in the background is gone: {err}") from err
        # A process of its own was born where the person is, who may not be able to name that any more.
        return cls(connection, None if where.isdecimal() else directory)

    @property
    def is_there(self) -> bool:
        """Whether anybody waits for us."""
        return self._connection is not None

    def enter_directory(self) -> None:
        """Go where the person is. LauncherError if that cannot be: a folder of another user's, before sudo -u."""
        if self._directory is None:
            return
        try:
            os.chdir(self._directory)
        except OSError as err:
            raise LauncherError(
                f"cannot enter {self._directory!r}, where you have started this: {err.strerror}",
                "go to a folder that you may enter, and start it there: cd",
            ) from err

    def say(self, text: str) -> None:
        """Let the person read this; as it stands, line breaks included."""
        self._send({"say": text})

    @contextlib.contextmanager
    def wanted(self, loop: "asyncio.AbstractEventLoop", give_up: Callable[[], None]) -> Iterator[None]:
        """Call `give_up` once if the person gives up while the context lasts."""
        if self._connection is None:
            yield
            return
        fd = self._connection.fileno()

        def heard() -> None:
            loop.remove_reader(fd)
            give_up()

        loop.add_reader(fd, heard)  # `start` has said all it had to say: what comes now is its end
        try:
            yield
        finally:
            loop.remove_reader(fd)

    def running(self) -> None:
        """The last word: the guest runs."""
        self._say_last({"running": True})

    def ended(self, status: int) -> None:
        """The last word: we end with this exit status, and the guest has not run."""
        self._say_last({"status": status})

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._connection is None:
            return
        # What the kernel keeps is far more than a start has to say, but not than a QEMU with -trace may. What does not
        # fit is left out, line by line: a `start` that is stopped does not stop us.
        self._rest = self._rest or _encoded(message)
        with contextlib.suppress(OSError):
            self._rest = self._rest[self._connection.send(self._rest, socket.MSG_NOSIGNAL) :]

    def _say_last(self, message: Mapping[str, Any]) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(_LAST_TIMEOUT)
                connection.sendall(self._rest + _encoded(message), socket.MSG_NOSIGNAL)


def _encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _line(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            raise ConnectionError("it hung up")
        data += more
    return data


def _adopt(greeting: Any, environ: MutableMapping[str, str]) -> str:
    """Take over the person's environment, less what is the session's that is left. Returns where the person is."""
    theirs = {str(name): str(value) for name, value in greeting["environment"].items()}
    defaults = {name: environ[name] for name in _OF_THE_USER if name in environ}
    own = {name: environ[name] for name in OF_THE_SERVICE if name in environ}
    kept = {name: value for name, value in theirs.items() if name not in OF_THE_SESSION | OF_THE_SERVICE}
    directory = str(greeting["directory"])
    environ.clear()
    environ.update({**defaults, **kept, **own})
    return directory
