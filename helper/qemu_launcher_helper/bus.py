"""The connection to the system bus: frames messages, hands calls to the service, makes our own calls.

The only importer of dbus_next, and of that only of its codec: Message, Variant and the unmarshaller. The library's
own connection class dies of a full socket buffer, parses messages of any size from anybody, reads past the end of a
malformed one into the next, leaks file descriptors and answers with tracebacks; asyncio's streams do none of that.

What it refuses, before anything but the header is parsed:
- messages over MAX_MESSAGE_BYTES (drained, unanswered: no client of ours makes such);
- everything that is no method call to us and no reply that we wait for: signals, of whomever, mean nothing to us;
- file descriptors: they are not negotiated, so the bus delivers none, and a plain recv(2) would drop them.
Each message is parsed alone, from its own bytes, and whatever the parser makes of odd ones hurts that message only.
A call's body is parsed only when the service asks for it, after it has compared the signature with its table.

Specification: https://dbus.freedesktop.org/doc/dbus-specification.html. The socket's path is a constant, never taken
from the environment; only tests pass another.
"""

import asyncio
import io
import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import SignatureTree, Variant as Variant  # noqa: PLC0414  for all who make or read type v

from .contract import CALL_SECONDS, DAEMON_SECONDS, JOB_PAUSE, JOB_SECONDS, MAX_MESSAGE_BYTES, CallFailed

SOCKET = "/run/dbus/system_bus_socket"
INTERACTIVE = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
Body = list[Any]
Peer = tuple[str, str, str]  # bus name, object path, interface
DAEMON: Peer = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
SYSTEMD: Peer = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
# Bytes up to and including the length of the header fields. The library keeps every signature that anybody ever sent,
# at up to 46 KiB each; those of header fields come again with each message. What the bus lets only those send whom we
# have called: a signal, which anybody may send us while we have no name, can name a call as well.
_FIXED_HEADER, _MAX_SIGNATURES, _ANSWERS = 16, 32, (MessageType.METHOD_RETURN, MessageType.ERROR)


class Call(NamedTuple):
    """A method call to us: its header, parsed (sender, path, flags, ...), and the bytes of the whole message."""

    header: Message
    data: bytes

    def body(self) -> Body:
        """Parse the body; one that is not what its signature says has no values."""
        message = _parse(self.data)
        return [] if message is None else message.body


class SystemBus:
    """One connection. `reading` is done when it is lost; `on_call` gets every call and must not block."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.on_call: Callable[[Call], None] = lambda _: None
        self._reader, self._writer = reader, writer
        self._serials, self._waiting = itertools.cycle(range(1, 2**32)), dict[int, asyncio.Future[Message | None]]()
        self.reading = asyncio.create_task(self._read_forever())

    @classmethod
    async def connect(cls, path: str = SOCKET) -> "SystemBus":
        """Join the bus whose socket is `path`. Raises OSError (also for silence) or CallFailed."""
        async with asyncio.timeout(CALL_SECONDS):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n")
            if not (await reader.readline()).startswith(b"OK "):
                raise ConnectionError("the bus refused the authentication")
            writer.write(b"BEGIN\r\n")
        bus = cls(reader, writer)
        await bus.daemon("Hello", answer="s")
        return bus

    async def close(self) -> None:
        """Send what is still to be sent, then leave the bus."""
        self.reading.cancel()
        self._writer.close()
        await self._writer.wait_closed()

    async def call(self, to: Peer, member: str, form: str, body: Body, answer: str, wait: float = CALL_SECONDS) -> Body:
        """Call with a body of signature `form`, wait at most `wait` seconds, return the reply's, of signature `answer`.

        Raises CallFailed for an error, for silence, for a lost bus, and for another signature.
        """
        future: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        serial = self._send(Message(*to, member, signature=form, body=body))
        self._waiting[serial] = future
        try:
            await asyncio.wait({future, self.reading}, timeout=wait, return_when="FIRST_COMPLETED")
        finally:
            self._waiting.pop(serial, None)
        if not future.done():
            raise CallFailed("lost the bus" if self.reading.done() else "timeout", f"no answer to {member}")
        reply = future.result()
        if reply is not None and reply.message_type is MessageType.ERROR:
            raise CallFailed(str(reply.error_name), str(reply.body[0]) if reply.body else "")
        if reply is None or reply.signature != answer:
            raise CallFailed("unexpected", f"the answer to {member} is malformed")
        return list(reply.body)

    async def daemon(self, member: str, *strings: str, answer: str = "") -> Body:
        """Call the bus itself, with strings."""
        return await self.call(DAEMON, member, "s" * len(strings), list(strings), answer, DAEMON_SECONDS)

    async def is_there(self, name: str) -> bool:
        """Tell whether unique name `name` is on the bus; they are never used again."""
        with suppress(CallFailed):
            return await self.daemon("NameHasOwner", name, answer="b") == [True]
        return False

    async def start_unit(self, name: str, properties: Body) -> None:
        """Have systemd start a transient unit, and wait, at most JOB_SECONDS, until it is done with that job.

        Raises CallFailed when systemd does not take the job, or is not done with it in time; then it is cancelled, as
        what it names may be another's later. What came of a job that is done is for the caller to see, in /proc.
        It is asked for, not waited for: who waits for signals has to believe somebody's.
        """
        body = [name, "fail", properties, []]  # no other unit may be in the way
        [job] = await self.call(SYSTEMD, "StartTransientUnit", "ssa(sv)a(sa(sv))", body, "o")
        number = [int(job.rpartition("/")[2])]
        try:
            async with asyncio.timeout(JOB_SECONDS):
                while True:
                    await self.call(SYSTEMD, "GetJob", "u", number, "o")
                    await asyncio.sleep(JOB_PAUSE)
        except (CallFailed, TimeoutError) as err:
            if isinstance(err, TimeoutError) or err.name != "org.freedesktop.systemd1.NoSuchJob":
                await self.call(SYSTEMD, "CancelJob", "u", number, "")
                raise CallFailed("timeout", "the job is not done") from err

    def reply(self, call: Call, signature: str, body: Body, error: str | None = None) -> None:
        """Send the result, or an error of that name; unless the caller wants neither."""
        if not call.header.flags & MessageFlag.NO_REPLY_EXPECTED:
            answer = Message.new_error(call.header, error, "") if error else Message.new_method_return(call.header)
            answer.signature, answer.body = signature, body
            self._send(answer)

    def _send(self, message: Message) -> int:
        message.serial = serial = next(self._serials)
        self._writer.write(bytes(message._marshall()))  # noqa: SLF001  the library has no public codec
        return serial

    async def _read_forever(self) -> None:
        while True:
            data = await self._receive()
            # With a body of no length, the parser reads the header and nothing of the body.
            match _parse(data[:4] + bytes(4) + data[8:]):
                case Message(sender=str(), message_type=MessageType.METHOD_CALL) as call if call.serial and call.sender:
                    self.on_call(Call(call, data))
                case Message(sender=str(), message_type=k, reply_serial=to) if k in _ANSWERS and to in self._waiting:
                    self._waiting.pop(to).set_result(_parse(data))  # that it is from whom we called, the bus sees to
            await self._writer.drain()  # whoever floods us and reads no answers waits here, not in our memory

    async def _receive(self) -> bytes:
        """All bytes of the next message; none if it is too large. Raises OSError, EOFError or KeyError at the end."""
        header = await self._reader.readexactly(_FIXED_HEADER)
        byte_order: Any = {ord("l"): "little", ord("B"): "big"}[header[0]]
        body, fields = (int.from_bytes(header[at : at + 4], byte_order) for at in (4, 12))
        length = fields + -fields % 8 + body
        if length <= MAX_MESSAGE_BYTES:
            return header + await self._reader.readexactly(length)
        for start in range(0, length, MAX_MESSAGE_BYTES):
            await self._reader.readexactly(min(MAX_MESSAGE_BYTES, length - start))
        return b""


def _parse(data: bytes) -> Message | None:
    """Parse one message from its own bytes; None if that is not possible, and nobody would know what to do about it."""
    if len(SignatureTree._cache) > _MAX_SIGNATURES:  # noqa: SLF001
        SignatureTree._cache.clear()  # noqa: SLF001
    with suppress(Exception):  # the parser raises whatever Python raises on data it did not expect
        return Unmarshaller(io.BytesIO(data)).unmarshall()
    return None
