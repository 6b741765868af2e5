"""QMP, QEMU's control protocol: one JSON object a line, over a socket that is already connected.

Why it exists: the start, the stop and `status` all speak to QEMU this way. It knows no socket paths and no
processes. Protocol: docs/interop/qmp-spec in QEMU's sources.

It refuses a line that is no JSON object, or that answers nothing we asked.
After any QmpError the connection is of no further use, except after QmpRefused: there QEMU said no to one
command and everything else goes on. Events may arrive between any two lines; they never get lost and never
confuse an answer. End of file means that QEMU is gone (or closed its monitor): ConnectionLost, at once, for
every waiting caller.

A QEMU on its way out is asked nothing: a command that meets it there can stop it for good, since monitor_cleanup() of
QEMU 7.2 waits for a dispatcher that has gone. SHUTDOWN says that it leaves. Only if it stays after all, as -no-shutdown
has it, STOP follows. That does not come when the guest stood still already: then it is taken to stay, unless the reason
is a final one. Other connections, as those of `status`, have not heard it, and may meet it there.

    QmpError
    |-- QmpRefused       QEMU answered a command with an error
    |-- ConnectionLost   the other end is gone
    `-- ProtocolError    what came is not QMP
"""

# ruff: noqa: N818  named for what happened, as in errors.py

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from .errors import QmpError
from .patience import retrieved

# query-cpus-fast takes about 250 bytes for a vCPU, and asyncio's own limit of 64 KiB a line would end at 260 vCPUs.
MAX_LINE = 16 * 1024 * 1024
# ShutdownCause, qapi/run-state.json: QEMU leaves, whatever -no-shutdown says.
_FINAL = ("host-qmp-quit", "host-signal", "host-ui")

Event = Mapping[str, Any]
Trace = Callable[[str], None]


class QmpRefused(QmpError):
    """QEMU refused one command; the connection is still good."""

    def __init__(self, command: str, error: Any) -> None:
        description, error_class = (_member(error, name) for name in ("desc", "class"))
        super().__init__(f"QEMU refused {command}: {description}", error_class=error_class)


class ConnectionLost(QmpError):
    """QEMU closed the connection, or ended."""


class ProtocolError(QmpError):
    """The other end does not speak QMP."""


class Qmp:
    """One negotiated connection. Made by `Qmp.negotiated`, ended by `close`. `leaving`: QEMU is on its way out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trace: Trace | None = None) -> None:
        self._reader = reader
        self._writer = writer
        self._trace = trace
        self._answer: asyncio.Future[Any] | None = None
        self._serial = 0
        self._turn = asyncio.Lock()
        self._listeners: list[Callable[[Event], None]] = []
        self._pump: asyncio.Task[None] | None = None
        self._broken: QmpError | None = None
        self._stands = False
        self.leaving = asyncio.Event()
        # Not that, or the connection is broken: what is asked is sent, or refused.
        self._open = asyncio.Event()
        self._open.set()

    @classmethod
    async def negotiated(cls, sock: socket.socket, trace: Trace | None = None) -> "Qmp":
        """Take over a connected socket, wait for the greeting, leave the negotiation mode.

        `trace` is told each line, in both directions: `QMP > {...}`, `QMP < {...}`.
        Waits as long as the other end lives: how long QEMU may take to start is for the caller to say.
        """
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        self = cls(reader, writer, trace)
        try:
            greeting = await self._read_object()
            if "QMP" not in greeting:
                raise ProtocolError(f"expected QEMU's greeting, got {_shortened(greeting)}")
            self._pump = asyncio.create_task(self._receive(), name="QMP")
            await self.execute("qmp_capabilities")
        except BaseException:
            await self.close()
            raise
        return self

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have `listener` called with every event from now on. It must not block."""
        self._listeners.append(listener)

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Send one command and return what it returns. Commands of several callers take turns.

        While QEMU leaves it is held back: until QEMU stays, or ConnectionLost says that it has gone.
        """
        async with self._turn:
            while not self._open.is_set():  # it may be open for a moment only
                await self._open.wait()
            if self._broken is not None:
                raise self._broken
            self._serial += 1
            request: dict[str, Any] = {"execute": command, "id": self._serial}
            if arguments:
                request["arguments"] = dict(arguments)
            self._answer = asyncio.get_running_loop().create_future()
            # The connection may be found broken while the command is still being sent: then nobody waits for this.
            self._answer.add_done_callback(retrieved)
            try:
                line = json.dumps(request)
                if self._trace is not None:
                    self._trace(f"QMP > {line}")
                self._writer.write(line.encode() + b"\n")
                await self._writer.drain()
                answer = await self._answer
            except OSError as err:
                raise ConnectionLost(f"QEMU closed its monitor while {command} was sent") from err
            finally:
                self._answer = None
        if "error" in answer:
            raise QmpRefused(command, answer["error"])
        return answer["return"]

    async def close(self) -> None:
        """Close the connection; callers that still wait get ConnectionLost."""
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
        self._break(ConnectionLost("the QMP connection was closed"))
        self._writer.close()
        with contextlib.suppress(OSError):  # the other end was faster
            await self._writer.wait_closed()

    async def _receive(self) -> None:
        try:
            while True:
                message = await self._read_object()
                if "event" in message:
                    self._note(message)
                    for listener in tuple(self._listeners):
                        listener(message)
                elif "return" not in message and "error" not in message:
                    raise ProtocolError(f"neither event nor answer: {_shortened(message)}")
                elif message.get("id") == self._serial and self._answer is not None and not self._answer.done():
                    self._answer.set_result(message)
                elif not _is_earlier(message.get("id"), self._serial):
                    raise ProtocolError(f"QEMU answered what nobody asked: {_shortened(message)}")
                # else: the answer to a command whose caller no longer waits
        except QmpError as err:
            self._break(err)

    def _note(self, event: Event) -> None:
        match event:
            case {"event": "SHUTDOWN", **rest} if not self._stands or _member(rest.get("data"), "reason") in _FINAL:
                self.leaving.set()
                self._open.clear()
            case {"event": "STOP" | "RESUME" as what}:
                self._stands = what == "STOP"
                self.leaving.clear()
                self._open.set()

    def _break(self, err: QmpError) -> None:
        self._broken = self._broken or err
        self._open.set()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(err)

    async def _read_object(self) -> dict[str, Any]:
        try:
            line = await self._reader.readline()
        except OSError as err:
            raise ConnectionLost("QEMU closed its monitor") from err
        except ValueError as err:
            raise ProtocolError(f"a line of more than {MAX_LINE} bytes") from err
        if not line.endswith(b"\n"):
            raise ConnectionLost("QEMU closed its monitor")
        if self._trace is not None:
            self._trace(f"QMP < {line.decode(errors='backslashreplace').strip()}")
        try:
            value = json.loads(line)
        except ValueError as err:
            raise ProtocolError(f"not JSON: {_shortened(line)}") from err
        if not isinstance(value, dict):
            raise ProtocolError(f"not a JSON object: {_shortened(value)}")
        return value


def run_state(answer: Any) -> str:
    """RunState (qapi/run-state.json) in the answer to query-status; "unknown" if there is none."""
    return str(answer.get("status", "unknown")) if isinstance(answer, dict) else "unknown"


def _is_earlier(serial: object, last: int) -> bool:
    return isinstance(serial, int) and 0 < serial <= last


def _member(value: Any, name: str) -> str:
    return str(value.get(name)) if isinstance(value, dict) else _shortened(value)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
