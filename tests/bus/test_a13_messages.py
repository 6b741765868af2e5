"""Attack A13: odd and malformed messages, signals, replies, file descriptors. The helper lives on and serves others."""

import array
import socket
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from bus.calls import using
from bus.client import NAME, NO_REPLY, PATH, Client
from bus.vitals import MIB, descriptors, peak, served
from bus.world import NOBODY, User, World, as_user, wait_until


def test_the_limit_of_size_is_where_it_says(host: World, member: User) -> None:
    """Positive control of what large messages meet: one of 23 KiB is parsed and judged."""

    def calls(client: Client) -> str:
        return client.call("PinThreads", "usa(uaub)au", [4242, "x", [[4243, [1], True]], list(range(5800))]).short

    assert using(host, member, calls) == "ok"


def test_a13_odd_types_and_depths(host: World, member: User) -> None:
    pid = served(host, member)

    def calls(client: Client) -> list[str]:
        deep: Any = 1
        signature = "u"
        for _ in range(30):
            deep, signature = [deep], "a" + signature
        struct: Any = [1]
        for _ in range(30):
            struct = [struct]
        return [
            client.call("SetMemlock", signature, [deep]).short,
            client.call("SetMemlock", "(" * 31 + "y" + ")" * 31, [struct]).short,
            client.call("SetMemlock", "a{sv}", [{}]).short,
            client.call("SetMemlock", "dnqixg", [1.5, -1, 1, -1, -1, "as"]).short,
            client.call("SetMemlock", "h", [7]).short,
            client.call("GetLimits").short,
        ]

    answers = using(host, member, calls)
    assert answers[:4] == ["InvalidArgs"] * 4
    assert answers[5] == "ok"
    assert host.helper_pid() == pid


def test_a13_a_flood_of_signatures(host: World, member: User, other: User) -> None:
    """All are refused by comparing with the table, which needs no memory at all."""
    pid = served(host, other)

    def flood() -> None:
        with Client(host.socket) as client:
            for number in range(1500):
                signature = "y" * 239 + f"{number:016b}".replace("0", "y").replace("1", "b")
                body = [True if letter == "b" else 1 for letter in signature]
                client.send("GetLimits", signature, body, flags=NO_REPLY)
            client.daemon("GetId")

    as_user(member, flood).result()
    assert served(host, other) == pid
    assert peak(pid) < 80 * MIB


def test_a13_unknown_flags_and_types(host: World, member: User) -> None:
    pid = served(host, member)

    def calls(client: Client) -> str:
        for kind in (5, 200):
            _, data = client.message("GetLimits", flags=NO_REPLY)
            client.socket.sendall(data[:1] + bytes([kind]) + data[2:])
        serial, data = client.message("GetLimits")
        client.socket.sendall(data[:2] + b"\xf8" + data[3:])
        return client.replies([serial])[0].short

    assert using(host, member, calls) == "ok"
    assert host.helper_pid() == pid


def test_a13_replies_that_nobody_asked_for(host: World, member: User) -> None:
    """The bus lets no such reply pass; if it did, nothing would wait for it."""
    pid = served(host, member)

    def calls(client: Client) -> str:
        for number in range(1, 50):
            kind, yes = MessageType.METHOD_RETURN, [[True, False, {}]]
            reply = Message(
                NAME, message_type=kind, reply_serial=number, signature="(bba{ss})", body=yes, serial=1000 + number
            )
            client.socket.sendall(bytes(reply._marshall()))
        return client.call("GetLimits").short

    assert using(host, member, calls) == "ok"
    assert host.helper_pid() == pid


def test_a13_descriptors_are_not_taken(host: World, member: User) -> None:
    pid = served(host, member)
    files = descriptors(pid)

    def attack() -> list[str]:
        errors = []
        for _ in range(50):
            message = Message(NAME, PATH, NAME, "SetMemlock", signature="h", body=[0], unix_fds=[0], serial=99)
            data = bytes(message._marshall(negotiate_unix_fd=True))
            with Client(host.socket, descriptors=True) as client, Path("/dev/null").open() as null:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()]))]
                client.socket.sendmsg([data], rights)
                errors.append(client.replies([99])[0].short)
        return errors

    assert set(as_user(member, attack).result()) == {"NotSupported"}
    assert served(host, member) == pid
    assert descriptors(pid) == files


def test_a13_outsiders_cannot_even_send(host: World, member: User) -> None:
    pid = served(host, member)
    before = peak(pid)

    def attack() -> None:
        for kind in (MessageType.METHOD_CALL, MessageType.SIGNAL):
            with Client(host.socket) as client:
                client.send("Boo", "ay", [bytes(8 * MIB)], kind=kind, flags=NO_REPLY)
                client.daemon("GetId")

    as_user(NOBODY, attack).result()
    assert served(host, member) == pid
    assert peak(pid) - before < MIB
    wait_until(lambda: host.daemons_log().count('member="Boo"') == 2, "both rejections")


@pytest.mark.parametrize("insider", [False, True])
def test_a13_unicast_signals_are_stopped_by_the_bus(host: World, member: User, insider: bool) -> None:
    user = member if insider else NOBODY

    def calls(client: Client) -> None:
        client.send("Boo", "s", ["x" * 100000], kind=MessageType.SIGNAL)
        job = [7, "/org/freedesktop/systemd1/job/7", "x.scope", "done"]
        manager = {"path": "/org/freedesktop/systemd1", "interface": "org.freedesktop.systemd1.Manager"}
        client.send("JobRemoved", "uoss", job, kind=MessageType.SIGNAL, **manager)
        client.daemon("GetId")

    rejected = host.daemons_log().count('type="signal"')
    using(host, user, calls)
    assert host.daemons_log().count('type="signal"') == rejected + 2
