"""The connection to the system bus: frames messages, hands calls to the service, makes our own calls.

The only importer of dbus_next, and of that only of its codec: Message, Variant and the unmarshaller. The library's
own connection class dies of a full socket buffer, parses messages of any size from anybody, reads past the end of a
malformed one into the next, leaks file descriptors and answers with tracebacks; asyncio's streams do none of that.

What it refuses, before anything but the header is parsed:
- messages over 64 KiB (drained, unanswered: no client of ours makes such);
- everything that is no method call to us, no reply that we wait for, no signal of the bus or of systemd;
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
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from dbus_next._private.unmarshaller import Unmarshaller
from dbus_next.constants import MessageFlag, MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from .arguments import Typed
from .contract import CALL_SECONDS, JOB_SECONDS, MAX_MESSAGE_BYTES
from .errors import CallFailed

SOCKET = "/run/dbus/system_bus_socket"
DAEMON = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_RULE = "type='signal',sender='{}',path='{}',interface='{}',member='{}'"
INTERACTIVE = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION
_FIXED_HEADER = 16  # bytes up to and including the length of the header fields


class Call(NamedTuple):
    """A method call to us: its header, parsed (sender, path, flags, ...), and the bytes of the whole message."""

    header: Message
    data: bytes

    def body(self) -> list[Any]:
        """Parse the body; one that is not what its signature says has no values."""
        message = _parse(self.data)
        return [] if message is None else message.body


class SystemBus:
    """One connection. `reading` is done when it is lost; `on_call` gets every call and must not block."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.on_call: Callable[[Call], None] = lambda _: None
        self._reader, self._writer = reader, writer
        self._serials = itertools.cycle(range(1, 2**32))
        self._waiting: dict[int, tuple[str, asyncio.Future[Message | None]]] = {}
        self._gone: dict[str, asyncio.Event] = {}
        self._systemd = ""  # systemd's unique name, once its signals are wanted
        self._jobs: dict[str, asyncio.Future[str]] = {}
        self._one_job = asyncio.Lock()
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
        await bus.daemon("Hello")
        return bus

    async def close(self) -> None:
        """Send what is still to be sent, then leave the bus."""
        self.reading.cancel()
        self._writer.close()
        await self._writer.wait_closed()

    async def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", body: Sequence[Any] = (),
        *, answer: str | None = None, timeout: float = CALL_SECONDS
    ) -> list[Any]:  # fmt: skip
        """Call, wait at most `timeout` seconds, return the body; variants come as their bare values.

        Raises CallFailed for an error, for silence, for a lost bus, and for a signature other than `answer`.
        """
        future: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        serial = self._send(Message(destination, path, interface, member, signature=signature, body=_wire(body)))
        self._waiting[serial] = (destination, future)
        try:
            async with asyncio.timeout(timeout):
                reply = await future
        except TimeoutError as err:
            raise CallFailed("timeout", f"no answer to {member} in {timeout:.0f} s") from err
        finally:
            del self._waiting[serial]
        if reply is not None and reply.message_type is MessageType.ERROR:
            raise CallFailed(str(reply.error_name), str(reply.body[0]) if reply.body else "")
        if reply is None or (answer is not None and reply.signature != answer):
            raise CallFailed("unexpected", f"the answer to {member} is malformed")
        return [_plain(value) for value in reply.body]

    async def daemon(self, member: str, *strings: str, answer: str | None = None) -> list[Any]:
        """Call the bus itself, with strings."""
        return await self.call(*DAEMON, member, "s" * len(strings), strings, answer=answer)

    def tell(self, destination: str, path: str, interface: str, member: str, text: str) -> None:
        """Call with one string, and expect no reply."""
        silent = MessageFlag.NO_REPLY_EXPECTED
        self._send(Message(destination, path, interface, member, flags=silent, signature="s", body=[text]))

    async def until_gone(self, name: str) -> None:
        """Return when unique name `name` has left the bus. Once at a time for one name."""
        rule = _RULE.format(*DAEMON, "NameOwnerChanged") + f",arg0='{name}'"
        gone = self._gone[name] = asyncio.Event()
        try:
            await self.daemon("AddMatch", rule)
            if await self.daemon("NameHasOwner", name, answer="b") == [True]:
                await gone.wait()
        finally:
            del self._gone[name]
            self.tell(*DAEMON, "RemoveMatch", rule)

    async def systemd_job(self, member: str, signature: str, body: Sequence[Any]) -> str:
        """Call systemd's Manager.`member`, which answers with a job; wait for the job; return its result ("done", ...).

        Raises CallFailed, with name "timeout" if the job takes longer than JOB_SECONDS. One job at a time.
        """
        async with self._one_job:
            [owner] = await self.daemon("GetNameOwner", SYSTEMD[0], answer="s")
            if owner != self._systemd:  # the first time, or systemd was re-executed and has a new connection
                await self.daemon("AddMatch", _RULE.format(*SYSTEMD, "JobRemoved"))
                await self.call(owner, *SYSTEMD[1:], "Subscribe")
                self._systemd = owner
            # From here on every JobRemoved is kept, so ours may come before we know its name.
            self._jobs.clear()
            [job] = await self.call(owner, *SYSTEMD[1:], member, signature, body, answer="o")
            try:
                async with asyncio.timeout(JOB_SECONDS):
                    return await self._job(job)
            except TimeoutError as err:
                raise CallFailed("timeout", f"systemd's {member} is not done in {JOB_SECONDS:.0f} s") from err

    def _job(self, path: str) -> "asyncio.Future[str]":
        return self._jobs.setdefault(path, asyncio.get_running_loop().create_future())

    def reply(self, call: Call, signature: str, body: Sequence[Any], error: str | None = None) -> None:
        """Send the result, or an error of that name; unless the caller wants neither."""
        if not call.header.flags & MessageFlag.NO_REPLY_EXPECTED:
            answer = Message.new_error(call.header, error, "") if error else Message.new_method_return(call.header)
            answer.signature, answer.body = signature, _wire(body)
            self._send(answer)

    def _send(self, message: Message) -> int:
        message.serial = serial = next(self._serials)
        self._writer.write(bytes(message._marshall()))  # noqa: SLF001  the library has no public codec
        return serial

    async def _read_forever(self) -> None:
        try:
            while True:
                data = await self._receive()
                # With a body of no length, the parser reads the header and nothing of the body.
                message = _parse(data[:4] + bytes(4) + data[8:])
                if message is not None and isinstance(message.sender, str):
                    self._dispatch(message, data)
                await self._writer.drain()  # whoever floods us and reads no answers waits here, not in our memory
        finally:
            for _, future in self._waiting.values():
                if not future.done():
                    future.set_exception(CallFailed("lost", "the bus is gone"))

    async def _receive(self) -> bytes:
        """All bytes of the next message; none if it is too large. Raises OSError or EOFError at the end."""
        header = await self._reader.readexactly(_FIXED_HEADER)
        byte_order: Any = {ord("l"): "little", ord("B"): "big"}.get(header[0])
        if byte_order is None:
            raise ConnectionError("the bus has lost step")
        body, fields = (int.from_bytes(header[at : at + 4], byte_order) for at in (4, 12))
        length = fields + -fields % 8 + body
        if length <= MAX_MESSAGE_BYTES:
            return header + await self._reader.readexactly(length)
        for start in range(0, length, MAX_MESSAGE_BYTES):
            await self._reader.readexactly(min(MAX_MESSAGE_BYTES, length - start))
        return b""

    def _dispatch(self, message: Message, data: bytes) -> None:
        if message.message_type is MessageType.METHOD_CALL:
            self.on_call(Call(message, data))
        elif message.message_type is MessageType.SIGNAL:
            if message.sender in (DAEMON[0], self._systemd):
                self._signal(_parse(data))
        elif isinstance(message.reply_serial, int) and message.reply_serial in self._waiting:
            destination, future = self._waiting[message.reply_serial]
            # The bus lets nobody reply but the one we called; where we know his unique name, we look ourselves.
            known = destination == DAEMON[0] or destination.startswith(":")
            if not future.done() and (not known or message.sender == destination):
                future.set_result(_parse(data))

    def _signal(self, message: Message | None) -> None:
        match message:
            case Message(sender="org.freedesktop.DBus", member="NameOwnerChanged", body=[name, _, ""]):
                if name in self._gone:
                    self._gone[name].set()
            case Message(sender=self._systemd, member="JobRemoved", body=[_, path, _, result]):
                if self._one_job.locked() and not (job := self._job(path)).done():
                    job.set_result(result)


def _parse(data: bytes) -> Message | None:
    """Parse one message from its own bytes; None if that is not possible, and nobody would know what to do about it."""
    with suppress(Exception):  # the parser raises whatever Python raises on data it did not expect
        return Unmarshaller(io.BytesIO(data)).unmarshall()
    return None


def _plain(value: Any) -> Any:
    """Take the library's variants out of a received value."""
    if isinstance(value, Variant):
        return _plain(value.value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _wire(value: Any) -> Any:
    """Put our Typed values into the library's variants, and tuples into lists."""
    if isinstance(value, Typed):
        return Variant(value.signature, _wire(value.value))
    if isinstance(value, dict):
        return {key: _wire(item) for key, item in value.items()}
    return [_wire(item) for item in value] if isinstance(value, list | tuple) else value
