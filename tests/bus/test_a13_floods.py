"""Attack A13: floods. Whatever arrives, the helper stays below the unit's MemoryMax=, loses nothing, and serves others.

Each flood has a world of its own, as the peak of a process's memory is never taken back.
"""

import array
import os
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from bus.calls import CALLS, using
from bus.client import NO_REPLY, Client
from bus.vitals import MIB, unhurt
from bus.world import User, as_user, world

CONNECTIONS, CALLS_EACH = 240, 13  # dbus-daemon's stock limit is 256 connections of one user
# Just below the largest message that is parsed; and just below what was the largest.
JUST_PARSED, ONCE_PARSED = 24 * 1024 - 256, 65_020


def large_call(client: Client, size: int, member: str = "PinThreads") -> bytes:
    """A call of about `size` bytes, nearly all of which are numbers: Python makes the most of these."""
    numbers = [1] * ((size - 400) // 4)
    _, data = client.message(member, "usa(uaub)au", [4242, "x", [[4243, [1], True]], numbers])
    assert size - 600 < len(data) <= size
    return data


def pour(clients: list[Client], data: bytes) -> None:
    """Send `data` on every connection, on all at once; end when all was sent."""
    left = {client.socket: memoryview(data) for client in clients}
    end = time.monotonic() + 120
    for socket in left:
        socket.setblocking(False)
    while left:
        assert time.monotonic() < end, f"{len(left)} connections could not send"
        for socket in select.select([], list(left), [], 1.0)[1]:
            left[socket] = left[socket][socket.send(left[socket]) :]
            if not left[socket]:
                del left[socket]


@contextmanager
def staying(user: User, attack: Callable[[], list[Client]]) -> Iterator[None]:
    """Attack, and keep the connections, which read nothing, during the block: who hangs up is dealt with quickly."""
    (done, finish), (stop, stopper) = os.pipe(), os.pipe()

    def run() -> int:
        clients = attack()
        os.write(finish, b"x")
        os.read(stop, 1)
        return len(clients)

    child = as_user(user, run)
    os.close(finish)
    try:
        assert os.read(done, 1) == b"x"
        yield
    finally:
        os.write(stopper, b"x")
        child.result()
        for end in (done, stop, stopper):
            os.close(end)


@pytest.mark.parametrize("size", [JUST_PARSED, ONCE_PARSED])
def test_a13_large_calls_from_many_connections_at_once(member: User, other: User, size: int) -> None:
    """3120 calls arrive before the first is judged: what waits must be bounded, whoever sent it."""

    def flood(path: str) -> list[Client]:
        clients = [Client(path) for _ in range(CONNECTIONS)]
        pour(clients, clients[0].copies(large_call(clients[0], size), CALLS_EACH))
        return clients

    with world() as host:
        with unhurt(host, other), staying(member, lambda: flood(host.socket)):
            # All of it has been dealt with when a call that was sent after it is answered.
            using(host, member, lambda client: client.call("GetLimits"))
        assert len(host.recorded(member)) <= 60


def test_a13_bursts(member: User, other: User) -> None:
    """200 connections, 120 calls each, pipelined: this alone ends a service that takes EAGAIN for the end."""

    def burst(path: str) -> Counter[str]:
        clients = [Client(path) for _ in range(200)]
        for client in clients:
            _, data = client.message("SetMemlock", *CALLS["SetMemlock"])
            client.socket.sendall(client.copies(data, 120))
        # Not parsed, as that would take longer than the attack.
        answers = (client.receive_bytes() for client in clients for _ in range(120 + 1))
        return Counter("refused" if b".Error.LimitExceeded" in answer else str(answer[1]) for answer in answers)

    with world() as host:
        with unhurt(host, other):
            count = as_user(member, lambda: burst(host.socket)).result()
        # NameAcquired, a signal (4), comes first; then a method return (2) for what was served: 60, again after 20 s.
        granted = count.pop("2")
        assert granted == len(host.recorded(member))
        assert 1 <= granted <= 240
        assert count == {"4": 200, "refused": 200 * 120 - granted}


def test_a13_one_call_after_the_other_on_many_connections(member: User, other: User) -> None:
    """A flood that never ends: whoever is answered calls again at once. Each honest call waits for one round of it.

    A round is 40 calls, most of which are refused; a helper that served them all, or one user after the other, would
    take hundreds of times as long.
    """

    def flood(path: str) -> Counter[str]:
        clients = [Client(path) for _ in range(40)]
        for client in clients:
            client.receive_bytes()  # NameAcquired
        count: Counter[str] = Counter()
        _, data = clients[0].message("SetMemlock", *CALLS["SetMemlock"])
        for _ in range(120):
            for client in clients:
                client.socket.sendall(client.copies(data, 1))
            for client in clients:
                count["refused" if b".Error.LimitExceeded" in client.receive_bytes() else "granted"] += 1
        return count

    with world() as host:
        with unhurt(host, other, cpu=60.0, ratio=40):
            count = as_user(member, lambda: flood(host.socket)).result()
        assert count["granted"] == len(host.recorded(member))
        assert count["refused"] >= 4000


def test_a13_a_flood_that_wants_no_replies(member: User, other: User) -> None:
    """No limit of the bus on unanswered calls applies to these."""

    def flood(path: str) -> None:
        with Client(path) as client:
            _, data = client.message("SetMemlock", *CALLS["SetMemlock"], flags=NO_REPLY)
            for _ in range(20):
                client.socket.sendall(data * 500)
            client.daemon("GetId")

    with world() as host:
        with unhurt(host, other):
            as_user(member, lambda: flood(host.socket)).result()
            using(host, member, lambda client: client.call("GetLimits"))
        # None at all, if the helper comes to ask whose they are when their sender has gone.
        assert len(host.recorded(member)) <= 240


def test_a13_peers_that_never_read(member: User, other: User) -> None:
    """What they are answered piles up in the bus, not in the helper, and nobody waits for them."""

    def flood(path: str) -> list[Client]:
        clients = [Client(path) for _ in range(20)]
        for client in clients:
            _, data = client.message("GetLimits")
            client.socket.settimeout(1.0)
            with suppress(TimeoutError):
                client.socket.sendall(client.copies(data, 1000))
        return clients

    with world() as host:
        with unhurt(host, other), staying(member, lambda: flood(host.socket)):
            using(host, member, lambda client: client.call("GetLimits"))
        assert 1 <= len(host.recorded(member)) <= 240


def test_a13_messages_of_32_megabytes(member: User, other: User) -> None:
    """As large as the bus lets pass; to members that exist and to one that does not."""

    def flood(path: str) -> None:
        for name in ("Nope", "PinThreads", "GetLimits"):
            with Client(path) as client:
                client.send(name, "ay", [bytes(31 * MIB)], flags=NO_REPLY)
                client.daemon("GetId")
        numbers = array.array("I", [1]) * (31 * MIB // 4)
        with Client(path) as client:
            # Its signature is right, only its size speaks against it. By hand: the library would take a minute.
            call = [4242, "x", [[4243, [1], True]], []]
            _, data = client.message("PinThreads", "usa(uaub)au", call, flags=NO_REPLY)
            length = int.from_bytes(data[4:8], "little") + len(numbers) * 4
            data = data[:4] + length.to_bytes(4, "little") + data[8:-4]
            client.socket.sendall(data + (len(numbers) * 4).to_bytes(4, "little") + numbers.tobytes())
            client.daemon("GetId")

    with world() as host:
        with unhurt(host, other, most=80 * MIB):
            as_user(member, lambda: flood(host.socket)).result()
            assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
        assert [act["member"] for act in host.recorded(member)] == ["GetLimits"]


def test_a13_many_messages_of_a_megabyte(member: User, other: User) -> None:
    """Drained one after the other, whoever sent them."""

    def flood(path: str) -> None:
        clients = [Client(path) for _ in range(20)]
        _, data = clients[0].message("SetMemlock", "ay", [bytes(MIB)], flags=NO_REPLY)
        pour(clients, clients[0].copies(data, 4))

    with world() as host:
        with unhurt(host, other, most=80 * MIB):
            as_user(member, lambda: flood(host.socket)).result()
            assert using(host, member, lambda client: client.call("GetLimits").short) == "ok"
        assert [act["member"] for act in host.recorded(member)] == ["GetLimits"]
