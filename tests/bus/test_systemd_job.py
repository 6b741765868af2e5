"""SystemBus.start_unit against a systemd1 of the test's own, on a real bus and under the real bus policy."""

import asyncio
from typing import Any

import pytest
from dbus_next.constants import MessageType
from dbus_next.message import Message

from bus.systemd1 import as_systemd
from bus.world import ROOT_USER, World, as_user
from qemu_launcher_helper.bus import DAEMON, SystemBus
from qemu_launcher_helper.contract import BUS_NAME, CallFailed

PATH, MANAGER = "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
ARGUMENTS: tuple[str, list[Any]] = ("x.scope", [])
Answer = str | tuple[str, list[Any]]


class FakeSystemd:
    """Owns systemd's name; answers StartTransientUnit with `first`, and each GetJob with the next of `then`.

    An answer is a signature and a body, or an error's name. When there is none left, nothing is answered any more.
    """

    def __init__(self, host: World, first: Answer, then: list[Answer]) -> None:
        self.client = as_systemd(host)
        # Before anybody calls: what comes while an answer is waited for is not kept.
        self.client.daemon("AddMatch", "s", ["type='signal',member='NameOwnerChanged'"])
        self.first, self.then = first, then

    def serve(self) -> list[str]:
        """Serve until the caller has left; what was called."""
        calls: list[str] = []
        caller = ""
        while (message := self.client.receive(60)) is not None:
            if message.member == "NameOwnerChanged" and message.body == [caller, caller, ""]:
                return calls
            if message.message_type is not MessageType.METHOD_CALL:
                continue
            caller = message.sender
            calls.append(f"{message.member} {message.body[0]}")
            match message.member:
                case "StartTransientUnit":
                    self.answer(message, self.first)
                case "GetJob" if self.then:
                    self.answer(message, self.then.pop(0) if len(self.then) > 1 else self.then[0])
                case "CancelJob":
                    self.answer(message, ("", []))
        return calls

    def answer(self, call: Message, answer: Answer) -> None:
        if isinstance(answer, str):
            self.client.answer(Message.new_error(call, answer, "no"))
        else:
            self.client.answer(Message.new_method_return(call, *answer))


def run(host: World, first: Answer, *then: Answer) -> tuple[str, list[str]]:
    """Let the helper's side ask for a job; how that ended, and what it called."""
    systemd = FakeSystemd(host, first, list(then))
    child = as_user(ROOT_USER, systemd.serve)
    systemd.client.socket.close()

    async def ask() -> str:
        bus = await SystemBus.connect(host.socket)
        await bus.call(DAEMON, "RequestName", "su", [BUS_NAME, 4], "u")
        try:
            await bus.start_unit(*ARGUMENTS)
        except CallFailed as err:
            return f"CallFailed {err.name}"
        else:
            return "ended"
        finally:
            await bus.close()

    return asyncio.run(ask()), child.result()


JOB: Answer = ("o", ["/org/freedesktop/systemd1/job/7"])
DONE: Answer = "org.freedesktop.systemd1.NoSuchJob"


def test_it_waits_until_there_is_no_such_job(host: World) -> None:
    assert run(host, JOB, JOB, JOB, DONE) == ("ended", ["StartTransientUnit x.scope", *["GetJob 7"] * 3])


def test_what_systemd_refuses(host: World) -> None:
    refused = "org.freedesktop.systemd1.UnitExists"
    assert run(host, refused) == (f"CallFailed {refused}", ["StartTransientUnit x.scope"])
    assert run(host, ("s", ["/org/freedesktop/systemd1/job/7"]))[0] == "CallFailed unexpected"


@pytest.mark.parametrize("answer", [JOB, None], ids=["never done", "silence"])
def test_a_job_that_is_not_done_in_time_is_cancelled(
    host: World, monkeypatch: pytest.MonkeyPatch, answer: Answer | None
) -> None:
    """Else systemd would carry it out later, on a number that may be somebody else's by then."""
    monkeypatch.setattr("qemu_launcher_helper.bus.JOB_SECONDS", 1.0)
    result, calls = run(host, JOB, *([answer] if answer else []))
    assert result == "CallFailed timeout"
    assert calls[-1] == "CancelJob 7"


def test_an_odd_answer_about_the_job_is_no_end_of_it(host: World) -> None:
    result, calls = run(host, JOB, "org.freedesktop.DBus.Error.AccessDenied")
    assert result == "CallFailed timeout"
    assert calls == ["StartTransientUnit x.scope", "GetJob 7", "CancelJob 7"]


def test_signals_mean_nothing(host: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends them: root's other services may say what they like, the job has not ended by that."""
    monkeypatch.setattr("qemu_launcher_helper.bus.JOB_SECONDS", 1.0)
    real = FakeSystemd.answer

    def answer(systemd: FakeSystemd, call: Message, answer: Answer) -> None:
        where: dict[str, Any] = {"destination": None, "path": PATH, "interface": MANAGER, "kind": MessageType.SIGNAL}
        systemd.client.send("JobRemoved", "uoss", [7, JOB[1][0], "x.scope", "done"], **where)
        real(systemd, call, answer)

    monkeypatch.setattr(FakeSystemd, "answer", answer)
    assert run(host, JOB, JOB)[0] == "CallFailed timeout"


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

    assert asyncio.run(ask()) == "org.freedesktop.DBus.Error.ServiceUnknown"
