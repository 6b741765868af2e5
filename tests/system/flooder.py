"""A program of some user's that floods the bus and the helper, in one of the ways of attack A13; says what came of it.

Copied to where users can read it, with tests/bus/client.py beside it. Prints a JSON object of counts.
"""

import json
import struct
import sys
from collections import Counter
from typing import Any

from client import NAME, NO_REPLY, PATH, Client  # type: ignore[import-not-found]  # tests/bus/client.py
from dbus_next.constants import MessageType

SOCKET = "/run/dbus/system_bus_socket"
CALL: tuple[str, list[Any]] = ("ust", [4242, "win11", 2**30])


def survived(send: Any) -> str:
    """What becomes of a connection that sends such a thing: it goes on, or the bus ends it."""
    try:
        with Client(SOCKET) as client:
            send(client)
            client.daemon("GetId")
            return "went on"
    except (EOFError, ConnectionError):
        return "hung up on"


def bursts() -> dict[str, int]:
    """10 connections, 60 calls each, all at once."""
    clients, count = [Client(SOCKET) for _ in range(10)], Counter[str]()
    waiting = []
    for client in clients:
        messages = [client.message("SetMemlock", *CALL) for _ in range(60)]
        waiting.append([serial for serial, _ in messages])
        client.socket.sendall(b"".join(data for _, data in messages))
    for client, serials in zip(clients, waiting, strict=True):
        try:
            count.update(reply.short for reply in client.replies(serials))
        except (EOFError, ConnectionError):
            count["hung up on"] += 1
    return count


def large() -> dict[str, int]:
    """Messages of many sizes, none of which any method takes."""

    def send(size: int) -> Any:
        return lambda client: client.send("Nope", "ay", [bytes(size)], flags=NO_REPLY)

    return Counter(survived(send(size)) for size in (20_000, 60_000, 1 << 20, 8 << 20, 30 << 20))


def fields() -> dict[str, int]:
    """Header fields that no specification knows; dbus-broker hands them on, and the library raises on them."""

    def send(code: int) -> Any:
        def one(client: Any) -> None:
            _, data = client.message("GetLimits", flags=NO_REPLY)
            length = int.from_bytes(data[12:16], "little")
            head = data[: 16 + length] + bytes(-length % 8)
            more = bytes([code]) + b"\x01u\0" + struct.pack("<I", 7)
            head = head[:12] + struct.pack("<I", len(head) - 16 + len(more)) + head[16:] + more
            client.socket.sendall(head + bytes(-len(head) % 8))

        return one

    return Counter(survived(send(code)) for code in (0, 10, 42, 255) for _ in range(5))


def shapes() -> dict[str, int]:
    """Depth, signals, replies to nothing, other message types, big-endian."""

    def deep(client: Any) -> None:
        value: Any = 1
        for _ in range(30):
            value = [value]
        client.send("SetMemlock", "a" * 30 + "u", [value], flags=NO_REPLY)

    def signal(client: Any) -> None:
        client.send("Boo", "s", ["x" * 10_000], kind=MessageType.SIGNAL)

    def reply(client: Any) -> None:
        for number in range(1, 60):
            _, data = client.message("x", flags=NO_REPLY)
            client.socket.sendall(data[:1] + bytes([2]) + data[2:8] + struct.pack("<I", number) + data[12:])

    def kind(client: Any) -> None:
        _, data = client.message("GetLimits", flags=NO_REPLY)
        client.socket.sendall(data[:1] + bytes([200]) + data[2:])

    def big_endian(client: Any) -> None:
        def field(code: int, form: str, text: str) -> bytes:
            one = bytes([code, 1]) + form.encode() + b"\0" + struct.pack(">I", len(text)) + text.encode() + b"\0"
            return one + bytes(-len(one) % 8)

        head = field(1, "o", PATH) + field(2, "s", NAME) + field(3, "s", "GetLimits") + field(6, "s", NAME)
        client.socket.sendall(b"B\x01\x01\x01" + struct.pack(">III", 0, 77, len(head)) + head)

    return Counter(survived(one) for one in (deep, signal, reply, kind, big_endian) for _ in range(4))


WAYS = {"bursts": bursts, "large": large, "fields": fields, "shapes": shapes}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(WAYS[sys.argv[1]]()) + "\n")
