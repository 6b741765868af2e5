"""Identity and order of the procedure, with a bus that says strange things; the real bus is in tests/bus."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from dbus_next.constants import MessageFlag
from dbus_next.message import Message

from qemu_launcher_helper import contract, limits
from qemu_launcher_helper.bus import Call
from qemu_launcher_helper.contract import Caller, CallFailed
from qemu_launcher_helper.limits import Settings
from qemu_launcher_helper.service import Service

Answer = list[Any] | CallFailed


def who(uid: Answer, pid: Answer) -> tuple[Answer, Answer]:
    """The bus's answers to GetConnectionUnixUser and GetConnectionUnixProcessID."""
    return uid, pid


GOOD = who([1000], [4242])
OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())
GONE = CallFailed("org.freedesktop.DBus.Error.NameHasNoOwner", "gone")
YES = [[True, False, {}]]


class FakeBus:
    """Gives each question its answers in turn, the last one for ever."""

    def __init__(self, identities: list[Any], polkit: Any = YES) -> None:
        self.identities, self.polkit = identities, polkit
        self.questions: list[str] = []
        self.replies: list[tuple[str | None, list[Any]]] = []

    async def daemon(self, member: str, *strings: str, answer: str | None = None) -> Any:
        assert answer == "u", "any other signature is refused by SystemBus.call"
        if member == "GetConnectionUnixUser":
            self.questions.append("who")
            self.asked = self.identities.pop(0) if len(self.identities) > 1 else self.identities[0]
        await asyncio.sleep(0)
        found = self.asked[member == "GetConnectionUnixProcessID"]
        if isinstance(found, Exception):
            raise found
        return found

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
    assert bus.questions == ["who", "CheckAuthorization", "who", "act"]
    assert bus.replies == [(None, [5])]
    [caller] = recording.acts
    assert (caller.sender, caller.uid, caller.pid) == (":1.5", 1000, 4242)


@pytest.mark.parametrize(
    "identity",
    [
        who([], [4242]),
        who([1000], []),
        who([], []),
        who([1000], [0]),
        who([2**32 - 1], [4242]),
        who([OVERFLOW], [4242]),
        who(GONE, [4242]),
        who([1000], GONE),
        who(CallFailed("timeout", "silence"), [4242]),
        who([1000], CallFailed("timeout", "silence")),
        who([1000], CallFailed("unexpected", "another signature")),
    ],
    ids=repr,
)
def test_whoever_cannot_be_named_is_refused(identity: Any) -> None:
    bus = FakeBus([identity])
    recording = serve(bus, a_call(), a_call("GetLimits", "", []))
    assert recording.acts == []
    assert {error for error, _ in bus.replies} == {"org.qemulauncher.Error.NotAuthorized"}
    assert "CheckAuthorization" not in bus.questions


@pytest.mark.parametrize("later", [who(GONE, GONE), who([1001], [4242]), who([1000], [4243]), who([], [])], ids=repr)
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
    assert bus.questions.count("who") <= 13 + 4
    assert len(recording.acts) == 4
    assert [error for error, _ in bus.replies].count("org.qemulauncher.Error.LimitExceeded") == 496


def test_all_connections_together_have_a_limit() -> None:
    """Of any number of users: what they send is kept until it is known whose it is."""
    bus = FakeBus([GOOD])
    calls = [a_call() for _ in range(contract.MAX_CALLS + 2)]
    for number, call in enumerate(calls):
        call.header.sender = f":1.{number}"
    serve(bus, *calls)
    assert [(error, body) for error, body in bus.replies if "Too many calls at a time" in body] == [
        ("org.qemulauncher.Error.LimitExceeded", ["Too many calls at a time"])
    ] * 2


def test_a_user_without_a_harmless_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("pwd.getpwuid", lambda uid: ("<b>evil\x1b[31m", "x", uid, uid, "", "/", "/bin/sh"))
    caplog.set_level("INFO")
    bus = FakeBus([GOOD])
    [caller] = serve(bus, a_call()).acts
    assert caller.user == "uid 1000"
    assert "evil" not in caplog.text


@pytest.mark.parametrize(("known", "refused"), [(True, 0), (False, 10)])
def test_uids_without_an_account_have_one_quota_together(
    monkeypatch: pytest.MonkeyPatch, *, known: bool, refused: int
) -> None:
    """A user may have 65,536 subordinate uids, subuid(5), keep his groups, and call as each of them.

    dbus-daemon knows their groups from accounts, and lets none of them in; dbus-broker asks the kernel.
    """

    def account(uid: int) -> tuple[str, str, int, int, str, str, str]:
        if not known:
            raise KeyError(uid)
        return f"user{uid}", "x", uid, uid, "", "/", "/bin/sh"

    monkeypatch.setattr("pwd.getpwuid", account)
    bus = FakeBus([who([100000 + number], [4242]) for number in range(contract.CALLS_PER_WINDOW + 10)])

    async def run() -> None:
        service = Service(bus, Recording(bus))  # type: ignore[arg-type]
        for _ in range(contract.CALLS_PER_WINDOW + 10):
            await service._serve(a_call("GetLimits", "", []))

    asyncio.run(run())
    assert [error for error, _ in bus.replies] == [None] * (contract.CALLS_PER_WINDOW + 10 - refused) + [
        contract.LimitExceeded.wire_name
    ] * refused
