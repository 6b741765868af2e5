"""A plain, blocking D-Bus client: well-behaved by default, and able to send any bytes at all."""

import io
import itertools
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any, Self

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message

NAME, PATH = "org.qemulauncher.Helper1", "/org/qemulauncher/Helper1"
INTERACTIVE = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
NO_REPLY = MessageFlag.NO_REPLY_EXPECTED


class Reply:
    """What came back, and to which call: an error's name, or None; and the body."""

    def __init__(self, message: Message) -> None:
        self.serial: int = message.reply_serial
        self.error: str | None = message.error_name
        self.body: list[Any] = message.body
        self.signature: str = message.signature

    @property
    def short(self) -> str:
        """The last part of the error's name, or "ok"."""
        return self.error.rpartition(".")[2] if self.error else "ok"

    def __repr__(self) -> str:
        return f"{self.short} {self.body}"


class Client:
    """One connection."""

    def __init__(self, path: str, *, descriptors: bool = False) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self._serials = itertools.count(1)
        self._buffer = b""
        self.socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
        assert self._line().startswith(b"OK")
        if descriptors:
            self.socket.sendall(b"NEGOTIATE_UNIX_FD\r\n")
            assert self._line().startswith(b"AGREE_UNIX_FD")
        self.socket.sendall(b"BEGIN\r\n")
        self.unique_name: str = self.daemon("Hello").body[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\r\n"):
            line += self.socket.recv(1)
        return line

    def message(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        destination: str | None = NAME,
        path: str = PATH,
        interface: str | None = NAME,
        flags: MessageFlag = MessageFlag.NONE,
        kind: MessageType = MessageType.METHOD_CALL,
    ) -> tuple[int, bytes]:
        """Serial and bytes of a message."""
        serial = next(self._serials)
        message = Message(
            destination, path, interface, member, kind, flags, signature=signature, body=list(body), serial=serial
        )
        return serial, bytes(message._marshall())

    def copies(self, data: bytes, number: int) -> bytes:
        """So many messages like `data`, each with its own serial: the bus takes each only once."""
        serials = (next(self._serials).to_bytes(4, "little") for _ in range(number))
        return b"".join(data[:8] + serial + data[12:] for serial in serials)

    def send(self, member: str, signature: str = "", body: Sequence[Any] = (), **more: Any) -> int:
        """Send a message; return its serial."""
        serial, data = self.message(member, signature, body, **more)
        self.socket.sendall(data)
        return serial

    def answer(self, reply: Message) -> None:
        """Send a reply or an error that dbus-next has made of a call."""
        reply.serial = next(self._serials)
        self.socket.sendall(bytes(reply._marshall()))

    def receive(self, seconds: float = 60.0) -> Message | None:
        """The next message of any kind; None if none comes in time. Raises EOFError when the bus has hung up."""
        data = self.receive_bytes(seconds)
        return Unmarshaller(io.BytesIO(data)).unmarshall() if data else None

    def receive_bytes(self, seconds: float = 60.0) -> bytes:
        """The same, unparsed; none if nothing comes in time."""
        end = time.monotonic() + seconds
        while True:
            if len(self._buffer) >= 16:
                length = int.from_bytes(self._buffer[4:8], "little")
                fields = int.from_bytes(self._buffer[12:16], "little")
                total = 16 + fields + -fields % 8 + length
                if len(self._buffer) >= total:
                    data, self._buffer = self._buffer[:total], self._buffer[total:]
                    return data
            if not select.select([self.socket], [], [], max(0.0, end - time.monotonic()))[0]:
                return b""
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self._buffer += data

    def reply(self, seconds: float = 60.0) -> Reply | None:
        """The next reply to whatever; None if none comes in time."""
        while (message := self.receive(seconds)) is not None:
            if message.reply_serial:
                return Reply(message)
        return None

    def waiting(self, seconds: float) -> list[Reply]:
        """All replies that come before there is none for so long."""
        return list(iter(lambda: self.reply(seconds), None))

    def replies(self, serials: Sequence[int], seconds: float = 60.0) -> list[Reply]:
        """The replies to `serials`, in that order."""
        got: dict[int, Reply] = {}
        wanted = set(serials)
        while wanted - set(got):
            message = self.receive(seconds)
            assert message is not None, f"{len(wanted - set(got))} of {len(wanted)} calls got no reply"
            if message.reply_serial in wanted:
                got[message.reply_serial] = Reply(message)
        return [got[serial] for serial in serials]

    def call(self, member: str, signature: str = "", body: Sequence[Any] = (), **more: Any) -> Reply:
        """Call, by default the helper; wait for the reply."""
        return self.replies([self.send(member, signature, body, **more)])[0]

    def daemon(self, member: str, signature: str = "", body: Sequence[Any] = ()) -> Reply:
        """Call the bus."""
        bus = "org.freedesktop.DBus"
        return self.call(member, signature, body, destination=bus, path="/org/freedesktop/DBus", interface=bus)
