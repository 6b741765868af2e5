"""Attack A13: bytes that no library sends. The bus stops most; whatever it lets pass must hurt nobody."""

import random
import struct
from collections.abc import Iterator
from functools import partial

import pytest
from dbus_next.signature import Variant

from bus.calls import CALLS, using
from bus.client import NAME, PATH, Client
from bus.vitals import served, unhurt
from bus.world import CROWD, User, World, as_user

HUNG_UP = "hung up"


def big_endian(member: str, signature: str = "", body: bytes = b"", serial: int = 77) -> bytes:
    """A method call in the other byte order, which the bus passes on as it is."""
    fields = b""
    for code, kind, text in ((1, "o", PATH), (2, "s", NAME), (3, "s", member), (6, "s", NAME), (8, "g", signature)):
        if text:
            fields += bytes(-len(fields) % 8) + bytes([code, 1]) + kind.encode() + b"\0"
            fields += (bytes([len(text)]) if kind == "g" else struct.pack(">I", len(text))) + text.encode() + b"\0"
    header = b"B\1\0\1" + struct.pack(">III", len(body), serial, len(fields)) + fields
    return header + bytes(-len(header) % 8) + body


def answer(path: str, data: bytes, seconds: float = 10.0) -> str:
    """What one connection gets for these bytes within `seconds`: a reply's short name, or HUNG_UP."""
    with Client(path) as client:
        try:
            client.socket.sendall(data)
            reply = client.reply(seconds)
        except (EOFError, ConnectionError):
            return HUNG_UP
        return reply.short if reply else "nothing"


def test_a13_big_endian_calls_are_served_as_any_other(host: World, member: User) -> None:
    """Both orders are D-Bus; nothing is read in the wrong one, as the recorded request shows."""
    pid = served(host, member)
    body = struct.pack(">II6sxxQ", 4242, 5, b"win11\0", 2**30)

    def calls(client: Client) -> list[object]:
        client.socket.sendall(big_endian("SetMemlock", "ust", body, 77) + big_endian("GetLimits", serial=78))
        first, second = client.replies([77, 78])
        client.socket.sendall(big_endian("SetMemlock", "us", body[:14], 79) + big_endian("Nope", serial=80))
        return [first.short, first.body, second.short, *(reply.short for reply in client.replies([79, 80]))]

    assert using(host, member, calls) == ["ok", [2**30], "ok", "InvalidArgs", "UnknownMethod"]
    [act] = [act for act in host.recorded(member) if act["member"] == "SetMemlock"]
    assert act["vm"] == "win11"
    assert host.helper_pid() == pid


def malformed(call: bytes) -> Iterator[tuple[str, bytes]]:
    """Variations of a SetMemlock call with a body of `ust`: 4242, "win11", 2^30."""
    body = call.rindex(struct.pack("<II", 4242, 5))
    at = {"pid": body, "length": body + 4, "text": body + 8, "end": body + 13, "bytes": body + 16}

    def changed(place: int, new: bytes) -> bytes:
        return call[:place] + new + call[place + len(new) :]

    yield "body is empty", changed(4, bytes(4))[:body]
    yield "body is shorter", changed(4, struct.pack("<I", 16))[: body + 16]
    yield "body is longer", changed(4, struct.pack("<I", 32)) + bytes(8)
    yield "string is longer than the body", changed(at["length"], struct.pack("<I", 2**31))
    yield "string is longer than all", changed(at["length"], struct.pack("<I", 2**32 - 1))
    yield "string is shorter", changed(at["length"], struct.pack("<I", 2))
    yield "string has no end", changed(at["end"], b"x")
    yield "string has a NUL", changed(at["text"], b"\0")
    yield "string is not UTF-8", changed(at["text"], b"\xff\xfe")
    yield "padding is not zero", changed(at["end"] + 1, b"\1")
    yield "no such byte order", changed(0, b"x")
    yield "the other byte order", changed(0, b"B")
    yield "no such version", changed(3, b"\2")
    yield "type is 0", changed(1, b"\0")
    yield "serial is 0", changed(8, bytes(4))
    yield "fields are longer than all", changed(12, struct.pack("<I", 2**26))
    yield "fields are none", changed(12, bytes(4))
    yield "body is larger than the bus allows", changed(4, struct.pack("<I", 2**27 + 1))
    yield "signature is not one", call.replace(b"\3ust\0", b"\3us(\0")
    yield "signature is another", call.replace(b"\3ust\0", b"\3uas\0")
    yield "member is no name", call.replace(b"SetMemlock", b"Set\nemlock")
    yield "interface is no name", call.replace(b"org.qemulauncher.Helper1\0", b"org.qemu\x1b[31mher.Helper1\0")
    yield "path is none", call.replace(b"/org/qemulauncher/Helper1", b"/org/qemu\nauncher/Helper1")
    yield "a field has another type", call.replace(b"\3\1s\0", b"\3\1o\0")


def test_a13_malformed_messages_end_at_the_bus(host: World, member: User, other: User) -> None:
    """Byte for byte as here. Who sends such is hung up on; one that is odd but whole is answered by the helper."""
    pid = served(host, other)

    def calls() -> dict[str, str]:
        _, call = Client(host.socket).message("SetMemlock", *CALLS["SetMemlock"])
        assert answer(host.socket, call) == "ok", "the positive control"
        return {what: answer(host.socket, data) for what, data in malformed(call)}

    answers = as_user(member, calls).result()
    assert {what for what, got in answers.items() if got != HUNG_UP} == set()
    assert [act["member"] for act in host.recorded(member)] == ["SetMemlock"]
    assert served(host, other) == pid


def test_a13_mutated_messages(host: World, other: User) -> None:
    """Bytes of good calls are changed at random, the same ones in each run; the helper judges what comes through."""
    users, each = CROWD[-20:], 40  # each within his quota, which would answer otherwise

    def calls(user: User) -> list[str]:
        chance, answers = random.Random(user.uid), []
        for number in range(each):
            client = Client(host.socket)
            _, data = client.message(*(list(CALLS.items())[number % 3][0], *list(CALLS.values())[number % 3]))
            client.socket.close()
            mutated = bytearray(data)
            for _ in range(chance.randint(1, 3)):
                mutated[chance.randrange(len(data))] = chance.choice([0, 1, 255, chance.randrange(256)])
            answers.append(answer(host.socket, bytes(mutated), 1.0))
        return answers

    with unhurt(host, other):
        # "nothing": the bus waits for the rest of a message that says to be longer. All users wait at the same time.
        children = [as_user(user, partial(calls, user)) for user in users]
        answers = [got for child in children for got in child.result()]
    assert len(answers) == len(users) * each
    # Both happened: the bus stopped many, and many came through and were judged.
    assert answers.count(HUNG_UP) > 50
    assert len(answers) - answers.count(HUNG_UP) - answers.count("nothing") > 50
    assert "Failed" not in answers
    assert not [line for line in host.logged() if line.startswith("failed")]


@pytest.mark.parametrize("depth", [16, 60])
def test_a13_variants_in_variants(host: World, member: User, other: User, depth: int) -> None:
    """As deep as the bus lets pass; neither the signature's nor the body's depth is the helper's to follow."""

    def calls(client: Client) -> list[str]:
        value = Variant("u", 1)
        for _ in range(depth):
            value = Variant("v", value)
        dictionary = Variant("a{sv}", {"x": Variant("u", 1)})
        for _ in range(depth // 4):
            dictionary = Variant("a{sv}", {"x": dictionary})
        bodies = [value, dictionary]
        return [client.call(name, "v", [body]).short for body in bodies for name in ("SetMemlock", "GetLimits", "Nope")]

    with unhurt(host, other):
        assert using(host, member, calls) == ["InvalidArgs", "InvalidArgs", "UnknownMethod"] * 2
