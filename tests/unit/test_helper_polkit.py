"""Attack A3: everything polkit could answer instead of a yes. The real polkitd is in tests/bus; this one lies."""

import asyncio
from typing import Any

import pytest
from dbus_next.signature import Variant

from qemu_launcher_helper.contract import Caller, CallFailed
from qemu_launcher_helper.service import POLKIT, Authority

CALLER = Caller(":1.42", 1000, 4242, "alice", 1000)
ACTION = "org.qemulauncher.pin-threads"


class FakeBus:
    """Answers every call with the same body, or the same error."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []
        self.cancelled: list[tuple[Any, ...]] = []
        self.there = True

    async def call(self, *arguments: Any) -> Any:
        if arguments[1] == "CancelCheckAuthorization":
            self.cancelled.append(arguments[2:4])
            raise CallFailed("org.freedesktop.PolicyKit1.Error.Failed", "and nobody minds")
        self.calls.append(arguments)
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is Ellipsis:
            await asyncio.Event().wait()
        return self.answer

    async def is_there(self, name: str) -> bool:
        return self.there


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after the caller every moment."""
    monkeypatch.setattr("qemu_launcher_helper.contract.DIALOG_PAUSE", 0.01)


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [[]],
        [[False, True, {}]],
        [[False, False, {}]],
        [[1, False, {}]],
        [["True", False, {}]],
        [[[True], False, {}]],
        [[None, None, None]],
        [True, False, {}],
        [True],
        [[True]],
        [[True, False]],
        [[True, False, {}], 1],
        CallFailed("org.freedesktop.DBus.Error.ServiceUnknown", "no polkit"),
        CallFailed("org.freedesktop.PolicyKit1.Error.Failed", "the name does not exist"),
        CallFailed("timeout", "silence"),
        CallFailed("unexpected", "another signature"),
    ],
    ids=repr,
)
def test_a3_whatever_is_not_a_yes_is_a_no(answer: Any) -> None:
    async def ask() -> tuple[bool, bool]:
        return await Authority(FakeBus(answer)).check(CALLER, ACTION, {})  # type: ignore[arg-type]

    granted, _ = asyncio.run(ask())
    assert granted is False


def test_a3_a_yes_and_the_question() -> None:
    async def ask() -> tuple[FakeBus, tuple[bool, bool]]:
        bus = FakeBus([[True, False, {}]])
        return bus, await Authority(bus).check(CALLER, ACTION, {"vm": "x"})  # type: ignore[arg-type]

    bus, result = asyncio.run(ask())
    assert result == (True, False)
    subject = ["system-bus-name", {"name": Variant("s", ":1.42")}]
    [call] = bus.calls
    assert call[:3] == (POLKIT, "CheckAuthorization", "(sa{sv})sa{ss}us")
    assert call[3] == [subject, ACTION, {"vm": "x"}, 0, ""]
    assert call[4] == "(bba{ss})"


def test_a3_a_dialog_that_nobody_answers_is_cancelled() -> None:
    async def ask() -> tuple[FakeBus, bool]:
        bus = FakeBus(...)
        return bus, await Authority(bus, dialog_seconds=0.05).dialog(CALLER, ACTION, {})  # type: ignore[arg-type]

    bus, granted = asyncio.run(ask())
    assert granted is False
    [call] = bus.calls
    assert call[3][3] == 1
    assert call[3][4] != ""
    assert bus.cancelled == [("s", [call[3][4]])]


def test_a_caller_who_leaves_ends_his_dialog() -> None:
    async def ask() -> tuple[FakeBus, bool]:
        bus = FakeBus(...)
        bus.there = False
        return bus, await Authority(bus).dialog(CALLER, ACTION, {})  # type: ignore[arg-type]

    bus, granted = asyncio.run(ask())
    assert granted is False
    assert len(bus.cancelled) == 1


def test_a3_a_no_in_the_dialog() -> None:
    async def ask() -> bool:
        return await Authority(FakeBus([[False, False, {}]])).dialog(CALLER, ACTION, {})  # type: ignore[arg-type]

    assert asyncio.run(ask()) is False
