"""SystemBus against a bus of the test's own, which lets everything pass that dbus-daemon would not.

dbus-broker, the bus of Fedora and Arch, does not look into bodies and passes unknown header fields on; a bus that lied
would do worse. Every test ends with an ordinary call that is still received: the connection survived, in step.
"""

import asyncio
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message
from dbus_next.signature import Variant

from qemu_launcher_helper.bus import Call, SystemBus
from qemu_launcher_helper.contract import CallFailed

NAME, PATH = "org.qemulauncher.Helper1", "/org/qemulauncher/Helper1"


def with_sender(message: Message, sender: str) -> bytes:
    """Marshal as the bus would forward it; the library itself never writes the field SENDER."""
    data = bytes(message._marshall())
    body = int.from_bytes(data[4:8], "little")
    fields = int.from_bytes(data[12:16], "little")
    header, tail = data[: 16 + fields], data[len(data) - body :] if body else b""
    return rebuilt(header, field(7, "s", string(sender)), tail)


def string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def field(code: int, signature: str, value: bytes) -> bytes:
    """One header field, aligned for a value that begins at a multiple of four."""
    return bytes([code, len(signature)]) + signature.encode() + b"\0" + value


def rebuilt(header: bytes, more: bytes, body: bytes) -> bytes:
    """A message with one more header field."""
    header += bytes(-len(header) % 8) + more
    header = (
        header[:4] + struct.pack("<I", len(body)) + header[8:12] + struct.pack("<I", len(header) - 16) + header[16:]
    )
    return header + bytes(-len(header) % 8) + body


def call(
    member: str = "Ping", signature: str = "", body: list[Any] | None = None, serial: int = 9, **more: Any
) -> Message:
    return Message(NAME, PATH, NAME, member, signature=signature, body=body or [], serial=serial, **more)


class FakeDaemon:
    """Speaks the handshake, answers Hello, then sends what the test says; keeps what it receives."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "bus")
        self.received: list[Message] = []
        self.arrived = asyncio.Event()
        self.answers: dict[str, Callable[[Message], bytes]] = {"Hello": lambda m: self.result(m, "s", [":1.1"])}

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_unix_server(self.serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    @staticmethod
    def result(message: Message, signature: str, body: list[Any], sender: str = "org.freedesktop.DBus") -> bytes:
        reply = Message.new_method_return(message, signature, body)
        reply.destination, reply.serial = ":1.1", 77
        return with_sender(reply, sender)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        await reader.readline()
        writer.write(b"OK 1234\r\n")
        await reader.readline()
        while True:
            try:
                header = await reader.readexactly(16)
                body, fields = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
                data = header + await reader.readexactly(fields + -fields % 8 + body)
            except asyncio.IncompleteReadError:
                return
            import io

            from dbus_next._private.unmarshaller import Unmarshaller

            message = Unmarshaller(io.BytesIO(data)).unmarshall()
            self.received.append(message)
            self.arrived.set()
            if message.member in self.answers:
                writer.write(self.answers[message.member](message))


def scene(tmp_path: Path, play: Callable[[FakeDaemon, SystemBus, list[Call]], Awaitable[None]]) -> None:
    """Connect, play, and see that an ordinary call still comes through."""

    async def run() -> None:
        async with FakeDaemon(tmp_path) as daemon:
            bus = await SystemBus.connect(daemon.path)
            calls: list[Call] = []
            arrived = asyncio.Event()

            def on_call(received: Call) -> None:
                calls.append(received)
                if received.header.member == "Last":
                    arrived.set()

            bus.on_call = on_call
            await play(daemon, bus, calls)
            daemon.writer.write(with_sender(call("Last", "s", ["x"]), ":1.9"))
            await asyncio.wait_for(arrived.wait(), 20)
            assert calls[-1].header.sender == ":1.9"
            assert calls[-1].body() == ["x"]
            await bus.close()

    asyncio.run(run())


def sending(*messages: bytes) -> Callable[[FakeDaemon, SystemBus, list[Call]], Awaitable[None]]:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        for message in messages:
            daemon.writer.write(message)

    return play


def test_a_call_and_its_answers(tmp_path: Path) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.writer.write(with_sender(call("Ping", "us", [7, "x"], serial=31), ":1.5"))
        while not calls:
            await asyncio.sleep(0.01)
        [received] = calls
        assert (received.header.sender, received.header.member, received.header.signature) == (":1.5", "Ping", "us")
        assert received.body() == [7, "x"]
        bus.reply(received, "a{sv}", [{"a": Variant("as", ["b"])}])
        bus.reply(received, "s", ["no"], "org.qemulauncher.Error.Failed")
        while len(daemon.received) < 3:
            daemon.arrived.clear()
            await asyncio.wait_for(daemon.arrived.wait(), 20)
        yes, no = daemon.received[1:]
        assert (yes.destination, yes.reply_serial, yes.body) == (":1.5", 31, [{"a": Variant("as", ["b"])}])
        assert (no.error_name, no.reply_serial, no.body) == ("org.qemulauncher.Error.Failed", 31, ["no"])

    scene(tmp_path, play)


@pytest.mark.parametrize("code", [0, 10, 42, 255])
def test_unknown_header_fields(tmp_path: Path, code: int) -> None:
    data = with_sender(call("Odd"), ":1.5")
    scene(tmp_path, sending(rebuilt(data, field(code, "u", struct.pack("<I", 7)), b"")))


@pytest.mark.parametrize("code", range(1, 10))
def test_header_fields_of_a_wrong_type(tmp_path: Path, code: int) -> None:
    for signature, value in (("u", struct.pack("<I", 7)), ("as", struct.pack("<I", 0)), ("s", string("x"))):
        data = with_sender(call("Odd"), ":1.5")
        scene(tmp_path, sending(rebuilt(data, field(code, signature, value), b"")))


def test_a_second_sender_field_is_not_ours_to_judge_but_harmless(tmp_path: Path) -> None:
    """The bus appends the true sender, and the last field wins."""
    forged = with_sender(call("Odd"), ":1.666")

    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.writer.write(rebuilt(forged, field(7, "s", string(":1.5")), b""))
        while not calls:
            await asyncio.sleep(0.01)
        assert calls[0].header.sender == ":1.5"

    scene(tmp_path, play)


def test_a_body_that_claims_more_than_there_is_reads_nothing_of_the_next_message(tmp_path: Path) -> None:
    """Else its author could make the parser begin in the middle of his next message, where he forged a sender."""
    honest = with_sender(call("Odd", "s", ["abcdefgh"]), ":1.5")
    lying = honest[:-13] + struct.pack("<I", 4000) + honest[-9:]
    assert len(lying) == len(honest)
    inner = with_sender(call("Forged"), ":1.0")
    following = with_sender(call("Next", "ay", [inner + inner]), ":1.5")

    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.writer.write(lying + following)
        while len(calls) < 2:
            await asyncio.sleep(0.01)
        assert [received.header.member for received in calls] == ["Odd", "Next"]
        assert calls[0].body() == []

    scene(tmp_path, play)


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("v", b"\x01v\x00" * 20000),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaay", struct.pack("<I", 4) * 32),
        ("b", struct.pack("<I", 7)),
        ("s", struct.pack("<I", 2) + b"\xff\xfe\0"),
        ("d", b"\xff" * 8),
        ("a{sv}", struct.pack("<II", 2**31, 0)),
        ("(", b"xxxx"),
        ("z", b"xxxx"),
        ("ss", string("x")),
    ],
    ids=["nested variants", "nested arrays", "bool 7", "no utf-8", "nan", "endless", "open", "unknown", "short"],
)
def test_malformed_bodies(tmp_path: Path, signature: str, body: bytes) -> None:
    header = bytes(call("Odd")._marshall())
    data = rebuilt(header, field(8, "g", bytes([len(signature)]) + signature.encode() + b"\0"), body)

    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        fields = int.from_bytes(data[12:16], "little")
        daemon.writer.write(rebuilt(data[: 16 + fields], field(7, "s", string(":1.5")), body))
        await asyncio.sleep(0.05)
        for received in calls:
            received.body()

    scene(tmp_path, play)


@pytest.mark.parametrize("kind", [0, 5, 255])
def test_unknown_message_types(tmp_path: Path, kind: int) -> None:
    data = with_sender(call("Odd"), ":1.5")
    scene(tmp_path, sending(data[:1] + bytes([kind]) + data[2:]))


def test_a_message_without_a_sender(tmp_path: Path) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.writer.write(bytes(call("Odd")._marshall()))
        await asyncio.sleep(0.05)
        assert calls == []

    scene(tmp_path, play)


@pytest.mark.parametrize("size", [24 * 1024, 200_000, 5_000_000])
def test_large_messages_are_drained(tmp_path: Path, size: int) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.writer.write(with_sender(call("Odd", "ay", [bytes(size)]), ":1.5"))
        daemon.writer.write(with_sender(call("Fits", "ay", [bytes(24_000)]), ":1.5"))
        while not calls:
            await asyncio.sleep(0.01)
        assert [received.header.member for received in calls] == ["Fits"]
        assert len(calls[0].body()[0]) == 24_000

    scene(tmp_path, play)


def test_bytes_that_are_no_message_are_a_lost_bus(tmp_path: Path) -> None:
    async def run() -> None:
        async with FakeDaemon(tmp_path) as daemon:
            bus = await SystemBus.connect(daemon.path)
            daemon.writer.write(b"x" * 16)
            await asyncio.wait_for(asyncio.wait({bus.reading}), 20)
            assert isinstance(bus.reading.exception(), KeyError)

    asyncio.run(run())


def test_a_lost_bus_ends_every_call(tmp_path: Path) -> None:
    async def run() -> None:
        async with FakeDaemon(tmp_path) as daemon:
            bus = await SystemBus.connect(daemon.path)
            waiting = asyncio.create_task(bus.daemon("Never"))
            await asyncio.sleep(0.05)
            daemon.writer.close()
            with pytest.raises(CallFailed, match="lost"):
                await asyncio.wait_for(waiting, 20)
            assert bus.reading.done()

    asyncio.run(run())


def test_late_second_and_unasked_for_answers_find_nobody(tmp_path: Path) -> None:
    """That only the one we called can answer is the bus's doing: tests/bus/test_a13_messages.py."""

    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        def twice(message: Message) -> bytes:
            return daemon.result(message, "s", ["first"]) + daemon.result(message, "s", ["second"])

        daemon.answers["GetId"] = twice
        assert await bus.daemon("GetId", answer="s") == ["first"]
        daemon.writer.write(daemon.result(call(serial=2), "s", ["late"]))
        assert await bus.daemon("GetId", answer="s") == ["first"]

    scene(tmp_path, play)


@pytest.mark.parametrize(
    ("signature", "body"),
    [("u", [1]), ("", []), ("ss", ["a", "b"]), ("v", [Variant("s", "x")])],
    ids=["u", "", "ss", "v"],
)
def test_an_answer_of_another_shape_is_none(tmp_path: Path, signature: str, body: list[Any]) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.answers["GetId"] = lambda message: daemon.result(message, signature, body)
        with pytest.raises(CallFailed, match="unexpected"):
            await bus.daemon("GetId", answer="s")

    scene(tmp_path, play)


def test_an_error_is_named(tmp_path: Path) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        def error(message: Message) -> bytes:
            answer = Message.new_error(message, "a.b.Wrong", "it went wrong")
            answer.destination, answer.serial = ":1.1", 5
            return with_sender(answer, "org.freedesktop.DBus")

        daemon.answers["GetId"] = error
        with pytest.raises(CallFailed) as caught:
            await bus.daemon("GetId", answer="s")
        assert (caught.value.name, caught.value.text) == ("a.b.Wrong", "it went wrong")

    scene(tmp_path, play)


@pytest.mark.parametrize(
    ("signature", "body", "there"), [("b", [True], True), ("b", [False], False), ("u", [1], False)]
)
def test_whether_a_caller_is_there(tmp_path: Path, signature: str, body: list[Any], there: bool) -> None:
    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        daemon.answers["NameHasOwner"] = lambda message: daemon.result(message, signature, body)
        assert await bus.is_there(":1.5") is there

    scene(tmp_path, play)


def test_a_bus_that_refuses_us(tmp_path: Path) -> None:
    async def run() -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"REJECTED EXTERNAL\r\n")

        async with await asyncio.start_unix_server(refuse, str(tmp_path / "bus")):
            with pytest.raises(ConnectionError):
                await SystemBus.connect(str(tmp_path / "bus"))

    asyncio.run(run())


def test_the_kinds_of_messages_that_are_not_for_us(tmp_path: Path) -> None:
    signal = Message.new_signal("/a", "a.b", "JobRemoved", "uoss", [1, "/job", "x", "done"])
    signal.destination, signal.serial = ":1.1", 8
    reply = Message(":1.1", message_type=MessageType.METHOD_RETURN, reply_serial=1, serial=8)
    scene(tmp_path, sending(with_sender(signal, ":1.5"), with_sender(reply, ":1.5")))


def test_a_signal_is_no_answer(tmp_path: Path) -> None:
    """dbus-broker minds no signal that says whose answer it is; before and after we have the name, anybody may send us
    one, as "yes, he may", while we wait for polkit."""

    async def play(daemon: FakeDaemon, bus: SystemBus, calls: list[Call]) -> None:
        def after_forgeries(message: Message) -> bytes:
            forged = b""
            for kind in (MessageType.SIGNAL, MessageType.METHOD_CALL):
                yes = call("Boo", "s", ["forged"], message_type=kind, reply_serial=message.serial)
                forged += with_sender(yes, ":1.66")
            return forged + daemon.result(message, "s", ["true"])

        daemon.answers["GetId"] = after_forgeries
        assert await bus.daemon("GetId", answer="s") == ["true"]

    scene(tmp_path, play)
