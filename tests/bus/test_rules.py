"""What an administrator's own rule is up against: three actions that imply each other, and passwords that are kept.

Each statement is one that the manual makes, shown with the real polkitd.
"""

from typing import Any

import pytest

from bus.agent import Agent
from bus.calls import using
from bus.client import INTERACTIVE
from bus.world import User, World, world

Call = tuple[str, str, list[Any]]  # member, signature, body


def memlock(amount: int, vm: str = "lab") -> Call:
    return "SetMemlock", "ust", [4242, vm, amount]


def pin(*cpus: list[int], vm: str = "lab") -> Call:
    return "PinThreads", "usa(uaub)au", [4242, vm, [[4243 + n, each, True] for n, each in enumerate(cpus)], []]


def schedule(policy: str, priority: int, vm: str = "lab") -> Call:
    return "SetScheduler", "usausu", [4242, vm, [4243], policy, priority]


def answers(host: World, user: User, calls: list[Call]) -> list[str]:
    """How each call of `user` ends; he is ready to give a password."""
    ends: list[str] = using(host, user, lambda bus: [bus.call(*call, flags=INTERACTIVE).short for call in calls])
    return ends


def test_a_kept_password_is_good_for_any_details(member: User) -> None:
    """Why an answer by details is YES, NO or AUTH_ADMIN: what is kept stands before polkitd's NO."""
    rule = """polkit.addRule(function (action, subject) {
        if (action.id === "org.qemulauncher.pin-threads") {
            return action.lookup("cpus") === "8" ? polkit.Result.%s : polkit.Result.NO;
        }
    });"""
    for result, second in ("AUTH_ADMIN_KEEP", "ok"), ("AUTH_ADMIN", "NotAuthorized"):
        rules = {"30-by-details.rules": rule % result}
        with world(rules=rules, member_rule=False) as host, Agent(host, member, answers=True):
            assert answers(host, member, [pin([7]), pin([8]), pin([7])]) == ["NotAuthorized", "ok", second]


@pytest.mark.parametrize(
    ("refused", "call"),
    [("set-memlock", memlock(1)), ("pin-threads", pin([7])), ("set-scheduler", schedule("fifo", 1))],
)
def test_an_administrators_no_to_one_action_holds(member: User, refused: str, call: Call) -> None:
    """Though the packaged rule says yes to the two that imply it: the other calls show that it is there."""
    rule = """polkit.addRule(function (action, subject) {
        if (action.id === "org.qemulauncher.%s") { return polkit.Result.NO; }
    });"""
    calls = [memlock(1), pin([7]), schedule("fifo", 1)]
    with world(rules={"30-not-this.rules": rule % refused}) as host:
        expected = ["NotAuthorized" if each == call else "ok" for each in calls]
        assert answers(host, member, calls) == expected


def test_a_careless_yes_to_one_action_is_a_yes_to_all(member: User) -> None:
    """Why each action of a rule by details needs details of its own."""
    rule = """polkit.addRule(function (action, subject) {
        if (action.id === "org.qemulauncher.set-memlock") { return polkit.Result.YES; }
        if (action.id === "org.qemulauncher.pin-threads") { return polkit.Result.NO; }
    });"""
    with world(rules={"30-careless.rules": rule}) as host:
        assert answers(host, member, [pin([7])]) == ["ok"]
