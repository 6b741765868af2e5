"""SystemBus.start_unit against a systemd1 of the test's own, on a real bus and under the real bus policy."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from bus.client import Client
from bus.world import ROOT_USER, World, as_user
from qemu_launcher_helper.bus import DAEMON, SystemBus
from qemu_launcher_helper.contract import BUS_NAME, CallFailed

SYSTEMD, PATH, MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
ARGUMENTS: tuple[str, list[Any]] = ("x.scope", [])


class FakeSystemd:
    """Owns systemd's name and answers one job as `script` says."""

    def __init__(self, host: World) -> None:
        self.client = Client(host.socket)
        assert self.client.daemon("RequestName", "su", [SYSTEMD, 4]).body == [1]
        self.subscribed = False

    def signal(self, job: str, result: str) -> None:
        body = [7, job, "x.scope", result]
        where: dict[str, Any] = {"destination": None, "path": PATH, "interface": MANAGER, "kind": MessageType.SIGNAL}
        self.client.send("JobRemoved", "uoss", body, **where)

    def reply(self, call: Message, signature: str = "", body: tuple[Any, ...] = ()) -> None:
        answer = Message.new_method_return(call, signature, list(body))
        answer.serial = next(self.client._serials)
        self.client.socket.sendall(bytes(answer._marshall()))

    def serve(self, script: Callable[["FakeSystemd", Message], None]) -> bool:
        while (call := self.client.receive(20)) is not None:
            if call.member == "Subscribe":
                self.subscribed = True
                self.reply(call)
            elif call.member == "StartTransientUnit":
                script(self, call)
                return self.subscribed
        return False


def run(host: World, script: Callable[[FakeSystemd, Message], None]) -> tuple[Any, bool]:
    """Let the helper's side ask for a job; return what it got, and whether it had subscribed."""
    systemd = FakeSystemd(host)
    child = as_user(ROOT_USER, lambda: systemd.serve(script))
    systemd.client.socket.close()

    waits: list[asyncio.Timeout] = []

    def waiting(seconds: float) -> asyncio.Timeout:
        waits.append(real(seconds))
        return waits[-1]

    async def ask() -> str:
        bus = await SystemBus.connect(host.socket)
        await bus.call(DAEMON, "RequestName", "su", [BUS_NAME, 4], "u")
        try:
            await bus.start_unit(*ARGUMENTS)
            return "timeout" if waits[-1].expired() else "ended"
        except CallFailed as err:
            return f"CallFailed {err.name}"
        finally:
            await bus.close()

    real = asyncio.timeout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "timeout", waiting)
        result = asyncio.run(ask())
    return result, child.result()


def early(systemd: FakeSystemd, call: Message) -> None:
    """The signal comes before the reply that names the job."""
    systemd.signal("/org/freedesktop/systemd1/job/7", "done")
    systemd.reply(call, "o", ("/org/freedesktop/systemd1/job/7",))


def late(systemd: FakeSystemd, call: Message) -> None:
    """Another's job ends first."""
    systemd.reply(call, "o", ("/org/freedesktop/systemd1/job/8",))
    systemd.signal("/org/freedesktop/systemd1/job/7", "canceled")
    systemd.signal("/org/freedesktop/systemd1/job/8", "failed")


def refused(systemd: FakeSystemd, call: Message) -> None:
    answer = Message.new_error(call, "org.freedesktop.systemd1.UnitExists", "x.scope was already loaded")
    answer.serial = 99
    systemd.client.socket.sendall(bytes(answer._marshall()))


def never(systemd: FakeSystemd, call: Message) -> None:
    """Only another's job ends."""
    systemd.reply(call, "o", ("/org/freedesktop/systemd1/job/8",))
    systemd.signal("/org/freedesktop/systemd1/job/7", "done")


def silly(systemd: FakeSystemd, call: Message) -> None:
    systemd.reply(call, "s", ("/org/freedesktop/systemd1/job/7",))


@pytest.mark.parametrize(
    ("script", "result"),
    [
        (early, "ended"),
        (late, "ended"),
        (never, "timeout"),
        (refused, "CallFailed org.freedesktop.systemd1.UnitExists"),
        (silly, "CallFailed unexpected"),
    ],
)
def test_the_end_of_the_job(
    host: World, script: Callable[[FakeSystemd, Message], None], result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is never:
        monkeypatch.setattr("qemu_launcher_helper.bus.JOB_SECONDS", 1.0)
    assert run(host, script) == (result, True)


def test_signals_of_others_are_nobody(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """root's other services may send JobRemoved, says the bus; only systemd's own connection counts."""
    monkeypatch.setattr("qemu_launcher_helper.bus.JOB_SECONDS", 1.0)

    def forged(systemd: FakeSystemd, call: Message) -> None:
        with Client(host.socket) as forger:
            where: dict[str, Any] = {"destination": call.sender, "path": PATH, "interface": MANAGER}
            job = "/org/freedesktop/systemd1/job/7"
            forger.send("JobRemoved", "uoss", [7, job, "x.scope", "done"], kind=MessageType.SIGNAL, **where)
            forger.daemon("GetId")
        systemd.reply(call, "o", (job,))

    assert run(host, forged) == ("timeout", True)
    assert run(host, early) == ("ended", True)


def test_without_systemd(host: World) -> None:
    async def ask() -> str:
        bus = await SystemBus.connect(host.socket)
        try:
            await bus.start_unit(*ARGUMENTS)
        except CallFailed as err:
            return err.name
        else:
            return "started"
        finally:
            await bus.close()

    assert asyncio.run(ask()) == "org.freedesktop.DBus.Error.NameHasNoOwner"
