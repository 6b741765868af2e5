"""QMP over a real socketpair, with a scripted other end that behaves as no well-behaved QEMU would."""

import asyncio
import gc
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from qemu_launcher.qmp import ConnectionLost, ProtocolError, Qmp, QmpRefused

GREETING = {"QMP": {"version": {"qemu": {"major": 10}}, "capabilities": ["oob"]}}


class Far:
    """The far end: reads commands, writes whatever a test wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self.data = b""

    async def send(self, *messages: Any) -> None:
        data = b"".join((m if isinstance(m, bytes) else json.dumps(m).encode()) + b"\r\n" for m in messages)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def command(self) -> dict[str, Any]:
        while b"\n" not in self.data:
            chunk = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            assert chunk, "the near end closed"
            self.data += chunk
        line, _, self.data = self.data.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value

    async def assert_asked_nothing(self) -> None:
        """Nothing has come, nor comes in a moment."""
        await asyncio.sleep(0.05)
        with pytest.raises(BlockingIOError):
            self.sock.recv(1)

    async def negotiate(self) -> None:
        await self.send(GREETING)
        command = await self.command()
        assert command["execute"] == "qmp_capabilities"
        await self.send({"return": {}, "id": command["id"]})


def run(near: Callable[[Qmp, Far], Awaitable[None]]) -> None:
    """Run a test body with a negotiated connection."""

    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            far = Far(theirs)
            negotiating = asyncio.ensure_future(far.negotiate())
            qmp = await Qmp.negotiated(ours)
            await negotiating
            try:
                await near(qmp, far)
            finally:
                await qmp.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_events_between_command_and_answer_are_heard_and_confuse_nothing() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        heard: list[str] = []
        qmp.listen(lambda event: heard.append(event["event"]))
        asked = asyncio.ensure_future(qmp.execute("query-status"))
        command = await far.command()
        await far.send({"event": "STOP"}, {"return": {"status": "running"}, "id": command["id"]}, {"event": "RESUME"})
        assert await asked == {"status": "running"}
        asked = asyncio.ensure_future(qmp.execute("x"))
        await far.send({"return": 1, "id": (await far.command())["id"]})
        await asked
        assert heard == ["STOP", "RESUME"]

    run(body)


def test_refusal_leaves_the_connection_good() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        asked = asyncio.ensure_future(qmp.execute("nonsense", {"a": 1}))
        command = await far.command()
        assert command["arguments"] == {"a": 1}
        error = {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}
        await far.send({"error": error, "id": command["id"]})
        with pytest.raises(
            QmpRefused, match="QEMU refused nonsense: The command nonsense has not been found"
        ) as caught:
            await asked
        assert caught.value.error_class == "CommandNotFound"
        asked = asyncio.ensure_future(qmp.execute("cont"))
        await far.send({"return": {}, "id": (await far.command())["id"]})
        assert await asked == {}

    run(body)


def test_end_of_file_reaches_every_waiting_caller_and_every_later_one() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        asked = [asyncio.ensure_future(qmp.execute(name)) for name in ("one", "two")]
        await far.command()
        far.sock.shutdown(socket.SHUT_RDWR)
        for one in asked:
            with pytest.raises(ConnectionLost):
                await one
        with pytest.raises(ConnectionLost):
            await qmp.execute("three")

    run(body)


def test_end_while_a_command_is_being_sent_makes_no_noise() -> None:
    """QEMU is ended by somebody else while we tell it to quit: one failure reaches the caller, and no other is left."""
    noise: list[dict[str, Any]] = []

    async def body(qmp: Qmp, far: Far) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))

        async def drain() -> None:
            far.sock.close()
            assert qmp._pump is not None
            await asyncio.wait([qmp._pump])
            raise ConnectionResetError

        qmp._writer.drain = drain  # type: ignore[method-assign]  # the moment at which it must happen
        with pytest.raises(ConnectionLost, match="QEMU closed its monitor while quit was sent"):
            await qmp.execute("quit")
        gc.collect()

    run(body)
    assert noise == []


def test_half_a_line_before_the_end_is_the_end() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        asked = asyncio.ensure_future(qmp.execute("one"))
        await far.command()
        await asyncio.get_running_loop().sock_sendall(far.sock, b'{"return": {}')
        far.sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionLost):
            await asked

    run(body)


@pytest.mark.parametrize(
    "line", [b"not json", b"[1]", b"3", b'{"neither": 1}', b'{"return": {}}', b'{"return": {}, "id": 99}']
)
def test_nonsense_ends_the_connection(line: bytes) -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        asked = asyncio.ensure_future(qmp.execute("one"))
        await far.command()
        await far.send(line)
        with pytest.raises(ProtocolError):
            await asked

    run(body)


def test_answer_to_a_caller_who_no_longer_waits_is_dropped() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        given_up = asyncio.ensure_future(qmp.execute("slow"))
        slow = await far.command()
        given_up.cancel()
        await asyncio.wait([given_up])
        asked = asyncio.ensure_future(qmp.execute("quick"))
        quick = await far.command()
        await far.send({"return": "late", "id": slow["id"]}, {"return": "in time", "id": quick["id"]})
        assert await asked == "in time"

    run(body)


def test_answers_longer_than_asyncios_own_limit() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        asked = asyncio.ensure_future(qmp.execute("query-cpus-fast"))
        await far.send({"return": ["x" * 300] * 2000, "id": (await far.command())["id"]})
        assert len(await asked) == 2000

    run(body)


def test_no_greeting() -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            await Far(theirs).send({"hello": 1})
            with pytest.raises(ProtocolError, match="expected QEMU's greeting"):
                await Qmp.negotiated(ours)

    asyncio.run(asyncio.wait_for(main(), 30))


def shutdown_for(reason: str) -> dict[str, Any]:
    return {"event": "SHUTDOWN", "data": {"guest": reason.startswith("guest"), "reason": reason}}


RESUME, STOP = {"event": "RESUME"}, {"event": "STOP"}
# What QEMU 7.2 sends, and whether it leaves then.
ENDS = {
    "powered down": ([RESUME, shutdown_for("guest-shutdown")], True),
    "signalled": ([RESUME, shutdown_for("host-signal")], True),
    "signalled while paused": ([RESUME, STOP, shutdown_for("host-signal")], True),
    "told to quit while paused": ([RESUME, STOP, shutdown_for("host-qmp-quit")], True),
    "its window closed while paused": ([RESUME, STOP, shutdown_for("host-ui")], True),
    "it says less than we know": ([RESUME, {"event": "SHUTDOWN"}], True),
    "-no-shutdown": ([RESUME, shutdown_for("guest-shutdown"), STOP], False),
    "-no-shutdown, let go on": ([RESUME, shutdown_for("guest-shutdown"), STOP, RESUME], False),
    "-no-shutdown, signalled then": ([RESUME, shutdown_for("guest-shutdown"), STOP, shutdown_for("host-signal")], True),
    "-no-shutdown -no-reboot, reset while it is down": (
        [RESUME, shutdown_for("guest-shutdown"), STOP, shutdown_for("host-qmp-system-reset")],
        False,
    ),
    "nothing": ([RESUME, STOP, RESUME], False),
}


@pytest.mark.parametrize("end", ENDS)
def test_qemu_that_leaves_is_asked_nothing(end: str) -> None:
    """In monitor_cleanup() of QEMU 7.2 a command can stop it for good."""
    events, leaves = ENDS[end]

    async def body(qmp: Qmp, far: Far) -> None:
        last = asyncio.Event()
        qmp.listen(lambda event: last.set() if event == {"event": "LAST"} else None)
        await far.send(*events, {"event": "LAST"})
        await last.wait()
        assert qmp.leaving.is_set() == leaves
        asking = asyncio.ensure_future(qmp.execute("query-status"))
        if leaves:
            await far.assert_asked_nothing()
            far.sock.close()
            with pytest.raises(ConnectionLost):
                await asking
        else:
            command = await far.command()
            await far.send({"return": {}, "id": command["id"]})
            assert await asking == {}

    run(body)


def test_what_was_held_back_is_asked_of_a_qemu_that_stays() -> None:
    async def body(qmp: Qmp, far: Far) -> None:
        await far.send(RESUME, shutdown_for("guest-shutdown"))
        await qmp.leaving.wait()
        asking = asyncio.ensure_future(qmp.execute("query-status"))
        await far.assert_asked_nothing()
        await far.send(STOP)
        command = await far.command()
        await far.send({"return": {"status": "shutdown"}, "id": command["id"]})
        assert await asking == {"status": "shutdown"}

    run(body)


def test_what_is_held_back_stays_so_if_qemu_would_stay_for_a_moment_only() -> None:
    """-no-shutdown, and somebody sends it SIGTERM: both events come in one read."""

    async def body(qmp: Qmp, far: Far) -> None:
        await far.send(RESUME, shutdown_for("guest-shutdown"))
        await qmp.leaving.wait()
        asking = asyncio.ensure_future(qmp.execute("query-status"))
        await asyncio.sleep(0)
        await far.send(STOP, shutdown_for("host-signal"), {"event": "LAST"})
        await far.assert_asked_nothing()
        far.sock.close()
        with pytest.raises(ConnectionLost):
            await asking

    run(body)
