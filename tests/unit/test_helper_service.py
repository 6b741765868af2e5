"""Identity (S1) and order of the procedure, with a bus that says strange things; the real bus is in tests/bus."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message
from dbus_next.signature import Variant

from qemu_launcher_helper import contract, limits
from qemu_launcher_helper.bus import Call
from qemu_launcher_helper.contract import Caller, CallFailed
from qemu_launcher_helper.limits import Settings
from qemu_launcher_helper.service import Service


def who(**facts: tuple[str, Any]) -> list[Any]:
    """An answer to GetConnectionCredentials."""
    return [{key: Variant(signature, value) for key, (signature, value) in facts.items()}]


GOOD = who(UnixUserID=("u", 1000), ProcessID=("u", 4242), UnixGroupIDs=("au", [1000]))
OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())
YES = [[True, False, {}]]


class FakeBus:
    """Gives each question its answers in turn, the last one for ever."""

    def __init__(self, identities: list[Any], polkit: Any = YES) -> None:
        self.identities, self.polkit = identities, polkit
        self.questions: list[str] = []
        self.replies: list[tuple[str | None, list[Any]]] = []

    async def daemon(self, member: str, *strings: str, answer: str | None = None) -> Any:
        self.questions.append(member)
        await asyncio.sleep(0)
        identity = self.identities.pop(0) if len(self.identities) > 1 else self.identities[0]
        if isinstance(identity, Exception):
            raise identity
        return identity

    async def call(self, *arguments: Any, **more: Any) -> Any:
        self.questions.append(arguments[1])
        return self.polkit

    def reply(self, call: Call, signature: str, body: list[Any], error: str | None = None) -> None:
        self.replies.append((error, body))


class Recording:
    def __init__(self, bus: FakeBus) -> None:
        self.bus = bus
        self.acts: list[Caller] = []

    async def perform(self, caller: Caller, settings: Settings, member: str, arguments: dict[str, Any]) -> list[Any]:
        self.bus.questions.append("act")
        self.acts.append(caller)
        return [5]


def a_call(member: str = "SetMemlock", signature: str = "ust", body: list[Any] | None = None) -> Call:
    values = [4242, "win11", 5] if body is None else body
    path, name, flags = contract.OBJECT_PATH, contract.BUS_NAME, MessageFlag.NONE
    message = Message(name, path, name, member, flags=flags, signature=signature, body=values, serial=3, sender=":1.5")
    return Call(message, bytes(message._marshall()))


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PATH", "/nonexistent/helper.toml")


def serve(bus: FakeBus, *calls: Call) -> Recording:
    recording = Recording(bus)

    async def run() -> None:
        service = Service(bus, recording)  # type: ignore[arg-type]
        for call in calls:
            service.receive(call)
        await asyncio.wait(service.tasks)

    asyncio.run(run())
    return recording


def test_the_procedure() -> None:
    bus = FakeBus([GOOD])
    recording = serve(bus, a_call())
    assert bus.questions == ["GetConnectionCredentials", "CheckAuthorization", "GetConnectionCredentials", "act"]
    assert bus.replies == [(None, [5])]
    [caller] = recording.acts
    assert (caller.sender, caller.uid, caller.pid) == (":1.5", 1000, 4242)


@pytest.mark.parametrize(
    "identity",
    [
        [],
        [{}],
        who(UnixUserID=("u", 1000)),
        who(ProcessID=("u", 4242)),
        who(UnixUserID=("s", "1000"), ProcessID=("u", 4242)),
        who(UnixUserID=("u", 1000), ProcessID=("s", "4242")),
        who(UnixUserID=("b", False), ProcessID=("u", 4242)),
        who(UnixUserID=("u", 1000), ProcessID=("u", 0)),
        who(UnixUserID=("i", -1), ProcessID=("u", 4242)),
        who(UnixUserID=("i", 0), ProcessID=("u", 4242)),
        who(UnixUserID=("u", 2**32 - 1), ProcessID=("u", 4242)),
        who(UnixUserID=("u", OVERFLOW), ProcessID=("u", 4242)),
        [{"UnixUserID": 1000, "ProcessID": 4242}],
        [GOOD[0], 1],
        CallFailed("org.freedesktop.DBus.Error.NameHasNoOwner", "gone"),
        CallFailed("timeout", "silence"),
        CallFailed("unexpected", "another signature"),
    ],
    ids=repr,
)
def test_whoever_cannot_be_named_is_refused(identity: Any) -> None:
    bus = FakeBus([identity])
    recording = serve(bus, a_call(), a_call("GetLimits", "", []))
    assert recording.acts == []
    assert {error for error, _ in bus.replies} == {"org.qemulauncher.Error.NotAuthorized"}
    assert "CheckAuthorization" not in bus.questions


@pytest.mark.parametrize(
    "later",
    [
        CallFailed("org.freedesktop.DBus.Error.NameHasNoOwner", "gone"),
        who(UnixUserID=("u", 1001), ProcessID=("u", 4242)),
        who(UnixUserID=("u", 1000), ProcessID=("u", 4243)),
        [],
    ],
    ids=repr,
)
def test_whoever_changes_while_polkit_thinks_is_refused(later: Any) -> None:
    bus = FakeBus([GOOD, later])
    recording = serve(bus, a_call())
    assert recording.acts == []
    assert [error for error, _ in bus.replies] == ["org.qemulauncher.Error.NotAuthorized"]


def test_no_polkit_no_act() -> None:
    bus = FakeBus([GOOD], polkit=[[False, True, {}]])
    assert serve(bus, a_call()).acts == []
    assert [error for error, _ in bus.replies] == ["org.qemulauncher.Error.NotAuthorized"]


def test_a_flood_of_one_connection_is_answered_without_asking_the_bus() -> None:
    bus = FakeBus([GOOD])
    recording = serve(bus, *[a_call() for _ in range(500)])
    assert len(bus.replies) == 500
    assert bus.questions.count("GetConnectionCredentials") <= 13 + 4
    assert len(recording.acts) == 4
    assert [error for error, _ in bus.replies].count("org.qemulauncher.Error.LimitExceeded") == 496


def test_a_user_without_a_harmless_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Entry:
        pw_name = "<b>evil\x1b[31m"

    monkeypatch.setattr("pwd.getpwuid", lambda uid: Entry)
    caplog.set_level("INFO")
    bus = FakeBus([GOOD])
    [caller] = serve(bus, a_call()).acts
    assert caller.user == "uid 1000"
    assert "evil" not in caplog.text
