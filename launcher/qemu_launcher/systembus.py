"""A connection to a message bus, with an end; and where the system's bus is.

Why it exists: the helper's proxy and what the desktop's services are asked for have this in common, and nothing else.
"""

import contextlib
import os

from dbus_next.aio import MessageBus

_DEFAULT_ADDRESS = "unix:path=/run/dbus/system_bus_socket"  # D-Bus specification, "System message bus"
_LONGEST_AUTH_LINE = 16384  # bytes; dbus-daemon's own limit (dbus-auth.c, MAX_BUFFER)


class Bus(MessageBus):  # type: ignore[misc]  # dbus_next carries no types
    """The library's connection, with an end: it closes what it has opened, and a bus that hangs up is noticed."""

    async def _auth_readline(self) -> str:
        # The library's own waits for ever, at full speed, on a bus that closes the connection here (it is full, say).
        line = b""
        while not line.endswith(b"\r\n"):
            byte = await self._loop.sock_recv(self._sock, 1)
            if not byte or len(line) > _LONGEST_AUTH_LINE:
                raise ConnectionError("it closed the connection")
            line += byte
        return line[:-2].decode()

    def _finalize(self, err: BaseException | None = None) -> None:
        if self._sock.fileno() >= 0:  # else the number may already be somebody else's
            super()._finalize(err)
            for end in (self._stream, self._sock):
                with contextlib.suppress(OSError):  # what could not be sent any more
                    end.close()

    def leave(self) -> None:
        self._user_disconnect = True
        self._finalize()


def address() -> str:
    """Where the system bus is, or would be."""
    return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _DEFAULT_ADDRESS
